"""lm-eval's results as a stranger hands them in: imported as they stand, or refused in one line and nothing stored."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.lm_eval.import_results import import_results
from harness.records.run_folder import load_run
from tests.hostile import tried, tried_command
from tests.json_parts import HALF, damages

pytestmark = pytest.mark.hostile
STAMP = "2026-11-30T14-45-36.569293"
ODD: tuple[Any, ...] = (
    ...,
    None,
    True,
    -1,
    0.5,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    HALF,
    [],
    [[]],
    {},
    [None],
)
DEEP = "[" * 5000 + "]" * 5000


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prompt() -> dict[str, Any]:
    bytes_ = dict.fromkeys(("kv_bytes", "kv_bytes_end", "stored_bytes", "stored_bytes_end", "asked_bytes"), 640)
    said = {
        "prompt_sha256": digest("ids"),
        "compressed": True,
        "truncated": False,
        "over_budget": False,
        "notes": ["a"],
    }
    counts = {"compressed_tokens": 90, "budget_tokens": 64, "kept_slots": [128, 128], "full_bytes": 900}
    return {**said, **counts, **bytes_, "prefill_s": 0.1, "compress_s": 0.2}


def results() -> dict[str, Any]:
    """A results file, as our plugin and lm-eval 0.4.13 write it, less what nobody reads."""
    config = {
        "model": "kvpolicy",
        "kv_model": {"name": "tiny", "revision": "b81b", "dtype": "float32", "device": "cpu"},
        "kv_method": {"label": "snapkv", "name": "snapkv", "params": {"recent": 8, "pool": "max"}, "budgeted": True},
        "kv_budget": "64",
        "kv_memory": "physical",
        "kv_max_length": 4096,
        "kv_notes": [],
        "kv_prompts": {digest("one"): prompt(), digest("two"): prompt()},
        "limit": 2.0,
        "gen_kwargs": {},
        "random_seed": 0,
        "use_cache": None,
    }
    return {
        "config": config,
        "versions": {"made": 1.0},
        "n-shot": {"made": 0},
        "n-samples": {"made": {"original": 8, "effective": 2}},
        "higher_is_better": {"made": {"acc": True}},
        "task_hashes": {"made": digest("task")},
        "chat_template": None,
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.2.0",
        "date": 1796049935.05,
        "total_evaluation_time_seconds": "12.04",
    }


def lines() -> list[dict[str, Any]]:
    """A multiple choice and a generation."""
    same = {"filter": "none", "metrics": ["acc"], "acc": 1.0, "doc": {"max_length": 1024}, "target": "1"}
    same |= {"doc_hash": digest("doc"), "target_hash": digest("target")}
    asked = {f"gen_args_{i}": {"arg_0": "one", "arg_1": f" {i}"} for i in range(2)}
    choice = {"filtered_resps": [["-3.5", "False"], ["-1.5", "True"]], "arguments": asked, "prompt_hash": digest("one")}
    said = {"filtered_resps": ["said"], "arguments": {"gen_args_0": {"arg_0": "two", "arg_1": {"until": []}}}}
    return [{**same, **choice, "doc_id": 0}, {**same, **said, "prompt_hash": digest("two"), "doc_id": 1}]


def write(folder: Path, stored: Any, samples: Sequence[Any], task: str = "made") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"results_{STAMP}.json").write_text(json.dumps(stored))
    (folder / f"samples_{task}_{STAMP}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def imported(where: Path, root: Path, metric: str | None = None) -> None:
    """Import, and read back what was stored: it must be whole."""
    for folder, count in import_results(where, root=root, metric=metric, command=("harness",)):
        assert len(load_run(folder)[1]) == count


def test_what_is_sound_is_imported(tmp_path: Path) -> None:
    imported(write(tmp_path / "in", results(), lines()), tmp_path / "out")


def outcome(kind: str, where: Path, root: Path) -> None:
    line = tried(kind, lambda: imported(where, root), may_pass=True)
    assert not line or not root.exists()


@pytest.mark.parametrize("part", list(results()))
def test_a_part_of_the_results_is_what_it_must_be(part: str, tmp_path: Path) -> None:
    for at, (_, damaged) in enumerate(damages(results(), ODD, under=part)):
        outcome("a part of lm-eval's results", write(tmp_path / "in", damaged, lines()), tmp_path / f"out{at}")


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_sample_is_what_it_must_be(number: int, tmp_path: Path) -> None:
    good = lines()
    for at, (_, damaged) in enumerate(damages(good[number], ODD)):
        samples = [*good[:number], damaged, *good[number + 1 :]]
        outcome("a part of lm-eval's samples", write(tmp_path / "in", results(), samples), tmp_path / f"out{at}")


@pytest.mark.parametrize(
    ("task", "samples"),
    [
        ("other", lines()),
        ("made", []),
        ("made", lines()[:1]),
        ("made", [*lines(), lines()[0]]),
        ("made", [{**line, "acc": 1e307} for line in lines()]),
        ("made", [{**lines()[0], "filtered_resps": [["nan", "False"], ["-1", "True"]]}, lines()[1]]),
        ("made", [{**lines()[0], "filtered_resps": [["-1e999", "False"], ["-1", "True"]]}, lines()[1]]),
        ("made", [{**lines()[0], "filtered_resps": ["x"] * 20_000}, lines()[1]]),
        ("\x1b[31m", lines()),
        ("made", [{**line, "prompt_hash": digest("another run's")} for line in lines()]),
    ],
)
def test_samples_that_are_not_those_of_the_results(task: str, samples: list[Any], tmp_path: Path) -> None:
    where = write(tmp_path / "in", results(), samples, task=task)
    tried("samples of other results", lambda: imported(where, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_metrics_that_nobody_measured(tmp_path: Path) -> None:
    where = write(tmp_path / "in", results(), lines())
    for metric in ("f1", " ", "\x1b[31m", "x" * 5000, "acc,none", "score", HALF):
        tried("a metric", partial(imported, where, tmp_path / "out", metric=metric))


BLOBS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"NaN",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    DEEP.encode(),
    b'{"config": ' * 5000,
    b"\0",
    b"9" * 9000,
)


@pytest.mark.parametrize("blob", BLOBS, ids=range(len(BLOBS)))
@pytest.mark.parametrize("name", ["results_", "samples_made_"])
def test_bytes_that_are_no_results(name: str, blob: bytes, tmp_path: Path) -> None:
    where = write(tmp_path / "in", results(), lines())
    next(where.glob(f"{name}*")).write_bytes(blob)
    tried("bytes as lm-eval's results", lambda: imported(where, tmp_path / "out"))


@given(st.binary(max_size=40), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, blob: bytes, head: bool) -> None:
    where = write(tmp_path / "in", results(), lines())
    next(where.glob("results_*" if head else "samples_*")).write_bytes(blob)
    tried("bytes as lm-eval's results", lambda: imported(where, tmp_path / "out"))


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("made", [os.mkfifo, Path.mkdir, _huge, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["results_", "samples_made_"])
def test_what_is_no_plain_file(name: str, made: Callable[[Path], object], tmp_path: Path) -> None:
    where = write(tmp_path / "in", results(), lines())
    path = next(where.glob(f"{name}*"))
    path.unlink()
    made(path)
    tried("no plain file of results", lambda: imported(where, tmp_path / "out"))


@pytest.mark.parametrize("name", ["none", "a" * 300, "a/" * 3000, "\x1b[31m", "~nobody/x"])
def test_folders_without_results(name: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    tried_command("no folder of results", "lm-eval-import", tmp_path / name, "--out", tmp_path / "out")
    assert time.monotonic() - begun < 20 and not (tmp_path / "out").exists()
