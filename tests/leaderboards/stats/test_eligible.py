"""Which tasks rank, by hand."""

import io
from collections.abc import Sequence

import pandas as pd

from harness.records.record import Record
from leaderboards.stats.eligible import eligible
from leaderboards.stats.grid import Grid
from leaderboards.tables.board import to_csv, to_markdown
from leaderboards.tables.verdicts import standing, verdicts
from tests.pretend import cell, only


def two(task: str, scores: Sequence[float], full: float | None = 0.9, **changes: object) -> list[Record]:
    """Two methods of which `a` has these scores and `b` is .2 below where it can be, and fullkv."""
    below = [max(0.0, score - 0.2) for score in scores]
    made = cell("a", "64", scores, task=task, nll=1.0, **changes) + cell(
        "b", "64", below, task=task, nll=2.0, **changes
    )
    return made + ([] if full is None else cell("fullkv", "full", [full] * len(scores), task=task, nll=0.5, **changes))


def of(records: list[Record], measure: str = "score") -> tuple[tuple[str, ...], dict[str, str], str]:
    found = eligible(Grid(records, seed=0, resamples=100), measure)
    return found.tasks, dict(found.left_out), found.why


GOOD = [0.5, 0.7] * 10


def test_a_task_that_the_full_cache_fails_ranks_nothing_by_score() -> None:
    records = two("good", GOOD) + two("low", GOOD, full=0.19)
    assert of(records) == (("good",), {"low": "the full cache has 19.0 points"}, "")
    assert of(records, "nll") == (("good", "low"), {}, "")
    table = only(records)
    assert standing(table)[0] == "left out of ranks: low (the full cache has 19.0 points)"
    assert [v.won for v in verdicts(table)] == [True]


def test_a_task_where_every_method_is_within_its_noise_ranks_nothing() -> None:
    """One 100 of twenty: a mean of 5 with a standard error of 5."""
    noise = [1.0] + [0.0] * 19
    assert of(two("good", GOOD) + two("noise", noise)) == (("good",), {"noise": "no method is above its own noise"}, "")
    assert of(two("five", [1.0] * 5 + [0.0] * 15))[0] == ("five",)


def test_what_the_full_cache_lacks_ranks_nothing() -> None:
    records = [r.model_copy(update={"nll": None}) if r.method == "fullkv" else r for r in two("good", GOOD)]
    assert of(records, "nll") == ((), {"good": "the full cache has none"}, "no task is left that could")
    assert standing(only(records))[0] == "ranks nothing by NLL: no task is left that could"


def test_without_fullkv_nothing_is_left_out_and_the_board_says_so() -> None:
    records = two("good", GOOD, full=None) + two("low", [0.05] * 20, full=None)
    assert of(records) == (("good", "low"), {}, "")
    assert "left out of ranks: nothing, which could not be checked without fullkv" in standing(only(records))


def test_a_task_with_few_contexts_or_none_named_stops_all_ranks_in_one_line() -> None:
    for task, changes, why in (
        ("few", {"meta": {"group": "one"}}, "few has 1 context, 20 are needed"),
        ("bare", {"meta": {"group": None}}, "bare does not name its contexts, which count as one, 20 are needed"),
    ):
        records = two("good", GOOD) + two(task, GOOD, **changes)
        assert of(records)[2] == of(records, "nll")[2] == why
        table = only(records)
        assert table.rows[["rank_low", "rank_nll_low"]].isna().all(axis=None)
        assert set(table.rows["mark"]) == {""} and set(table.rows.method) == {"a", "b", "fullkv"}
        assert standing(table) == [f"ranks nothing: {why}"]
        (verdict,) = verdicts(table)
        assert "".join(verdict.said).endswith(", of 2 methods; not ranked.") and not verdict.won
        page = to_markdown([table], title="b")
        assert page.count("ranks nothing") == 1 and "=" not in page.split("How to read")[0]
        assert ("unknown" in table.rows["flags"][0]) == (task == "bare")
        frame = pd.read_csv(io.StringIO(to_csv([table])))
        assert set(frame.rank_nothing_why) == set(frame.rank_nll_nothing_why) == {why}


def test_too_few_in_a_task_that_is_left_out_stops_nothing() -> None:
    records = two("good", GOOD) + two("low", GOOD[:4], full=0.1)
    assert of(records)[2] == "" and of(records, "nll")[2] == "low has 4 contexts, 20 are needed"
    assert standing(only(records))[0] == "ranks nothing by NLL: low has 4 contexts, 20 are needed"


def test_a_board_that_ranks_says_what_it_cannot_see() -> None:
    spread = [0.4, 0.6, 0.8, 0.9] * 5
    (*_, last) = standing(only(two("good", spread, full=1.0) + cell("c", "64", spread[::-1], task="good", nll=1.5)))
    assert last.startswith("differences under ") and last.endswith(" points cannot be seen here")  # no spread in NLL
