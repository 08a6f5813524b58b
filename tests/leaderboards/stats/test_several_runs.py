"""Which record stands for a cell that several runs hold, and that a disagreement is told."""

from typing import Any

import pytest

from harness.records.record import RunManifest
from leaderboards.stats.comparable import one_per_key
from leaderboards.tables.board import notes_of, to_markdown
from tests.pretend import cell, manifest, only, record, row


def run(name: str, started: str, status: str = "finished") -> RunManifest:
    return manifest().model_copy(update={"run_id": name, "started": started, "status": status})


OLD, NEW = "2026-01-01T10:00:00+00:00", "2026-01-01T12:30:00+02:00"  # half an hour later


@pytest.mark.parametrize("names", [("aaa", "bbb"), ("bbb", "aaa")])
def test_the_finished_run_that_was_started_last_is_shown_whatever_its_hash(names: tuple[str, str]) -> None:
    old, new = names
    records = cell("snapkv", "64", [0.25] * 3, run_id=old) + cell("snapkv", "64", [0.75] * 3, run_id=new)
    table = only(records, manifests=[run(old, OLD), run(new, NEW)])
    assert row(table, "snapkv", "64")["score_points_mean"] == 75
    table = only(records, manifests=[run(old, OLD), run(new, NEW, "interrupted")])
    assert row(table, "snapkv", "64")["score_points_mean"] == 25
    table = only(records, manifests=[run(old, OLD), run(new, "yesterday")])  # no time: older than all
    assert row(table, "snapkv", "64")["score_points_mean"] == 25


def test_a_disagreement_is_on_the_board() -> None:
    records = cell("snapkv", "64", [0.25] * 3, run_id="a") + cell("snapkv", "64", [0.25, 0.25, 0.5], run_id="b")
    page = to_markdown([only(records, manifests=[run("a", OLD), run("b", NEW)])], title="b")
    assert "3, of each that of the finished run that was started last; 1 differ between runs (see Notes)" in page
    assert "run b, which is used, and run a disagree in score, NLL or bytes in a cell, first in snapkv at 64" in page


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"nll": 1.0001}, False), ({"nll": 1.01}, True), ({"nll": None}, True), ({"kv_bytes": 101}, True)],
)
def test_what_a_reader_could_not_see_is_no_disagreement(changes: dict[str, Any], told: bool) -> None:
    one = record("snapkv", "64", "0", 0.5, nll=1.0)
    other = record("snapkv", "64", "0", 0.5, **{"nll": 1.0, "run_id": "run2", **changes})
    assert bool(one_per_key([one, other]).differing) is told


def test_a_failure_that_another_run_mended_is_no_disagreement() -> None:
    chosen = one_per_key([record("snapkv", "64", "0", None), record("snapkv", "64", "0", 0.5, run_id="run2")])
    assert chosen.records[0].status == "ok"
    assert (chosen.several, chosen.differing) == (1, ())


def test_copies_of_one_run_that_differ_are_told() -> None:
    table = only([record("snapkv", "64", "0", 0.5), record("snapkv", "64", "0", 0.75)])
    assert notes_of(table)[-1].startswith("two copies of run run1 disagree")
