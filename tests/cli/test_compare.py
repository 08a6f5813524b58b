"""`harness compare` on runs of the tiny model, and what it refuses."""

import json
from pathlib import Path

import pytest

from tests.tiny_run import FAST, call, only

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same sweep in two dtypes. Only read."""
    root = tmp_path_factory.mktemp("compare")
    for dtype in ("float32", "bfloat16"):
        assert call("run", *FAST, "--dtype", dtype, "--methods", "fullkv,snapkv@kvcf", "--out", root / dtype) == 0
    return root / "float32", root / "bfloat16"


def test_two_runs_are_set_side_by_side(runs: tuple[Path, Path], tmp_path: Path, capsys: Captured) -> None:
    rows, everything = tmp_path / "rows.csv", tmp_path / "all.json"
    assert call("compare", *runs, "--csv", rows, "--json", everything) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Two runs\n1: run {only(runs[0]).name}, finished")
    for part in ("dtype: float32 | bfloat16", "the same: model tiny, ", "snapkv@kvcf at 0.25", "How to read"):
        assert part in said
    assert "of 9 outputs differ" in said
    assert len(rows.read_text().splitlines()) == 1 + 3
    assert {row["n"] for row in json.loads(everything.read_text())["rows"]} == {3}


def test_a_run_is_equal_to_itself_and_to_its_archive(runs: tuple[Path, Path], tmp_path: Path, capsys: Captured) -> None:
    assert call("submit", runs[0], "--out", tmp_path / "pack.zip") == 0
    capsys.readouterr()
    assert call("compare", runs[0], tmp_path / "pack.zip") == 0
    said = capsys.readouterr().out
    assert "\n0 of 9 outputs differ; 0 of their" in said and "\n0 of 6 differences are sure" in said


def test_what_cannot_be_compared_is_one_line(runs: tuple[Path, Path], tmp_path: Path, capsys: Captured) -> None:
    words = ("run", *FAST, "--methods", "streamingllm@paper", "--out", tmp_path / "other")
    assert call(*words) == 0
    capsys.readouterr()
    bad: list[tuple[list[Path | str], str]] = [
        ([tmp_path / "absent", runs[0]], "there is no such folder or archive; published boards: "),
        ([tmp_path, runs[0]], "no run in"),
        ([runs[0], "second-model"], "second-model holds 2 runs (2af26a2aae64, a49bfa8148c3)"),
        ([runs[0], tmp_path / "other"], "have no method at a budget on a task in common"),
        ([runs[0]], "RUN"),
    ]
    for places, says in bad:
        assert call("compare", *places) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("harness: ") and says in line
