"""What a page shows of one table beside its rows of the ranking: verdicts, charts, needles, and tables of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import pandas as pd

from harness.records.record import Record
from leaderboards.pages.charts import ChartList, charts
from leaderboards.pages.html import TextTable
from leaderboards.pages.needles import HeatGroup, heat_groups
from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.comparable import FULL
from leaderboards.tables.board import heading
from leaderboards.tables.sections import rival_frames, sections
from leaderboards.tables.verdicts import BudgetVerdict, Words, uncompressed, verdicts
from leaderboards.text import clean, number


@dataclass(frozen=True)
class TableParts:
    """One table. index: among those of the page; several: whether there are others. A part may be empty or None.

    rivals: the subject against the strongest other method of each family; more: what else the board says.
    """

    index: int
    several: bool
    heading: str
    verdicts: Sequence[BudgetVerdict]
    uncompressed: Sequence[Words]
    best: TextTable | None
    charts: ChartList | None
    rivals: Sequence[TextTable]
    needles: Sequence[HeatGroup]
    more: Sequence[TextTable]


def table_parts(i: int, table: Table, records: Sequence[Record], *, several: bool) -> TableParts:
    """The parts of the i-th table. records: one per key, those that the table is of."""
    told = rival_frames(table.rivals)
    return TableParts(
        index=i,
        several=several,
        heading=heading(table),
        verdicts=verdicts(table),
        uncompressed=uncompressed(table),
        best=best_by_task(table),
        charts=charts(table, salt=f"chart-{i}"),
        rivals=_filled(told),
        needles=heat_groups(records),
        more=_filled({title: frame for title, frame in sections(table).items() if title not in told}),
    )


def best_by_task(table: Table) -> TextTable | None:
    """The highest mean of every task at every budget, beside that of the uncompressed cache; None without scores.

    Cells over their bytes or with missing samples are no candidates. No interval here: a task has few samples.
    """
    rows = table.rows.to_dict("records")
    fair = {(r["budget"], r["method"]) for r in rows if not {"incomplete", "over_budget"} & set(r["flags"].split())}
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["n_ok"]))
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in table.tasks.to_dict("records"):
        if (row["budget"], row["method"]) in fair and not isnan(row["score_points_mean"]):
            found.setdefault((row["task"], row["budget"]), []).append((row["score_points_mean"], row["method"]))
    tasks = list(dict.fromkeys(task for task, _ in found))
    alone = {b for b in budgets if len({method for budget, method in fair if budget == b}) == 1}
    cells = [(clean(task), *(_best(found.get((task, b), []), named=b not in alone) for b in budgets)) for task in tasks]
    heads = ["task", *(clean(b) if b == FULL else f"budget {clean(b)}{_share(rows, b)}" for b in budgets)]
    caption = "Highest mean of each task and how many methods share it; not tested against the next one"
    return TextTable(caption, heads, cells) if cells else None


def _best(means: Sequence[tuple[float, str]], *, named: bool) -> str:
    if not means:
        return "-"
    top = max(round(mean, 6) for mean, _ in means)
    names = sorted(clean(method) for mean, method in means if round(mean, 6) == top)
    if not named:
        return number(top)
    if not top:
        return "all 0.0"
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"{number(top)} {names[0]}{more}"


def _share(rows: Sequence[TableRow], budget: str) -> str:
    """The most bytes that a cell of this budget took."""
    shares = [row["kv_percent_of_full"] for row in rows if row["budget"] == budget]
    known = [share for share in shares if not isnan(share)]
    return f", {number(max(known))} % of bytes" if known else ""


def _filled(frames: Mapping[str, pd.DataFrame]) -> list[TextTable]:
    return [TextTable.of(frame, title) for title, frame in frames.items() if len(frame)]
