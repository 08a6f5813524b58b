"""Entry points of other distributions that do what they should not: each is named in one warning, the rest works."""

import logging
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from harness.plan.methods import plan_method
from harness.plan.names import check_sweep
from harness.records.spec import Sweep
from methods import registry
from methods.registry import METHODS, PREFIXES, known_methods, load_methods, make_policy
from tests.hostile import TALLY
from tests.tiny_run import call

pytestmark = pytest.mark.hostile

METHOD = """
from dataclasses import dataclass
from methods.base import EvictionPolicy
from methods.registry import Prefix, method, register_prefix

def made(name, **options):
    @method(name, paper="none", **options)
    @dataclass(frozen=True)
    class Own(EvictionPolicy):
        def score(self, view):
            return -view.kv.keys.float().square().sum(dim=-1)
"""
BROKEN = {
    "raises": "1 / 0",
    "says_much": "raise RuntimeError('\\x1b[31m' + 'x' * 100_000 + '\\n')",
    "ends": "raise SystemExit(0)",
    "ends_in_words": "import sys; sys.exit('good bye')",
    "base": "class Own(BaseException): pass\nraise Own()",
    "generator": "raise GeneratorExit",
    "not_python": "def :",
    "not_utf8": "x = '\udcff'",
    "deep": "x = " + "(" * 300,
    "recursion": "def f(): f()\nf()",
    "memory": "raise MemoryError",
    "wrong_str": "class Odd(Exception):\n    def __str__(self): return 5\nraise Odd",
    "imports": "import no_such_module_here",
    "taken": METHOD + "made('mine')\nmade('snapkv')",
    "taken_as_builtin": METHOD.replace("class Own", "class SnapKV") + "made('snapkv')",
    "nameless": METHOD + "made('')",
    "odd_name": METHOD + "made('a@b')",
    "odd_presets": METHOD + "made('odd', presets=5)",
    "no_dataclass": "from methods.registry import method\n@method('plain', paper='')\nclass Plain: pass",
    "a_prefix": METHOD + "register_prefix('kvpress', Prefix(lambda *a: None, str))",
}
POINTS = {
    "missing": "no_such_module_here",
    "no_such_name": "json:nothing",
    "empty": "",
    "spaces": "a b c",
    "dots": "..",
    "colon": ":x",
}


def load(monkeypatch: pytest.MonkeyPatch, points: dict[str, str]) -> None:
    """Have these entry points be those that are installed."""
    found = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in points.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    registry._plugins.cache_clear()
    registry._load_plugin.cache_clear()


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    load_methods()
    before, prefixes = dict(METHODS), dict(PREFIXES)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sound_plugin.py").write_text(METHOD + "made('sound')\n")
    for name, text in BROKEN.items():
        (tmp_path / f"broken_{name}.py").write_bytes(text.encode(errors="surrogateescape"))
    yield
    for kept, now in ((before, METHODS), (prefixes, PREFIXES)):
        now.clear()  # type: ignore[attr-defined]
        now.update(kept)  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("broken_") or name == "sound_plugin"]:
        del sys.modules[name]
    monkeypatch.undo()
    registry._plugins.cache_clear()
    registry._load_plugin.cache_clear()


@pytest.mark.parametrize("name", [*BROKEN, *POINTS])
def test_a_broken_plugin_is_named_once_and_the_rest_works(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(monkeypatch, {name: POINTS.get(name, f"broken_{name}"), "sound": "sound_plugin"})
    known = set(METHODS)
    with caplog.at_level(logging.WARNING):
        assert set(known_methods()) == set(load_methods()) == known | {"sound"}
    (warned,) = [record.getMessage() for record in caplog.records]
    assert name in warned and "left out" in warned and len(warned) < 600 and warned.isprintable()
    assert make_policy("sound").budgeted and make_policy("snapkv").recent == 32  # type: ignore[attr-defined]
    assert type(make_policy("snapkv")).__module__ == "methods.snapkv" and "kvpress" in PREFIXES
    TALLY["plug-ins", "refused"] += 1


def test_commands_work_beside_a_broken_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    load(monkeypatch, {"raises": "broken_raises", "ends": "broken_ends", "sound": "sound_plugin"})
    assert call("list", "methods") == 0 and "sound " in capsys.readouterr().out
    assert call("list", "methods", "--markdown") == 0 and "snapkv" in capsys.readouterr().out
    check_sweep(Sweep(methods=("sound", "snapkv"), tasks=("niah/passkey",)))
    assert plan_method("sound").spec.name == "sound"
    assert call("run", "--methods", "nope", "--tasks", "niah") == 2
    assert "unknown method 'nope'" in capsys.readouterr().err
    assert call("new-method", "sound", "--to", tmp_path) == 2


def test_metadata_that_cannot_be_read_is_told_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(group: str) -> list[EntryPoint]:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte")

    load(monkeypatch, {})
    monkeypatch.setattr(registry, "entry_points", unreadable)
    assert "snapkv" in load_methods() and "no plug-in can be looked for" in caplog.text
