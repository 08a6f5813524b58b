"""What observing costs on a board: the median of the records that have it, and no trace of it where none has."""

import io
import math
import re
from typing import Any

import pandas as pd

from harness.records.record import Record
from leaderboards.pages.page import to_html
from leaderboards.stats.aggregate import aggregate
from leaderboards.tables.board import main_frame, to_csv, to_markdown, to_terminal
from tests.pretend import cell, only, row


def timed(method: str, budget: str, costs: list[float | None], **changes: Any) -> list[Record]:
    own = cell(method, budget, [0.5] * len(costs), **changes)
    return [r.model_copy(update={"observe_ms": cost}) for r, cost in zip(own, costs, strict=True)]


RECORDS = [
    *timed("fullkv", "full", [0.0, 0.0, 0.0, None]),
    *timed("h2o", "64", [90.0, 500.0, 80.0, None]),
    *timed("snapkv", "64", [-3.0, 2.0, None, None]),
    *timed("late", "64", [None] * 4),
]


def test_the_median_is_over_the_prompts_that_have_it() -> None:
    table = only(RECORDS)
    found = {method: row(table, method, budget) for method, budget in {(r.method, r.budget) for r in RECORDS}}
    assert (found["h2o"]["observe_ms_median"], found["h2o"]["observe_n"]) == (90.0, 3)
    assert (found["snapkv"]["observe_ms_median"], found["snapkv"]["observe_n"]) == (-0.5, 2)
    assert (found["fullkv"]["observe_ms_median"], found["fullkv"]["observe_n"]) == (0.0, 3)
    assert math.isnan(found["late"]["observe_ms_median"]) and found["late"]["observe_n"] == 0


def test_a_cell_that_was_not_scored_does_not_count() -> None:
    lost = [r.model_copy(update={"status": "failed"}) if r.observe_ms == 500.0 else r for r in RECORDS]
    assert row(only(lost), "h2o", "64")["observe_ms_median"] == 85.0


def test_it_stands_beside_the_bytes_on_every_page_and_in_the_csv() -> None:
    tables = aggregate(RECORDS)
    frame = main_frame(tables[0])
    columns = list(frame)
    assert columns[columns.index("KV %") + 1] == "observe ms"
    shown = dict(zip(frame["method"], frame["observe ms"], strict=True))
    assert shown == {"fullkv": "0.0", "h2o": "90.0", "snapkv": "-0.5", "late": "-"}
    csv = pd.read_csv(io.StringIO(to_csv(tables))).set_index("method")
    assert csv.loc["h2o", "observe_ms_median"] == 90 and csv.loc["h2o", "observe_n"] == 3
    assert pd.isna(csv.loc["late", "observe_ms_median"])
    for text in (to_markdown(tables, title="b"), to_terminal(tables)):
        assert text.count("observe ms: prefill with what the method observes less a plain prefill") == 1
    assert max(map(len, to_terminal(tables).splitlines())) <= 120
    page = to_html(tables, RECORDS, title="b")
    assert ">Observe ms</button>" in page and '<td data-v="-0.5" class="num agg">-0.5</td>' in page


def test_a_board_without_it_says_nothing_of_it() -> None:
    records = [r.model_copy(update={"observe_ms": None}) for r in RECORDS]
    tables = aggregate(records)
    pages = (to_markdown(tables, title="b"), to_terminal(tables), to_csv(tables), to_html(tables, records, title="b"))
    assert not any(re.search("observe[ _]", page, re.IGNORECASE) for page in pages)


def test_a_table_without_it_beside_one_with_it_has_empty_cells() -> None:
    other = [r.model_copy(update={"observe_ms": None, "seed": 7}) for r in RECORDS]
    csv = pd.read_csv(io.StringIO(to_csv(aggregate([*RECORDS, *other]))))
    assert csv[csv.seed == 7].observe_n.isna().all() and not csv[csv.seed == 42].observe_n.isna().any()
