"""TOML files that people write: whatever is in one, a line says what is wrong, and nothing is run."""

import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.boards.sources import board_options, read_config
from harness.cli.nightly import nightly_options
from harness.errors import HarnessError, checked
from harness.records.spec import Sweep
from leaderboards.nights.compare import NightlyOptions
from tests.hostile import tried, tried_command

pytestmark = pytest.mark.hostile

GOOD: dict[str, Any] = {"methods": ["knorm"], "tasks": ["niah"]}
FILES = {
    "not utf-8": b"model = '\xff\xfe'",
    "utf-16": "model = 'tiny'".encode("utf-16"),
    "a NUL": b"model = 'ti\0ny'",
    "not TOML": b"model: tiny",
    "a key twice": b"limit = 1\nlimit = 2",
    "nested lists": b"limit = " + b"[" * 5000 + b"]" * 5000,
    "nested tables": b"set" + b".a" * 3000 + b" = 1",
    "nested, less": b"lengths = " + b"[" * 90 + b"]" * 90,
    "a huge number": b"limit = " + b"9" * 6000,
    "a date": b"limit = 2026-01-01",
    "infinite": b"limit = inf",
    "no number": b"[set]\n'knorm.recent' = nan",
    "huge": b"#" * (2 << 20),
    "a NUL in a text": b'model = "ti\\u0000ny"',
    "control codes": b'model = "\\u001b[31mtiny"',
    "a surrogate": b'model = "\\ud800"',
    "a long text": b'model = "' + b"m" * 200_000 + b'"',
    "a long key": b"k" * 200_000 + b" = 1",
    "a key of control codes": b'"\\u001b[31m" = 1',
    "no table": b"board = 1",
    "a list for a table": b"board = [1]",
    "an unknown key of a table": b"[board]\nnope = 1",
    "empty lists": b"methods = []",
    "empty": b"",
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("command", ["run --config", "nightly"])
def test_a_toml_file_that_means_nothing_is_refused(what: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(FILES[what])
    line = tried_command("TOML files", *command.split(), tmp_path / "x.toml", "--out", tmp_path / "out")
    assert len(line) < 700


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    monkeypatch.chdir(tmp_path)
    places = [
        "pipe.toml",
        "folder.toml",
        "loop.toml",
        "missing.toml",
        "/dev/zero",
        "/dev/null/x",
        "a\0b",
        "x" * 5000,
        "",
    ]
    for place in places:
        tried("TOML paths", lambda place=place: read_config(place))


def test_a_home_and_a_variable_are_filled_in_wherever_a_path_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.toml").write_text("limit = 3")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    assert read_config("~/x.toml") == read_config("$HERE/x.toml") == read_config("${HERE}/x.toml") == {"limit": 3}
    sweep = checked(Sweep, {**GOOD, "data_dir": "~/data", "graded": "$HERE/g.json", "model": "~/m"})
    assert (sweep.data_dir, sweep.graded, sweep.model) == (f"{tmp_path}/data", f"{tmp_path}/g.json", f"{tmp_path}/m")
    assert nightly_options({"version": 1, "baseline": "~/nights"}, "x").baseline == f"{tmp_path}/nights"


SCALARS = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.none(), st.binary(max_size=3), st.dates()
)
VALUES = st.recursive(
    SCALARS, lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=3), own, max_size=3)
)
COUNTS = {"limit", "seed", "max_tokens", "max_new_tokens", "nll_tokens", "observe"}


@given(st.sampled_from(sorted(Sweep.model_fields)), VALUES)
def test_an_option_of_any_value_is_taken_as_it_stands_or_refused(name: str, value: Any) -> None:
    made: list[Sweep] = []
    tried("option values", lambda: made.append(checked(Sweep, {**GOOD, name: value})), may_pass=True)
    if made and name in COUNTS and value is not None:
        assert type(value) is int and getattr(made[0], name) == value
    if made and isinstance(value, bool):
        assert getattr(made[0], name) is value


@given(
    st.sampled_from([*sorted(COUNTS), "lengths"]),
    st.one_of(st.booleans(), st.floats(), st.integers(max_value=-1), st.integers(10**10, 10**40)),
)
def test_no_count_is_a_boolean_a_fraction_or_out_of_range(name: str, value: Any) -> None:
    if name == "seed" and type(value) is int and 0 <= value < 2**63:
        return
    given = [value] if name == "lengths" else value
    tried("option ranges", lambda: checked(Sweep, {**GOOD, name: given}))


@given(st.text(string.ascii_letters + "_-. ", max_size=12), VALUES)
def test_an_unknown_option_is_refused(name: str, value: Any) -> None:
    if name not in Sweep.model_fields:
        tried("unknown options", lambda: checked(Sweep, {**GOOD, name: value}))


@given(st.sampled_from(sorted(NightlyOptions.model_fields)), VALUES)
def test_a_nightly_table_is_taken_as_it_stands_or_refused(name: str, value: Any) -> None:
    good = {"version": 1, "baseline": "nights"}
    made: list[NightlyOptions] = []
    tried("nightly tables", lambda: made.append(nightly_options({**good, name: value}, "x.toml")), may_pass=True)
    assert not made or value is None or getattr(made[0], name) == value


@given(VALUES)
def test_a_board_table_is_refused_unless_it_is_one(value: Any) -> None:
    tried("board tables", lambda: board_options(value), may_pass=value == {})


def test_a_list_that_is_given_is_not_empty() -> None:
    for name in ("methods", "tasks", "budgets", "lengths"):
        with pytest.raises(HarnessError, match=name):
            checked(Sweep, {**GOOD, name: []})
