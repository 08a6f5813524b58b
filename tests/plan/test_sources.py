"""The hash of a method's code: it changes with that code, the plug-in's own files included, and with nothing else."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.engine.types import Cell
from harness.plan import sources as module
from harness.plan.sources import HARNESS, sources
from harness.plan.sweep import PlannedCell
from methods.registry import make_policy

FILES = {
    "plugged/__init__.py": "",
    "plugged/policy.py": "from methods.fullkv import FullKV\nfrom .shared import two\nclass Mine(FullKV): pass\n",
    "plugged/shared.py": "def two():\n    import beside\n    return beside\n",
    "plugged/apart.py": "",
    "beside.py": "import torch, json\n",
}


def cell(policy: object, name: str = "mine") -> PlannedCell:
    return PlannedCell(name, "full", Cell(policy, None))  # type: ignore[arg-type]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The hash of a plug-in's method, with some of its files changed."""

    def hashed(**changes: str) -> str:
        for name, text in FILES.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + changes.get(path.stem, ""))
        for name in ("plugged", "plugged.policy", "plugged.shared", "beside"):
            sys.modules.pop(name, None)
        module._file.cache_clear()
        module._read.cache_clear()
        from plugged.policy import Mine  # type: ignore[import-not-found]

        return sources([cell(Mine())])["mine"]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield hashed
    for name in ("plugged", "plugged.policy", "plugged.shared", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("change", "counts"), [("policy", True), ("shared", True), ("beside", True), ("__init__", False), ("apart", False)]
)
def test_a_plug_in_is_its_own_files_as_far_as_they_are_imported(
    plugin: Callable[..., str], change: str, counts: bool
) -> None:
    first = plugin()
    assert first == plugin() and (plugin(**{change: "# changed\n"}) != first) == counts


def test_methods_share_what_they_run_on_and_have_code_of_their_own() -> None:
    found = sources([cell(make_policy(name), name) for name in ("snapkv", "h2o", "fullkv")])
    assert list(found) == ["snapkv", "h2o", "fullkv", HARNESS] and len(set(found.values())) == 4
    assert found == sources([cell(make_policy(name), name) for name in ("snapkv", "h2o", "fullkv")])


def test_the_harness_is_what_a_run_executes() -> None:
    names: set[str] = set()
    read = module._read.__wrapped__

    def noted(name: str, path: Path) -> tuple[str, tuple[str, ...]]:
        names.add(name)
        return read(name, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_read", noted)
        module._of_harness.__wrapped__()
    assert {
        "harness.engine.decode",
        "harness.models.prompt",
        "tasks.niah",
        "methods.base",
        "harness.plan.sweep",
    } <= names
    assert not {name for name in names if name.startswith(("harness.cli", "harness.boards", "torch", "methods.snapkv"))}
