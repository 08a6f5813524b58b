"""The command line on the tiny model: from a run to its board, bad input, interrupts, kills and resumes."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.engine.engine import Engine
from harness.engine.types import Outcome
from harness.machine import machine
from harness.run import sequential
from tests.tiny_run import CELLS, FAST, METHODS, RUN, TASK, TINY, call, key, manifest, only, records, tree

ROOT = Path(__file__).parents[2]
MANY = 8  # samples of a run that a signal must find unfinished
pytestmark = pytest.mark.usefixtures("_no_pictures")
Captured = pytest.CaptureFixture[str]


def complained(err: str) -> str:
    """The one line that a refused command leaves, beside what it says about its progress."""
    progress = ("loading ", "run ", "samples:")
    (line,) = (line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith(progress))
    assert line.startswith("harness: ")
    return line


def test_a_run_leaves_records_a_manifest_and_a_board(finished: Path) -> None:
    stored = records(finished)
    assert len({key(record) for record in stored}) == len(stored) == 3 * CELLS
    for record in stored:
        assert record["status"] == "ok" and 0 <= record["metrics"]["score"] <= 1
        assert 0 < record["kv_bytes"] <= record["full_bytes"] and not record["over_budget"]
        assert record["nll"] > 0 and record["nll_tokens"] == 8 and len(record["token_ids"]) <= 6
    full = [record for record in stored if record["budget"] == "full"]
    assert all(record["kv_bytes"] == record["full_bytes"] and record["method"] == "fullkv" for record in full)
    told = manifest(finished)
    assert (told["status"], told["samples"], told["cells"]) == ("finished", 3, CELLS)
    assert tuple(told["command"]) == ("harness", *RUN, "--out", str(finished))
    assert told["spec"]["model"]["dtype"] == "float32"
    assert {"run.json", "records.jsonl", "board.md", "board.csv"} <= {path.name for path in only(finished).iterdir()}
    assert all(method in (only(finished) / "board.md").read_text() for method in METHODS)


def test_a_record_names_the_processor_and_no_gpu_that_did_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    here = {**machine(), "processor": "Xeon", "accelerators": ["H100"]}
    monkeypatch.setattr(sequential, "machine", lambda: here)
    assert call("run", *FAST, "--methods", "fullkv", "--limit", "1", "--out", tmp_path) == 0
    assert {record["accelerator"] for record in records(tmp_path)} == {"Xeon"}
    assert capsys.readouterr().out.count("tiny, float32 on Xeon, query-aware") == 1


def test_drawn_contexts_are_the_default_and_named_in_every_record(tmp_path: Path) -> None:
    few = ("--budgets", "32", "--methods", "fullkv", "--nll-tokens", "8", "--observe", "0")
    assert call("run", *TINY, *TASK, *few, "--out", tmp_path) == 0
    told = manifest(tmp_path)["spec"]
    assert told["contexts"] == "drawn" and told["tasks"][0]["provenance"]["contexts"].startswith("drawn")
    assert len({record["meta"]["group"] for record in records(tmp_path)}) == 3


def test_repeating_a_finished_run_changes_no_record(results: Path, capsys: Captured) -> None:
    before = (only(results) / "records.jsonl").read_bytes()
    assert call(*RUN, "--out", results) == 0
    assert (only(results) / "records.jsonl").read_bytes() == before
    assert "0 of 3 samples to do" in capsys.readouterr().err


def test_board_is_made_from_records_alone(results: Path, capsys: Captured) -> None:
    for name in ("board.md", "board.csv"):
        (only(results) / name).unlink()
    before = tree(results)
    assert call("board", only(results), "--out", results / "boards", "--name", "mine") == 0
    shown = capsys.readouterr().out
    assert all(method in shown for method in METHODS)
    assert {"mine.md", "mine.csv"} <= {path.name for path in (results / "boards").iterdir()}
    assert {name: data for name, data in tree(results).items() if not name.startswith("boards")} == before
    assert call("board", results) == 0


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", ["compilerkv", "fullkv", "snapkv", "streamingllm"]),
        ("tasks", ["longbench/qasper", "ruler/vt", "stdlib/next_line"]),
        ("models", ["smollm2-135m", "tiny"]),
        ("boards", ["compilerkv", "compilerkv-longbench", "quick"]),
    ],
)
def test_list_names_what_can_be_asked_for(what: str, names: list[str], capsys: Captured) -> None:
    assert call("list", what) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(names) <= set(listed)


def test_new_method_names_what_it_wrote(tmp_path: Path, capsys: Captured) -> None:
    assert call("new-method", "made_up", "--to", tmp_path) == 0
    told = sorted(line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines())
    assert told == sorted(map(str, (path for path in tmp_path.rglob("*") if path.is_file()))) != []


CONFIGS = {
    "empty.toml": b"",
    "broken.toml": b"methods = [",
    "binary.toml": b'methods = ["\xff"]',
    "unknown.toml": b'methods = ["snapkv"]\ntasks = ["stdlib"]\nbudegts = ["64"]\n',
    "type.toml": b'methods = ["snapkv"]\ntasks = ["stdlib"]\nseed = "x"\n',
    "set.toml": b'methods = ["snapkv"]\ntasks = ["stdlib"]\nset = 5\n',
}
BAD = [
    ("--methods snapvk", "unknown method 'snapvk'; did you mean 'snapkv'"),
    ("--methods snapkv@papre", "unknown preset 'papre'"),
    ("--methods ,", "argument --methods: ',' names nothing"),
    ("--tasks stdlb", "unknown task 'stdlb'; did you mean 'stdlib'"),
    ("--tasks longbench/qasper --data-dir .", "qasper.jsonl"),
    ("--model tinny", "unknown model 'tinny'; did you mean 'tiny'"),
    ("--dtype int3", "unknown dtype 'int3'"),
    ("--device cuda:77", "device 'cuda:77' is not available"),
    ("--budgets 0", "budget 0 keeps nothing"),
    ("--budgets=-64", "budget -64 keeps nothing"),
    ("--budgets many", "budget 'many' is not a number"),
    ("--budgets 5000", "budget 5000 is not below any prompt of stdlib/next_line"),
    ("--lengths 99999", "99999"),
    ("--lengths abc", "'abc' is not whole numbers"),
    ("--max-tokens 100", "100 tokens"),
    ("--limit 0", "--limit 0 is too small"),
    ("--nll-tokens -1", "--nll-tokens -1 is negative"),
    ("--set snapkv.recnt=4", "no parameter 'recnt'; did you mean 'recent'"),
    ("--set snapkv.recent=many", "valid integer"),
    ("--set snapkv.recent", "has no value"),
    ("--set h2o.mean=true", "names no method of this run"),
    ("--config absent.toml", "cannot read 'absent.toml'"),
    ("--config broken.toml", "broken.toml is not TOML"),
    ("--config binary.toml", "binary.toml is not TOML"),
    ("--config unknown.toml", "option budegts"),
    ("--config type.toml", "option seed"),
    ("--config set.toml", "option set"),
    ("--config set.toml --set snapkv.recent=4", "option set"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_is_one_line_and_touches_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, arguments: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in CONFIGS.items():
        (tmp_path / name).write_bytes(data)
    before = tree(finished)
    assert call("run", *FAST, "--methods", "snapkv", *arguments.split(), "--out", finished) == 2
    assert says in complained(capsys.readouterr().err)
    assert tree(finished) == before


def test_bad_input_of_other_commands(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "empty.toml").touch()
    bad: list[tuple[Sequence[str | Path], str]] = [
        (("board", tmp_path), "no run in"),
        (("fetch", "moon"), "unknown asset 'moon'"),
        (("dance",), "'dance'"),
        ((), "COMMAND"),
        (("run", "--config", tmp_path / "empty.toml"), "no methods asked for"),
        (("run", "--config", "quikc"), "packaged boards: baselines, compilerkv, compilerkv-longbench, graded"),
        ((*RUN, "--out", tmp_path / "empty.toml"), "cannot write"),
    ]
    for arguments, says in bad:
        assert call(*arguments) == 2
        assert says in complained(capsys.readouterr().err)


def test_a_damaged_record_is_named_and_nothing_is_changed(results: Path, capsys: Captured) -> None:
    path = only(results) / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"half": \n', *lines[5:]]))
    before = tree(results)
    for command in (("board", results), (*RUN, "--out", results)):
        assert call(*command) == 2
        assert f"{path}:5 is not JSON" in complained(capsys.readouterr().err)
    assert tree(results) == before


@pytest.mark.parametrize(("whole", "rest"), [(3 * CELLS - 1, 40), (CELLS + 2, 1), (0, 100), (2 * CELLS, 0)])
def test_a_run_cut_short_anywhere_resumes_without_loss_or_repeat(results: Path, whole: int, rest: int) -> None:
    gold = records(results)
    path = only(results) / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:whole], (lines[whole] if rest else b"")[:rest]]))
    assert call(*RUN, "--out", results) == 0
    assert path.read_bytes().splitlines(keepends=True)[:whole] == lines[:whole]
    assert records(results) == gold
    assert manifest(results)["status"] == "finished"


def start(out: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """The command in a process of its own, at work on its third sample."""
    command = [sys.executable, "-m", "harness.cli", *arguments, "--out", str(out), "--threads", "1"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 300
    while not any(path.read_bytes().count(b"\n") > CELLS for path in out.glob("*/records.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_run_resumes(tmp_path: Path, how: signal.Signals) -> None:
    many = [*RUN, "--limit", str(MANY)]
    process = start(tmp_path, many)
    process.send_signal(how)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in err
    assert manifest(tmp_path)["status"] == ("interrupted" if how == signal.SIGINT else "started")
    path = only(tmp_path) / "records.jsonl"
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert CELLS <= whole.count(b"\n") < MANY * CELLS
    if how == signal.SIGINT:
        told = [line for line in err.splitlines() if line.startswith("harness: ")]
        assert before == whole and told[-1].startswith("harness: interrupted")
    assert call(*many, "--out", tmp_path) == 0
    assert path.read_bytes().startswith(whole)
    assert len({key(record) for record in records(tmp_path)}) == len(records(tmp_path)) == MANY * CELLS
    assert manifest(tmp_path)["status"] == "finished"


def test_failed_cells_end_with_1_and_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    real = Engine.run_group

    def run(self: Engine, *arguments: Any) -> list[list[Outcome]]:
        (outcomes,) = real(self, *arguments)
        outcomes[1].fail("a test said so")
        return [outcomes]

    monkeypatch.setattr(Engine, "run_group", run)
    assert call(*RUN, "--out", tmp_path) == 1
    assert f"3 of {3 * CELLS} cells failed" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(*RUN, "--out", tmp_path) == 0
    assert len(records(tmp_path)) == 3 * CELLS + 3
    assert call("board", tmp_path) == 0
