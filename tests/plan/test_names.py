"""What is known of names before torch is imported: labels, the catalogue, models, and what a command imports."""

import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.models.source import check_device, check_model
from harness.plan.names import check_sweep
from harness.records.spec import Sweep
from methods.budget import PolicyError
from methods.catalogue import Entry, catalogue
from methods.label import MethodLabel
from methods.registry import known_methods, load_methods

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "pandas", "scipy", "ray", "nltk")


def test_the_catalogue_says_what_the_registry_says() -> None:
    assert known_methods().keys() == load_methods().keys()
    read = catalogue()
    built_in = {name: m for name, m in load_methods().items() if m.policy.__module__.startswith("methods.")}
    assert read.whole and read.entries.keys() == built_in.keys()
    for name, entry in read.entries.items():
        method = built_in[name]
        assert (entry.paper, entry.summary, entry.parameters) == (method.paper, method.summary, method.parameters)
        assert entry.presets == method.presets


FILE = '@method("odd", {given})\n@dataclass\nclass Odd({base}):\n    """Odd."""\n    recent: int = 1\n'


@pytest.mark.parametrize(
    ("given", "base", "clear"),
    [
        ('paper="x", presets={"a": {"recent": 2}}', "KVPolicy", True),
        ('paper="x", presets=dict(a={})', "KVPolicy", False),
        ("paper=PAPER", "KVPolicy", False),
        ('paper="x"', "Elsewhere", False),  # which may bring parameters
    ],
)
def test_a_file_that_computes_is_left_to_the_registry(tmp_path: Path, given: str, base: str, clear: bool) -> None:
    (tmp_path / "odd.py").write_text(FILE.format(given=given, base=base))
    (tmp_path / "plain.py").write_text("x = 1\n")
    read = catalogue(tmp_path)
    assert read.whole == clear
    odd = Entry("odd", "x", "Odd.", {"a": {"recent": 2}}, ("recent",), False)
    assert read.entries == ({"odd": odd} if clear else {})


@pytest.mark.parametrize(
    ("text", "name", "preset", "params", "asked"),
    [
        ("snapkv", "snapkv", "", (), "snapkv"),
        ("snapkv@kvcf", "snapkv", "kvcf", (), "snapkv@kvcf"),
        ("h2o[mean=True,recent=4]", "h2o", "", (("mean", "True"), ("recent", "4")), "h2o"),
        ("compilerkv@window[tables=a@b,c:d]", "compilerkv", "window", (("tables", "a@b,c:d"),), "compilerkv@window"),
        ("kvpress:A([B(), C(x=1)])", "kvpress:A", "", (), "kvpress:A([B(), C(x=1)])"),
        ("kvpress:A", "kvpress:A", "", (), "kvpress:A"),
    ],
)
def test_a_label_is_taken_apart_and_put_together(
    text: str, name: str, preset: str, params: tuple[tuple[str, str], ...], asked: str
) -> None:
    label = MethodLabel.parse(text)
    assert (label.name, label.preset, label.params, label.asked) == (name, preset, params, asked)
    assert str(label) == text and (label.prefix is None) == (not text.startswith("kvpress"))
    assert str(label.changed({"b": 2, "a": 0.5})) == f"{asked}[a=0.5,b=2]"
    assert label.own({f"{name}.x": 1, f"{name}2.x": 2, name: 3}) == {"x": 1}


@pytest.mark.parametrize("text", ["snapkv[", "snapkv[]", "snapkv[kernel]", "snapkv[kernel=5", "snapkv[5,kernel=5]"])
def test_brackets_that_hold_no_parameter_are_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="cannot be read; write name, name@preset"):
        MethodLabel.parse(text)


def test_models_that_cannot_be_read_are_refused_by_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = tmp_path / "model", tmp_path / "model" / "config.json"
    folder.mkdir()
    bad, good = tmp_path / "bad.gguf", tmp_path / "good.gguf"
    bad.write_bytes(b"GGM")
    head = b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 8, 0, 0)  # of a tensor of 8 float32
    good.write_bytes(head + bytes(64 - len(head)) + bytes(32))
    refused = {
        str(folder): "no config.json in",
        str(bad): "does not begin with GGUF",
        str(tmp_path / "absent.gguf"): "unknown model",
        "tinny": "did you mean 'tiny'",
        "org/never-fetched": "not in the hub's cache",
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, says in refused.items():
        with pytest.raises(HarnessError, match=says):
            check_model(name)
    for text, says in (("[]", "is no JSON object"), ("{", "is not JSON")):
        config.write_text(text)
        with pytest.raises(HarnessError, match=f"config.json {says}"):
            check_model(str(folder))
    config.write_text("{}")
    with pytest.raises(HarnessError, match="no weights and no tokenizer; add them, or write shape: before it"):
        check_model(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    for name in (str(folder), str(good), "tiny", "smollm2-135m"):
        check_model(name)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cpu:x", ""])
def test_a_word_that_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(HarnessError, match="unknown device"):
        check_device(device)
    for known in ("auto", "auto-map", "cpu", "cuda", "cuda:1", "mps"):
        check_device(known)


def test_data_that_is_not_here_is_refused_before_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVH_CACHE", str(tmp_path / "cache"))
    sweep = Sweep(methods=("snapkv",), tasks=("niah", "stdlib", "ruler/vt"), model="tiny")
    assert {task.name.partition("/")[0] for task in check_sweep(sweep)} == {"niah", "stdlib", "ruler"}  # fetched, made
    multiquery = (f"multiquery/{name}" for name in ("qa_1", "qa_2", "longbench"))
    for task in ("longbench/lcc", "ruler/qa_2", "longbench/kvpress", *multiquery):
        asked = sweep.model_copy(update={"tasks": (task,), "query": "agnostic"})
        with pytest.raises(HarnessError, match=f"task {task}.* is not here; run `harness data fetch"):
            check_sweep(asked)
        with pytest.raises(HarnessError, match="put it there, or run `harness data fetch"):
            check_sweep(asked.model_copy(update={"data_dir": str(tmp_path)}))


def imported(arguments: Sequence[str]) -> tuple[int, str, set[str]]:
    """Exit code, stderr and the heavy packages that a command has imported."""
    code = (
        "import sys\nfrom harness.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        f"print('IMPORTED', code, *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    number, *heavy = done.stdout.splitlines()[-1].removeprefix("IMPORTED ").split()
    return int(number), done.stderr, set(heavy)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], *(["list", w] for w in ("methods", "tasks"))])
def test_looking_things_up_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported(arguments) == (0, "", set())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "nosuch"], "unknown method 'nosuch'"),
        (["--methods", "snapkv@nosuch"], "unknown preset 'nosuch'"),
        (["--tasks", "nosuch"], "unknown task 'nosuch'"),
        (["--budgets", "many"], "budget 'many' is not a number"),
        (["--model", "nosuch"], "unknown model 'nosuch'"),
        (["--model", "shape:llama-3-8b"], "model 'shape:llama-3-8b' has random weights, so no score; use bench"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--set", "snapkv.nosuch=1"], "no parameter 'nosuch'"),
    ],
)
def test_names_are_refused_before_anything_heavy_is_imported(arguments: list[str], says: str) -> None:
    code, told, heavy = imported(["run", "--methods", "snapkv", "--tasks", "ruler", *arguments])
    assert (code, told.count("\n"), heavy) == (2, 1, set()) and says in told


@pytest.mark.parametrize(("own", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_a_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str | None, then: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    code = "import harness, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [then, "False"]
