"""What a command measured is kept with where it was made, a part at a time."""

import json
from pathlib import Path

import pytest

from tests import measured
from tests.measured import keep


def test_a_part_that_is_measured_again_replaces_that_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "measured/x.json"
    monkeypatch.setattr(measured, "git_commit", lambda: "first")
    keep(path, "make x", {"a": {"median": 1}, "b": {"median": 2}})
    keep(path, "make x", {"c": {"median": 3}})
    monkeypatch.setattr(measured, "git_commit", lambda: "second")
    keep(path, "make x", {"b": {"median": 4}})
    kept = json.loads(path.read_text())
    assert {name: result["median"] for name, result in kept["results"].items()} == {"a": 1, "b": 4, "c": 3}
    commits = {name: kept["runs"][result["run"]]["commit"] for name, result in kept["results"].items()}
    assert commits == {"a": "first", "b": "second", "c": "first"}
    assert len(kept["runs"]) == 2
    assert {"processor", "cores"} <= set(kept["runs"][kept["results"]["b"]["run"]]["machine"])


def test_a_run_of_which_nothing_is_left_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit in ("first", "second"):
        monkeypatch.setattr(measured, "git_commit", lambda commit=commit: commit)
        keep(tmp_path / "x.json", "make x", {"a": {"median": 1}})
    assert [run["commit"] for run in json.loads((tmp_path / "x.json").read_text())["runs"].values()] == ["second"]
