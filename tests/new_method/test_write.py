"""What `harness new-method` writes passes at once; bad names write nothing; a broken clause is named."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.contract import CLAUSES, BrokenContract, check_method
from harness.errors import HarnessError
from harness.new_method.kinds import KINDS
from harness.new_method.write import new_method
from methods.base import KV, LayerPolicy, LayerView
from methods.catalogue import catalogue
from methods.registry import METHODS, Method

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `new_method` takes for a checkout."""
    for folder in ("methods", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "methods" / "registry.py").touch()
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- Before.\n\n## 0.1\n\n- Older.\n")
    return tmp_path


def test_a_checkout_gets_a_method_its_test_and_a_line(checkout: Path) -> None:
    written = new_method("made_up", where=checkout)
    names = ["methods/made_up.py", "tests/methods/test_made_up.py", "CHANGELOG.md"]
    assert written == [checkout / name for name in names]
    change = "## Unreleased\n\n- Method `made_up`: tokens whose keys have the smallest norm.\n- Before.\n\n## 0.1\n"
    assert change in written[2].read_text()
    texts = [path.read_text() for path in written]
    with pytest.raises(HarnessError, match=r"made_up.py is there already and stays"):
        new_method("made_up", where=checkout)
    assert [path.read_text() for path in written] == texts


DECORATORS = "@(method|dataclass|property|classmethod|pytest)"


def installed(where: Path, kind: str) -> Path:
    """The package of a method of that kind, as if it were installed."""
    name, root = f"two_{kind}", where / f"kv-two-{kind}"
    names = ("pyproject.toml", "README.md", f"kv_{name}.py", f"tests/test_{name}.py")
    assert new_method(name, where=where, kind=kind) == [root / file for file in names]
    assert not [file for file in names[2:] if "@" in re.sub(DECORATORS, "", (root / file).read_text())]
    info = root / f"kv_{name}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kv-two-{kind}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[kv_policy_harness.methods]\n{name} = kv_{name}\n")
    return root


def test_packages_of_all_kinds_pass_their_tests_and_the_linters(tmp_path: Path) -> None:
    roots = [installed(tmp_path, kind) for kind in KINDS]
    paths = os.pathsep.join(map(str, [*roots, ROOT]))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # methods are found by their entry points
    tests = " ".join(str(root / "tests") for root in roots)
    for command in (f"pytest -q {tests}", "ruff check .", "ruff format --check ."):
        called = [sys.executable, "-m", *command.split()]
        done = subprocess.run(called, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkout_can_tell_of_a_method_without_importing_it(checkout: Path, kind: str) -> None:
    new_method("made_up", where=checkout, kind=kind)
    found = catalogue(checkout / "methods")
    assert found.whole and found.entries["made_up"].summary.endswith(".")
    assert KINDS[kind].what in (checkout / "CHANGELOG.md").read_text()


def test_an_unknown_kind_writes_nothing(checkout: Path) -> None:
    before = sorted(checkout.rglob("*"))
    with pytest.raises(HarnessError, match=r"'magic' is no kind of a method; give one of score, layers, pooled"):
        new_method("made_up", where=checkout, kind="magic")
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        *((name, "no name for a method") for name in ("", "2fast", "Key", "lambda", "../out")),
        ("key-norm", "such as key_norm"),
        ("x" * 41, "at most 40 letters"),
        ("snapkv", "is a method already"),
        ("registry", r"is a module of methods/ \(registry.py\) already"),
    ],
)
def test_bad_names_write_nothing(checkout: Path, name: str, complaint: str) -> None:
    before = sorted(checkout.rglob("*"))
    with pytest.raises(HarnessError, match=complaint):
        new_method(name, where=checkout)
    assert sorted(checkout.rglob("*")) == before


@dataclass
class Broken(LayerPolicy):
    """Returns the prompt's own slots, too many of them, in disorder!"""

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        kv = view.kv
        if view.index == 1:
            return KV(kv.keys, kv.values.flip(2), kv.positions)
        if view.index == 2:
            return KV(kv.keys + 1, kv.values, kv.positions.flip(2))
        return kv.take(torch.randint(0, view.tokens, kv.positions.shape))


def test_a_broken_clause_is_named_with_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "broken", Method("broken", Broken, "none", {}))
    found = {}
    for name in CLAUSES:
        try:
            check_method("broken", without=set(CLAUSES) - {name})
        except BrokenContract as error:
            found[error.clause] = str(error)
    assert set(found) >= {
        *("the_budget_is_kept", "positions_ascend", "values_are_the_prompts", "keys_are_the_prompts"),
        *("compression_is_repeatable", "policies_are_frozen_values", "a_method_says_what_it_is"),
    }
    start = "method broken breaks the contract, clause the_budget_is_kept: 16 slots, 4096 bytes where 8 slots of 260"
    assert found["the_budget_is_kept"].startswith(start)
    with pytest.raises(HarnessError, match="unknown clause 'nothing'"):
        check_method("snapkv", without=["nothing"])
