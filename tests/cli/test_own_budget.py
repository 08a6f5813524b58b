"""`harness run` with a method of its own budget: what is run, gone on with, told, packed and verified."""

from pathlib import Path

import pytest

from leaderboards.tables.sections import PAIRS
from tests.tiny_run import PLAIN, TASK, TINY, call, key, manifest, only, records

pytestmark = pytest.mark.usefixtures("_no_pictures")
GIVEN = "=gvote[p_nuc=0.5]"
RUN = ("run", *TINY, *PLAIN, *TASK, "--set", "gvote.p_nuc=0.5", "--methods", "fullkv,gvote,snapkv")


def test_a_run_goes_on_with_pairs_alone_and_everything_tells_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*RUN, "--out", tmp_path / "runs") == 0
    folder = only(tmp_path / "runs")
    whole = {key(record): record for record in records(tmp_path / "runs")}
    assert manifest(tmp_path / "runs")["spec"]["budgets"] == [GIVEN]
    assert {(record["method"], record["budget"]) for record in whole.values()} == {
        ("fullkv", "full"),
        ("gvote[p_nuc=0.5]", "own"),
        ("snapkv", GIVEN),
    }
    assert len({record["budget_tokens"] for record in whole.values() if record["budget"] == GIVEN}) > 1
    shown = capsys.readouterr().out
    assert PAIRS in shown and "gvote[p_nuc=0.5] at its own budget" in shown
    assert (folder / "board.pairs.csv").read_text().count("snapkv") == 1

    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(line for line in lines if GIVEN not in line))
    assert call("status", folder) == 0 and "6 of 9" in capsys.readouterr().out
    assert call(*RUN, "--out", tmp_path / "runs") == 0
    assert {key(record): record for record in records(tmp_path / "runs")} == whole

    capsys.readouterr()
    assert call("submit", folder, "--out", tmp_path / "pack.zip") == 0
    assert call("verify", tmp_path / "pack.zip", "--tokenizer", "tiny", "--rescore", "--rescore-seed", "3") == 0
    assert "refused" in capsys.readouterr().out


def test_budgets_are_added_and_a_name_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*RUN, "--budgets", "32", "--limit", "1", "--out", tmp_path) == 0
    assert manifest(tmp_path)["spec"]["budgets"] == ["32", GIVEN] and manifest(tmp_path)["cells"] == 4
    capsys.readouterr()
    assert call(*RUN, "--budgets", "=snapkv", "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert "harness: budget '=snapkv' is what a method of its own budget keeps" in err and err.count("\n") <= 2
