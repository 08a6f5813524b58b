"""Stored bytes on boards: where every record knows them they are what is drawn and compared, else live bytes are."""

import math

import pytest

from harness.records.record import Record
from leaderboards.pages.charts import BYTES, bytes_cost, words
from leaderboards.stats.aggregate import Table
from leaderboards.stats.stored import percent_column
from leaderboards.tables.board import main_frame, to_csv, to_markdown
from leaderboards.tables.sections import flag_letters
from tests.pretend import cell, measured, only, row

FULL = cell("fullkv", "full", [1.0] * 12, kv_bytes=400, stored_bytes=400, asked_bytes=400)


def stored(method: str, size: int, score: float = 0.5, **changes: object) -> list[Record]:
    return cell(method, "64", [score] * 12, stored_bytes=size, **changes)


def test_a_table_whose_records_all_know_stored_bytes_shows_and_draws_them() -> None:
    table = only(FULL + stored("a", 104) + stored("b", 100))
    a = row(table, "a", "64")
    assert (a["stored_bytes_mean"], a["stored_percent_of_full"], a["kv_percent_of_full"]) == (104, 26, 25)
    assert percent_column(table.rows) == "stored_percent_of_full"
    assert {"stored MiB", "stored %"} < set(main_frame(table))
    cost = bytes_cost(table)
    assert cost.column == "stored_percent_of_full" and "stored" in cost.label
    assert "stored 26.0 %" in words(a)
    assert "stored: all that is allocated" in to_markdown([table], title="t")


def test_one_old_record_leaves_the_table_with_live_bytes() -> None:
    table = only(FULL + stored("a", 104) + cell("b", "64", [0.5] * 12))
    assert not [name for name in table.rows if "stored" in name] and "stored" not in to_csv([table])
    assert percent_column(table.rows) == "kv_percent_of_full" and bytes_cost(table) is BYTES
    assert "KV 25.0 %" in words(row(table, "a", "64"))
    assert "stored" not in to_markdown([table], title="t")


@pytest.mark.parametrize(("size", "flagged"), [(98, True), (99, False), (100, False), (101, False)])
def test_a_row_a_hundredth_below_its_bytes_is_marked(size: int, flagged: bool) -> None:
    table = only(FULL + stored("a", size, kv_bytes=size))
    a = row(table, "a", "64")
    assert a["n_under_budget"] == 12 * flagged and ("under_budget" in a["flags"].split()) == flagged
    assert ("l" in flag_letters(a["flags"])) == flagged
    assert row(table, "fullkv", "full")["n_under_budget"] == 0


def test_a_cell_without_a_score_has_no_stored_bytes() -> None:
    table = only(FULL + stored("a", 100) + cell("b", "64", [None] * 12))
    b = row(table, "b", "64")
    assert math.isnan(b["stored_bytes_mean"]) and b["n_under_budget"] == 0


def fronts(table: Table) -> dict[str, str]:
    return {r["method"]: r["front_bytes"] for r in table.rows.to_dict("records")}


def test_the_front_goes_by_stored_bytes() -> None:
    """Of equal live bytes, and `b` better: `a` is off the front unless it stores less."""
    timed = {"measured": measured()}
    rival = cell("b", "64", [0.9] * 20, stored_bytes=120, **timed)
    for size, mark in ((120, ""), (100, "*")):
        own = cell("a", "64", [0.1] * 20, stored_bytes=size, **timed)
        assert fronts(only(own + rival)) == {"a": mark, "b": "*"}
