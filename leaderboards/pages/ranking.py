"""The ranking of a page: the cells of its one table of all rows, and the choices that filter them, as plain data."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.comparable import Axes
from leaderboards.stats.pareto import is_measured
from leaderboards.stats.ranks import is_ranked
from leaderboards.stats.worst import is_known
from leaderboards.tables.sections import rank_text
from leaderboards.tables.verdicts import score_text
from leaderboards.text import MIB, clean, number

FLAGS = {
    "incomplete": "incomplete",
    "skipped": "skipped",
    "failed": "failed",
    "oom": "out of memory",
    "over_budget": "over budget",
    "few": "few contexts",
}
AXES = {"model": "Model", "dtype": "Dtype", "query": "Query mode", "first_token": "First token"}
"""Axes of a table that are filters, and columns where they differ."""
OTHER_AXES = {"seed": "Seed", "settings": "Settings"}
"""Axes that are columns alone."""


@dataclass(frozen=True)
class Shown:
    """What stands in a row below a column. sort: the value a script sorts by; ends: those of an interval.

    shown: a line; of a method's name the parts between which a narrow column may break.
    """

    shown: str | list[str]
    sort: str
    ends: str = ""


@dataclass(frozen=True)
class Column:
    """A column. kind: classes of its header and cells, `agg` for what is of all tasks. more: hidden until asked for."""

    name: str
    cell: Callable[[Table, TableRow], Shown]
    kind: str = ""
    more: bool = False

    @property
    def classes(self) -> str:
        """The classes of the header; the script hides `more` until a reader asks for it."""
        return f"{self.kind} more".strip() if self.more else self.kind


@dataclass(frozen=True)
class RankingRow:
    """A row of the table at `index`. cells: one per column; runs: indices of the runs that it is from."""

    index: int
    axes: Axes
    values: TableRow
    memory: str
    cells: Sequence[Shown]
    runs: Sequence[int]


@dataclass(frozen=True)
class Ranking:
    """The table of all rows of all tables."""

    columns: Sequence[Column]
    rows: Sequence[RankingRow]


@dataclass(frozen=True)
class Choice:
    """A filter. every: the words for no choice."""

    name: str
    label: str
    options: Sequence[str]
    every: str = "all"


@dataclass(frozen=True)
class Choices:
    """The filters of a page; fixed: what has one value only, in words."""

    choices: Sequence[Choice]
    fixed: str


def ranking(tables: Sequence[Table], runs: Mapping[tuple[int, str, str], Sequence[int]]) -> Ranking:
    """The one table of all rows. runs: (index of the table, method, budget) to the indices of the row's runs."""
    columns = _columns(tables)
    rows = [
        RankingRow(
            index=i,
            axes=table.axes,
            values=row,
            memory=memory(row),
            cells=[column.cell(table, row) for column in columns],
            runs=runs.get((i, row["method"], row["budget"]), ()),
        )
        for i, table in enumerate(tables)
        for row in table.rows.to_dict("records")
    ]
    return Ranking(columns, rows)


def choices(tables: Sequence[Table]) -> Choices:
    """A choice per axis that has several values, the budgets and the tasks."""
    axes = [
        Choice(name, label, sorted({str(getattr(table.axes, name)) for table in tables}))
        for name, label in AXES.items()
    ]
    axes.append(Choice("memory", "Memory", _memories(tables)))
    budgets = list(dict.fromkeys(budget for table in tables for budget in table.rows["budget"]))
    tasks = sorted({task for table in tables for task in table.tasks["task"]})
    found = [choice for choice in axes if choice.options[1:]]
    found += [Choice("budget", "Budget", budgets), Choice("task", "Task", tasks, "mean of all tasks")]
    return Choices(found, " · ".join(f"{one.label}: {one.options[0]}" for one in axes if not one.options[1:]))


def memory(row: TableRow) -> str:
    """Whether the bytes and seconds of a row are those of memory that was freed."""
    return str(row.get("memory", "physical"))


def _memories(tables: Sequence[Table]) -> list[str]:
    return sorted({memory(row) for table in tables for row in table.rows.to_dict("records")})


def _columns(tables: Sequence[Table]) -> list[Column]:
    """The columns that some row fills, in their order."""
    frames = [table.rows for table in tables]
    measured, ranked, tailed = (any(map(known, frames)) for known in (is_measured, is_ranked, is_known))
    baselines = list(tables[0].baselines)
    flagged = any(frame["flags"].any() for frame in frames)
    there = {
        "Rank": ranked,
        **dict.fromkeys(("TPOT ms", "Peak MiB"), measured),
        **dict.fromkeys(("Broken %", "NLL worst 10%"), tailed),
        "Needle %": any(frame["needle_percent_n"].any() for frame in frames),
        "Memory": len(_memories(tables)) > 1,
    }
    columns = [
        Column("Method", _method, "name"),
        Column("Budget", lambda table, row: _plain(row["budget"])),
        Column("Score", _score, "num"),
        Column("Rank", _rank, "num agg"),
        Column("KV %", _number("kv_percent_of_full"), "num"),
        Column("KV MiB", _kv_mib, "num", more=True),
        Column("TPOT ms", _number("tpot_s_mean", digits=2, scale=1000), "num agg"),
        Column("Peak MiB", _number("peak_bytes_mean", scale=1 / MIB), "num agg", more=True),
        *(Column(f"Δ {name}", _difference(name), "num agg", more=i > 0) for i, name in enumerate(baselines)),
        Column("NLL", _number("nll_nats_mean", digits=3), "num agg"),
        Column("Broken %", _number("broken_percent_mean"), "num agg"),
        Column("NLL worst 10%", _number("nll_worst_nats_mean", digits=3), "num agg", more=True),
        Column("Needle %", _number("needle_percent_mean"), "num agg", more=True),
        Column("n", lambda table, row: Shown(str(row["n_ok"]), str(row["n_ok"])), "num", more=True),
        Column("Flags", _flags, more=not flagged),
        Column("Memory", lambda table, row: _plain(memory(row))),
    ]
    for name, label in (AXES | OTHER_AXES).items():
        if len({getattr(table.axes, name) for table in tables}) > 1:
            columns.append(Column(label, _axis(name)))
    return [column for column in columns if there.get(column.name, True)]


def _method(table: Table, row: TableRow) -> Shown:
    return Shown(re.split(r"(?<=[@_])", clean(row["method"])), row["method"])


def _score(table: Table, row: TableRow) -> Shown:
    return Shown(score_text(row), _value(row["score_points_mean"]))


def _rank(table: Table, row: TableRow) -> Shown:
    low, high = row["rank_low"], row["rank_high"]
    return Shown(rank_text(low, high), _value(low + high / 1e4))


def _kv_mib(table: Table, row: TableRow) -> Shown:
    mib = row["kv_bytes_mean"] / MIB
    return Shown(number(mib, digits=1 if mib >= 100 else 3), _value(mib))


def _flags(table: Table, row: TableRow) -> Shown:
    return _plain(", ".join(FLAGS[flag] for flag in row["flags"].split()))


def _difference(baseline: str) -> Callable[[Table, TableRow], Shown]:
    def cell(table: Table, row: TableRow) -> Shown:
        mean, low, high = (row[f"score_points_vs_{baseline}_{part}"] for part in ("mean", "low", "high"))
        ends = "" if math.isnan(low) else f"[{number(low, sign='+')}, {number(high, sign='+')}]"
        return Shown(number(mean, sign="+"), _value(mean), ends)

    return cell


def _number(name: str, *, digits: int = 1, scale: float = 1.0) -> Callable[[Table, TableRow], Shown]:
    def cell(table: Table, row: TableRow) -> Shown:
        value = scale * row.get(name, math.nan)
        return Shown(number(value, digits=digits), _value(value))

    return cell


def _axis(name: str) -> Callable[[Table, TableRow], Shown]:
    return lambda table, row: _plain(str(getattr(table.axes, name)))


def _plain(text: str) -> Shown:
    return Shown(text, text)


def _value(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"
