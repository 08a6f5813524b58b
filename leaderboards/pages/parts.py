"""Parts of a page below its ranking: charts, needle heat maps, the best of each task, and the board's other tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd

from leaderboards.pages.charts import Chart, charts, keys
from leaderboards.pages.html import element, frame_table, text, text_table
from leaderboards.pages.samples import Heat
from leaderboards.stats.aggregate import Table
from leaderboards.stats.comparable import FULL
from leaderboards.stats.subject import frames
from leaderboards.stats.summaries import BANDS
from leaderboards.tables.board import sections
from leaderboards.text import clean, number

SHADES = 10


def best_by_task(table: Table) -> str:
    """The highest mean of every task at every budget, beside that of the uncompressed cache; nothing without scores.

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
    return f'<div class="scroll lines">{text_table(heads, cells, caption=caption)}</div>' if cells else ""


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


def _share(rows: Sequence[Mapping[Any, Any]], budget: str) -> str:
    """The most bytes that a cell of this budget took."""
    shares = [row["kv_percent_of_full"] for row in rows if row["budget"] == budget]
    known = [share for share in shares if not isnan(share)]
    return f", {number(max(known))} % of bytes" if known else ""


def rivals(table: Table) -> str:
    """The subject against the strongest other method of each family; nothing without a subject."""
    return _folded(frames(table.rivals), opened=True)


def others(table: Table) -> str:
    """What else the board says, closed: score by task, ranks, tails and the averages that suites report."""
    told = frames(table.rivals)
    return _folded({title: frame for title, frame in sections(table).items() if title not in told}, opened=False)


def _folded(tables: Mapping[str, pd.DataFrame], *, opened: bool) -> str:
    """Each table of text under its title; with `opened` the first one is open."""
    filled = {title: frame for title, frame in tables.items() if len(frame)}
    return "".join(
        f"<details{' open' if opened and i == 0 else ''}><summary>{text(title)}</summary>"
        f'<div class="scroll lines">{frame_table(frame, title)}</div></details>'
        for i, (title, frame) in enumerate(filled.items())
    )


def chart_list(table: Table, *, salt: str) -> str:
    """The charts with their keys; nothing without scores."""
    figures = "".join(_figure(chart) for chart in charts(table, salt=salt))
    return f'<div class="charts">{keys(table)}{figures}</div>' if figures else ""


def _figure(chart: Chart) -> str:
    values = text_table(chart.columns, chart.values, caption=chart.title)
    return (
        f'<figure><h4>{text(chart.title)}</h4>{chart.svg}<p class="readout" aria-live="polite"></p>'
        f"<figcaption>{text(chart.about, longest=600)}</figcaption><details>"
        f'<summary>Values</summary><div class="scroll">{values}</div>'
        "</details></figure>"
    )


def heat_list(maps: Sequence[Heat]) -> str:
    """The maps by family and budget, in sections of which the last budget of each family is open."""
    parts = []
    places = list(dict.fromkeys((heat.family, heat.budget) for heat in maps))
    last = dict(places)
    for family, budget in places:
        own = [heat for heat in maps if (heat.family, heat.budget) == (family, budget)]
        opened = " open" if last[family] == budget else ""
        grids = "".join(_grid(heat) for heat in own)
        title = f"{'NIAH' if family == 'niah' else 'RULER needles'}, budget {budget}"
        parts.append(f'<details{opened}><summary>{text(title)}</summary><div class="heats">{grids}</div></details>')
    return "".join(parts)


def _grid(heat: Heat) -> str:
    head = "".join(f"<th scope=col>{band}</th>" for band in BANDS)
    rows = []
    for length, values, counts in zip(heat.lengths, heat.values, heat.counts, strict=True):
        boxes = "".join(
            "<td>–</td>"
            if isnan(value)
            else f'<td class="h{int(value // (100 / SHADES))}" title="{n} samples">{number(value, digits=0)}</td>'
            for value, n in zip(values, counts, strict=True)
        )
        rows.append(f"<tr><th scope=row>{length}</th>{boxes}</tr>")
    caption = element("caption", text(heat.method), {})
    return f'<table class="heat">{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
