"""Bytes read per decoded token on boards, and methods whose budget is of what they read."""

import math

import pytest

from harness.records.record import Record
from leaderboards.pages.charts import charts, words
from leaderboards.pages.ranking import ranking
from leaderboards.stats.comparable import budget_order
from leaderboards.stats.reads import READ, is_read
from leaderboards.tables.board import main_frame, to_csv, to_markdown, to_terminal
from leaderboards.tables.picture import write_picture
from tests.pretend import cell, only, row

FULL = cell("fullkv", "full", [1.0] * 12, kv_bytes=400, stored_bytes=400, asked_bytes=400, read_bytes=400)


def read(method: str, size: int | None, budget: str = "64", **changes: object) -> list[Record]:
    return cell(method, budget, [0.5] * 12, stored_bytes=100, read_bytes=size, **changes)


def quest(score: float = 0.9) -> list[Record]:
    sizes = {"kv_bytes": 430, "stored_bytes": 430, "asked_bytes": 400, "read_bytes": 120}
    return cell("quest", "read 64", [score] * 12, **sizes)


def test_a_table_shows_and_draws_what_is_read(tmp_path: pytest.TempPathFactory) -> None:
    table = only(FULL + read("a", 80) + read("b", 96))
    a = row(table, "a", "64")
    assert (a["read_bytes_mean"], a[READ]) == (80, 20) and is_read(table.rows)
    assert main_frame(table)["read %"].tolist() == ["100.0", "20.0", "24.0"]
    assert "read %" in to_terminal([table]) and "positions are not read" in to_markdown([table], title="t")
    assert "reads 20.0 %" in words(a)
    drawn = charts(table, salt="s")
    assert drawn is not None and "Score against bytes read per decoded token" in [c.title for c in drawn.charts]
    picture = write_picture([table], tmp_path, "p").read_text()  # type: ignore[arg-type]
    assert "bytes read per decoded token" in picture
    columns = [column.name for column in ranking([table], {})["columns"]]
    assert "Read %" in columns


def test_old_records_have_a_mark_and_no_number() -> None:
    table = only(FULL + read("a", 80) + read("b", None))
    assert math.isnan(row(table, "b", "64")[READ]) and is_read(table.rows)
    assert main_frame(table)["read %"].tolist() == ["100.0", "20.0", "-"]
    first, *others = read("b", 96)
    some = only(FULL + read("a", 80) + [first.model_copy(update={"read_bytes": None}), *others])
    assert math.isnan(row(some, "b", "64")["read_bytes_mean"])


def test_tables_of_old_records_are_as_they_were() -> None:
    old = [r.model_copy(update={"read_bytes": None}) for r in FULL + read("a", 80)]
    table = only(old)
    assert not is_read(table.rows) and "read_" not in to_csv([table])
    drawn = charts(table, salt="s")
    assert drawn is not None and not [c for c in drawn.charts if "read" in c.title]


def test_a_budget_of_reading_is_ranked_by_nothing_that_is_held() -> None:
    rivals = cell("a", "64", [0.5] * 12, stored_bytes=100) + cell("b", "64", [0.4] * 12, stored_bytes=100)
    table = only(FULL + quest() + rivals)
    own = row(table, "quest", "read 64")
    assert own["n_over_budget"] == 0 and own["flags"].split() == [f for f in own["flags"].split() if f == "few"]
    assert math.isnan(own["rank_low"]) and own["mark"] == "" and own[READ] == 30
    assert row(table, "a", "64")["best_other"] == "b"  # not quest
    assert set(table.floors.get("method", ())) <= {"a", "b"} and "quest" not in set(table.closed.get("method", ()))


def test_budgets_of_reading_come_last_in_the_order_of_their_size() -> None:
    budgets = ["read 256", "0.5", "full", "read 64", "128", "=gvote", "64"]
    assert sorted(budgets, key=budget_order)[:4] == ["full", "64", "128", "0.5"]
    assert sorted(budgets, key=budget_order)[-2:] == ["read 64", "read 256"]
