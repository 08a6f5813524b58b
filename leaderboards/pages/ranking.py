"""The ranking of a page: the cells of its one table of all rows, and the choices that filter them, as plain data."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.observing import is_observed
from leaderboards.stats.pareto import is_measured
from leaderboards.stats.ranks import is_ranked
from leaderboards.stats.reads import READ, is_read
from leaderboards.stats.worst import is_known
from leaderboards.tables.verdicts import most_nll, nll_text, score_text
from leaderboards.text import MIB, clean, number, rank_text

FLAGS = {"oom": "out of memory", "few": "few contexts", "unknown": "contexts unknown"}
FLAGS |= {"over_budget": "over budget", "under_budget": "under budget"}
FLAGS |= {"other_samples": "other samples", "timed_on_fewer": "timed on fewer samples"}
"""Flags that a page words otherwise."""
AXES = {
    "model": "Model",
    "dtype": "Dtype",
    "processor": "Processor",
    "query": "Query mode",
    "first_token": "First token",
}
"""Axes of a table that are filters, and columns where they differ."""
OTHER_AXES = {"seed": "Seed", "settings": "Settings", "division": "Division"}
"""Axes that are columns alone."""


class Shown(NamedTuple):
    """What stands in a row below a column. sort: the value a script sorts by; ends: those of an interval.

    shown: a line; of a method's name the parts between which a narrow column may break.
    """

    shown: str | list[str]
    sort: str
    ends: str = ""


class Column(NamedTuple):
    """A column. kind: classes of its header and cells, `agg` for what is of all tasks. more: hidden until asked for."""

    name: str
    kind: str = ""
    more: bool = False


class Choice(NamedTuple):
    """A filter. every: the words for no choice."""

    name: str
    label: str
    options: Sequence[str]
    every: str = "all"


def ranking(tables: Sequence[Table], runs: Mapping[tuple[int, str, str], Sequence[int]]) -> dict[str, Any]:
    """The columns and rows of the one table of all rows, as the template `ranking.html` asks for them.

    runs: (index of the table, method, budget) to the indices of the row's runs.
    """
    rows = [
        {
            "index": i,
            "axes": table.axes,
            "data": row,
            "memory": memory(row),
            "cells": _cells(table, row, most=most[row["budget"]]),
            "runs": runs.get((i, row["method"], row["budget"]), ()),
        }
        for i, table in enumerate(tables)
        for most in [most_nll(table.rows)]
        for row in table.rows.to_dict("records")
    ]
    return {"columns": _columns(tables), "rows": rows}


def choices(tables: Sequence[Table]) -> dict[str, Any]:
    """A choice per axis that has several values, the budgets and the tasks; fixed: what has one value, in words."""
    axes = [
        Choice(name, label, sorted({str(getattr(table.axes, name)) for table in tables}))
        for name, label in AXES.items()
    ]
    axes.append(Choice("memory", "Memory", _memories(tables)))
    budgets = list(dict.fromkeys(budget for table in tables for budget in table.rows["budget"]))
    tasks = sorted({task for table in tables for task in table.tasks["task"]})
    found = [choice for choice in axes if choice.options[1:]]
    found += [Choice("budget", "Budget", budgets), Choice("task", "Task", tasks, "mean of all tasks")]
    fixed = " · ".join(f"{one.label}: {one.options[0]}" for one in axes if not one.options[1:])
    return {"choices": found, "fixed": fixed}


def memory(row: TableRow) -> str:
    """Whether the bytes and seconds of a row are those of memory that was freed."""
    return str(row.get("memory", "physical"))


def _memories(tables: Sequence[Table]) -> list[str]:
    return sorted({memory(row) for table in tables for row in table.rows.to_dict("records")})


def _columns(tables: Sequence[Table]) -> list[Column]:
    """The columns that some row fills, in their order."""
    frames = [table.rows for table in tables]
    measured, ranked, tailed = (any(map(known, frames)) for known in (is_measured, is_ranked, is_known))
    there = {
        "Rank": ranked,
        **dict.fromkeys(("Stored %", "Stored MiB"), any("stored_bytes_mean" in frame for frame in frames)),
        **dict.fromkeys(("Read %", "Read MiB"), any(map(is_read, frames))),
        "Observe ms": any(map(is_observed, frames)),
        **dict.fromkeys(("TPOT ms", "Peak MiB"), measured),
        **dict.fromkeys(("Broken %", "NLL worst 10%"), tailed),
        "Needle %": any(frame["needle_percent_n"].any() for frame in frames),
        "Memory": len(_memories(tables)) > 1,
    }
    columns = [
        Column("Method", "name"),
        Column("Budget"),
        Column("Score", "num"),
        Column("Rank", "num agg"),
        Column("KV %", "num"),
        Column("KV MiB", "num", more=True),
        Column("Stored %", "num"),
        Column("Stored MiB", "num", more=True),
        Column("Read %", "num"),
        Column("Read MiB", "num", more=True),
        Column("Observe ms", "num agg"),
        Column("TPOT ms", "num agg"),
        Column("Peak MiB", "num agg", more=True),
        *(Column(f"Δ {name}", "num agg", more=i > 0) for i, name in enumerate(tables[0].baselines)),
        Column("NLL", "num agg"),
        Column("Broken %", "num agg"),
        Column("NLL worst 10%", "num agg", more=True),
        Column("Needle %", "num agg", more=True),
        Column("n", "num", more=True),
        Column("Flags", more=not any(frame["flags"].any() for frame in frames)),
        Column("Memory"),
    ]
    for name, label in (AXES | OTHER_AXES).items():
        if len({getattr(table.axes, name) for table in tables}) > 1:
            columns.append(Column(label))
    return [column for column in columns if there.get(column.name, True)]


def _cells(table: Table, row: TableRow, *, most: int) -> dict[str, Shown]:
    """What a row shows below every column that there may be. most: samples that have an NLL at its budget."""
    mib = row["kv_bytes_mean"] / MIB
    stored, read = (row.get(f"{what}_bytes_mean", math.nan) / MIB for what in ("stored", "read"))
    low, high = row.get("rank_low", math.nan), row.get("rank_high", math.nan)
    plain = {
        "Budget": row["budget"],
        "n": str(row["n_ok"]),
        "Flags": ", ".join(FLAGS.get(flag, flag) for flag in row["flags"].split()),
        "Memory": memory(row),
        **{label: str(getattr(table.axes, name)) for name, label in (AXES | OTHER_AXES).items()},
    }
    return {
        "Method": Shown(re.split(r"(?<=[@_])", clean(row["method"])), row["method"]),
        "Score": Shown(score_text(row), _value(row["score_points_mean"])),
        "Rank": Shown(rank_text(low, high), _value(low + high / 1e4)),
        "KV %": _number(row["kv_percent_of_full"]),
        "KV MiB": _number(mib, digits=1 if mib >= 100 else 3),
        "Stored %": _number(row.get("stored_percent_of_full", math.nan)),
        "Stored MiB": _number(stored, digits=1 if stored >= 100 else 3),
        "Read %": _number(row.get(READ, math.nan)),
        "Read MiB": _number(read, digits=1 if read >= 100 else 3),
        "Observe ms": _number(row.get("observe_ms_median", math.nan)),
        "TPOT ms": _number(1000 * row.get("tpot_s_mean", math.nan), digits=2),
        "Peak MiB": _number(row.get("peak_bytes_mean", math.nan) / MIB),
        "NLL": Shown(nll_text(row, most), _value(row["nll_nats_mean"])),
        "Broken %": _number(row.get("broken_percent_mean", math.nan)),
        "NLL worst 10%": _number(row.get("nll_worst_nats_mean", math.nan), digits=3),
        "Needle %": _number(row["needle_percent_mean"]),
        **{f"Δ {name}": _difference(row, f"score_points_vs_{name}") for name in table.baselines},
        **{name: Shown(text, text) for name, text in plain.items()},
    }


def _difference(row: TableRow, name: str) -> Shown:
    mean, low, high = (row[f"{name}_{part}"] for part in ("mean", "low", "high"))
    ends = "" if math.isnan(low) else f"[{number(low, sign='+')}, {number(high, sign='+')}]"
    return Shown(number(mean, sign="+"), _value(mean), ends)


def _number(value: float, *, digits: int = 1) -> Shown:
    return Shown(number(value, digits=digits), _value(value))


def _value(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"
