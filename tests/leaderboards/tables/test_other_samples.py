"""Rows over other samples than those beside them, and rows of a resumed run: marked everywhere, and in no verdict."""

import re

import pytest

from leaderboards.pages.page import to_html
from leaderboards.stats.aggregate import Table, aggregate
from leaderboards.tables.board import main_frame, notes_of, to_csv, to_markdown, to_terminal
from leaderboards.tables.legend import how_to_read
from leaderboards.tables.sections import LACKS, sections
from leaderboards.tables.verdicts import verdicts
from tests.pretend import cell, measured, only, record, row

SCORES = [float(i % 2) for i in range(24)]
HALF = [1.0 if i % 2 else None for i in range(24)]
"""Only the samples that it gets right."""


def lacking() -> Table:
    """Knorm lacks what others fail."""
    full = cell("fullkv", "full", SCORES, nll=1.0)
    return only([*full, *cell("a", "64", SCORES, nll=1.0), *cell("b", "64", SCORES), *cell("knorm", "64", HALF)])


def test_a_row_that_lacks_samples_is_out_of_the_verdict_and_says_why() -> None:
    table = lacking()
    (verdict,) = verdicts(table)
    said = "".join(verdict.said)
    assert said.startswith("Not told apart: a 50.0, b 50.0.")
    assert said.endswith("Not compared, for it lacks samples: knorm (12 of 24).")
    assert "100" not in said
    assert row(table, "knorm", "64")["mark"] == ""
    assert [row(table, name, "64")["mark"] for name in "ab"] == ["=", "="]


def test_it_is_marked_in_every_other_table() -> None:
    frames = sections(lacking())
    assert len(frames) > 3
    for title in (
        "Ranks and best others",
        "Tail failures",
        "Smallest cache that keeps 95 % of fullkv, in % of its bytes",
    ):
        marked = [method for method in frames[title]["method"] if method.endswith(LACKS)]
        assert marked == [f"knorm{LACKS}"], title
    assert frames["Smallest cache that keeps 95 % of fullkv, in % of its bytes"]["method"].iloc[-1] == f"knorm{LACKS}"
    tasks = {line["method"]: line["niah"] for line in frames["Score by task"].to_dict("records")}
    assert tasks["knorm"] == "100.0 (12)"


def test_a_full_cache_that_lacks_samples_says_how_many_it_has() -> None:
    records = [*cell("fullkv", "full", HALF), *cell("a", "64", SCORES), *cell("b", "64", SCORES)]
    text = to_terminal(aggregate(records))
    assert "fullkv without compression: 100.0 ± 0.0 (on 12 of 24 samples)." in text


def test_a_budget_with_fewer_samples_than_another_one_is_marked() -> None:
    records = [r for m in "ab" for b, scores in (("64", SCORES), ("128", SCORES[:12])) for r in cell(m, b, scores)]
    table = only(records)
    assert "other_samples" in row(table, "a", "128")["flags"] and "other_samples" not in row(table, "a", "64")["flags"]
    told = {verdict.budget: "".join(verdict.said) for verdict in verdicts(table)}
    assert told["128"].endswith("On 12 samples; other budgets have more.")
    assert "samples" not in told["64"]
    assert [line["method"] for line in sections(table)["Score by task"].to_dict("records")][2:] == [
        f"{name}{LACKS}" for name in "ab"
    ]
    assert "x fewer samples than another budget" in "\n".join(how_to_read([table]))


def test_an_nll_over_fewer_samples_says_so() -> None:
    some = [record("b", "64", str(i), 1.0, nll=1.0 if i < 5 else None) for i in range(24)]
    lines = main_frame(only([*cell("a", "64", SCORES, nll=2.0), *some])).to_dict("records")
    assert {line["method"]: line["NLL"] for line in lines} == {"a": "2.000", "b": "1.000 (5)"}


def test_a_row_that_was_timed_on_fewer_prompts_is_flagged() -> None:
    timed = [
        record(m, "64", str(i), 1.0, measured=measured() if i <= (m == "a") else None) for m in "ab" for i in range(8)
    ]
    table = only(timed)
    assert "timed_on_fewer" in row(table, "b", "64")["flags"]
    assert "timed_on_fewer" not in row(table, "a", "64")["flags"]


@pytest.mark.parametrize("what", ["commit c0ffee, was deadbeef", "=1+1", "<b>|`x`"])
def test_a_resumed_row_is_marked_and_its_changes_are_listed(what: str) -> None:
    plain = cell("a", "64", SCORES)
    records = [*plain, *(r.model_copy(update={"method": "b", "environment_changes": (what,)}) for r in plain)]
    table = only(records)
    assert [("resumed" in row(table, name, "64")["flags"]) for name in "ab"] == [False, True]
    assert notes_of(table) == [f"resumed with another environment: {what} (24 records)"]
    flags = {line["method"]: line["flags"] for line in main_frame(table).to_dict("records")}
    assert "r" in flags["b"] and "r" not in flags["a"]
    page, text = to_markdown([table], title="b"), to_terminal([table])
    assert "resumed with another environment" in page and "resumed with another environment" in text
    assert "r resumed in another environment (see Notes)" in re.sub(r"\s+", " ", text)
    assert re.search(r"\bresumed\b", to_csv([table]))
    assert "resumed" in to_html([table], records, title="b")


def test_a_board_without_such_rows_does_not_speak_of_them() -> None:
    page = to_markdown([only([*cell("a", "64", SCORES), *cell("b", "64", SCORES)])], title="b")
    assert "resumed" not in page and "x fewer" not in page and LACKS not in page
