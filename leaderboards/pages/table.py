"""The verdicts and the ranking of a page, as HTML that reads without a script. Nothing is averaged here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from leaderboards.pages.html import attributes, element, text
from leaderboards.stats.aggregate import Table
from leaderboards.stats.comparable import FULL
from leaderboards.stats.pareto import is_measured
from leaderboards.stats.ranks import is_ranked, rank_text
from leaderboards.stats.worst import is_known
from leaderboards.text import number

MIB = 2**20
NAMED = 4  # methods that a verdict names
FLAGS = {
    "incomplete": "incomplete",
    "skipped": "skipped",
    "failed": "failed",
    "oom": "out of memory",
    "over_budget": "over budget",
    "few": "few contexts",
}
AXES = {"model": "Model", "dtype": "Dtype", "query": "Query mode", "first_token": "First token", "seed": "Seed"}
AXES |= {"settings": "Settings"}
MORE = {"KV MiB", "Needle %", "NLL worst 10%", "Peak MiB", "n"}
"""Columns that a reader asks for; the script hides them until then."""
Row = Mapping[Any, Any]


def verdicts(table: Table) -> str:
    """A list with one sentence per budget, made from the marks of the table.

    No cell with `=` is surely better than another one with it. A cell without a mark is surely worse than some method,
    so not first, but need not be told apart from each of those that may be (`leaderboards.stats.aggregate`).
    """
    rows = table.rows.to_dict("records")
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["budget"] != FULL))
    full = "".join(
        element("p", f"{_name(row)} without compression: {text(_score(row))}.", {"class": "full"})
        for row in rows
        if row["budget"] == FULL and row["n_ok"]
    )
    items = [_verdict(budget, [row for row in rows if row["budget"] == budget]) for budget in budgets]
    return element("ul", "".join(items), {"class": "verdicts"}) + full


def _verdict(budget: str, rows: Sequence[Row]) -> str:
    scored = [row for row in rows if row["n_ok"] and not row["n_over_budget"]]
    marked = sorted((row for row in scored if row["mark"]), key=lambda row: -row["score_points_mean"])
    others = len(scored) - len(marked)
    label = element("span", f"Budget {text(budget)}", {"class": "budget"})
    if len(scored) < 2:
        said = "Nothing to compare: fewer than two methods have a score within their bytes."
    elif not marked:
        said = "No ranking: no method is complete."
    elif marked[0]["mark"] == "*":
        which = "the other method" if others == 1 else f"all {others} other methods"
        said = f"{_name(marked[0])} is best, {text(_score(marked[0]))}, told apart from {which}."
    elif len(marked) == 1:
        said = f"{_name(marked[0])} is first, {text(_score(marked[0]))}, but not told apart from every other method."
    else:
        said = _tied(marked, others)
    won = "won" if marked and marked[0]["mark"] == "*" else "tied"
    cost = element("small", text(_cost(marked or scored)), {})
    return element("li", f"{label}<span>{said} {cost}</span>", {"class": won, "data-budget": budget})


def _cost(rows: Sequence[Row]) -> str:
    """What these cells take, from the least to the most: measured bytes, and the time per token where there is one."""
    kept = _range([row["kv_percent_of_full"] for row in rows], digits=1)
    mib = _range([row["kv_bytes_mean"] / MIB for row in rows], digits=2)
    tpot = _range([1000 * row.get("tpot_s_mean", math.nan) for row in rows], digits=1)
    parts = [f"{kept} % of the full cache, {mib} MiB"] if kept else []
    return ", ".join([*parts, f"{tpot} ms per token"] if tpot else parts)


def _range(values: Sequence[float], *, digits: int) -> str:
    """`1.0`, `1.0-2.0`, or nothing."""
    known = [number(value, digits=digits) for value in sorted(values) if not math.isnan(value)]
    return "-".join(dict.fromkeys((known[0], known[-1]))) if known else ""


def _tied(marked: Sequence[Row], others: int) -> str:
    named = ", ".join(f"{_name(row)} {text(number(row['score_points_mean']))}" for row in marked[:NAMED])
    more = f" and {len(marked) - NAMED} more" if len(marked) > NAMED else ""
    below = {0: "", 1: " The other method is surely not first."}.get(others, f" {others} others are surely not first.")
    return f"Not told apart: {named}{more}.{below}"


def ranking(tables: Sequence[Table], runs: Mapping[tuple[int, str, str], Sequence[int]]) -> str:
    """The one table of all rows. runs: (index of the table, method, budget) to the indices of the row's runs."""
    varied = [axis for axis in AXES if len({getattr(table.axes, axis) for table in tables}) > 1]
    heads = [*_heads(tables), *((AXES[axis], "") for axis in varied)]
    head = "".join(
        f"<th scope=col{attributes({'class': kind})}><button type=button>{text(name)}</button></th>"
        for name, kind in heads
    )
    names = [name for name, _ in heads]
    body = "".join(
        _row(row, i, names, table, varied, runs.get((i, row["method"], row["budget"]), ()))
        for i, table in enumerate(tables)
        for row in table.rows.to_dict("records")
    )
    caption = "<caption>Every method at every budget</caption>"
    head = f"<thead><tr>{head}<th scope=col>Made by</th></tr></thead>"
    return f'<table id="ranking">{caption}{head}<tbody>{body}</tbody></table>'


def _heads(tables: Sequence[Table]) -> list[tuple[str, str]]:
    """Header and class of each column that some row fills; `more` marks those of `MORE`."""
    frames = [table.rows for table in tables]
    heads = [("Method", "name"), ("Budget", ""), ("Score", "num")]
    heads += [("Rank", "num agg")] if any(map(is_ranked, frames)) else []
    heads += [("KV %", "num"), ("KV MiB", "num")]
    heads += [("TPOT ms", "num agg"), ("Peak MiB", "num agg")] if any(map(is_measured, frames)) else []
    baselines = [f"Δ {name}" for name in tables[0].baselines]
    heads += [(name, "num agg") for name in baselines] + [("NLL", "num agg")]
    heads += [("Broken %", "num agg"), ("NLL worst 10%", "num agg")] if any(map(is_known, frames)) else []
    heads += [("Needle %", "num agg")] if any(frame["needle_percent_n"].any() for frame in frames) else []
    heads += [("n", "num"), ("Flags", "")]
    heads += [("Memory", "")] if len({memory(row) for f in frames for row in f.to_dict("records")}) > 1 else []
    more = {*MORE, *baselines[1:], *(() if any(frame["flags"].any() for frame in frames) else ("Flags",))}
    return [(name, f"{kind} more".strip() if name in more else kind) for name, kind in heads]


def memory(row: Row) -> str:
    """Whether the bytes and seconds of a row are those of memory that was freed."""
    return str(row.get("memory", "physical"))


def _row(row: Row, i: int, names: Sequence[str], table: Table, varied: Sequence[str], runs: Sequence[int]) -> str:
    cells = _cells(row, table) | {AXES[axis]: _plain(getattr(table.axes, axis)) for axis in varied}
    own = {axis: str(getattr(table.axes, axis)) for axis in ("model", "dtype", "query", "first_token")}
    data = {"data-" + name.replace("_", "-"): value for name, value in own.items()}
    data |= {
        "data-table": str(i),
        "data-budget": row["budget"],
        "data-method": row["method"],
        "data-memory": memory(row),
    }
    data |= {"class": {"*": "best", "=": "tie"}.get(row["mark"], "")}
    links = [
        element("a", "run" if len(runs) == 1 else f"run {n + 1}", {"href": f"#run-{run}", "data-run": str(run)})
        for n, run in enumerate(runs)
    ]
    return element("tr", "".join(cells[name] for name in names) + element("td", " ".join(links), {}), data)


def _cells(row: Row, table: Table) -> dict[str, str]:
    """Header to cell."""
    mib = row["kv_bytes_mean"] / MIB
    ranked = row["rank_low"], row["rank_high"]
    cells = {
        "Method": element("th", _breakable(_name(row)), {"scope": "row", "class": "name", "data-v": row["method"]}),
        "Budget": _plain(row["budget"]),
        "Memory": _plain(memory(row)),
        "Rank": element(
            "td", text(rank_text(*ranked)), {"data-v": _value(ranked[0] + ranked[1] / 1e4), "class": "num agg"}
        ),
        "Broken %": _number(row["broken_percent_mean"], kind="agg"),
        "NLL worst 10%": _number(row["nll_worst_nats_mean"], digits=3, kind="agg"),
        "Score": _score_cell(row),
        "KV %": _number(row["kv_percent_of_full"]),
        "KV MiB": _number(mib, digits=1 if mib >= 100 else 3),
        "NLL": _number(row["nll_nats_mean"], digits=3, kind="agg"),
        "Needle %": _number(row["needle_percent_mean"], kind="agg"),
        "TPOT ms": _number(1000 * row.get("tpot_s_mean", math.nan), digits=2, kind="agg"),
        "Peak MiB": _number(row.get("peak_bytes_mean", math.nan) / MIB, kind="agg"),
        "n": element("td", str(row["n_ok"]), {"data-v": str(row["n_ok"]), "class": "num"}),
        "Flags": _plain(", ".join(FLAGS[flag] for flag in row["flags"].split())),
    }
    for wanted in table.baselines:
        mean, low, high = (row[f"score_points_vs_{wanted}_{part}"] for part in ("mean", "low", "high"))
        spread = "" if math.isnan(low) else f" <small>[{number(low, sign='+')}, {number(high, sign='+')}]</small>"
        shown = number(mean, sign="+") + spread
        cells[f"Δ {wanted}"] = element("td", shown, {"data-v": _value(mean), "class": "num agg"})
    return cells


def _score_cell(row: Row) -> str:
    mean, low, high = (row[f"score_points_{part}"] for part in ("mean", "low", "high"))
    badge = {"*": '<span class="badge">best</span>', "=": '<span class="badge">tied</span>'}.get(row["mark"], "")
    shown = f"<span>{badge} {text(_score(row))}</span>{_bar(mean, low, high)}"
    inside = f'<span class="all">{shown}</span><span class="one" hidden></span>'
    return element("td", inside, {"data-v": _value(mean), "class": "num score"})


def _bar(mean: float, low: float, high: float) -> str:
    """The interval on a line from 0 to 100; the words beside it say the same."""
    if math.isnan(mean):
        return ""
    spread = "" if math.isnan(low) else f'<path class="interval" d="M{low:.1f} 4H{high:.1f}"/>'
    dot = f'<circle cx="{mean:.1f}" cy="4" r="3"/>'
    return f'<svg class="bar" viewBox="-4 0 108 8" aria-hidden="true"><path d="M0 4H100"/>{spread}{dot}</svg>'


def _score(row: Row) -> str:
    mean, low, high = (row[f"score_points_{part}"] for part in ("mean", "low", "high"))
    return number(mean) + ("" if math.isnan(low) else f" ± {number((high - low) / 2)}")


def _name(row: Row) -> str:
    return element("b", text(row["method"]), {})


def _breakable(name: str) -> str:
    """HTML of a name that a narrow column breaks at its joints."""
    return name.replace("@", "@<wbr>").replace("_", "_<wbr>")


def _plain(value: object) -> str:
    return element("td", text(value), {"data-v": str(value)})


def _number(value: float, *, digits: int = 1, kind: str = "") -> str:
    return element("td", number(value, digits=digits), {"data-v": _value(value), "class": f"num {kind}".strip()})


def _value(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"
