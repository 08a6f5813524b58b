"""The charts of a page: score against bytes stored, bytes read and TPOT, and by budget, with intervals.

Their values stand beside them as tables.

Drawn by matplotlib, without a script: they are there without one, print well, and their text cannot become markup.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from leaderboards.pages.svg import FRONT, GRID, INK, INKS, SERIES, inline
from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.bootstrap import LEVEL
from leaderboards.stats.comparable import FULL, NOT_GIVEN
from leaderboards.stats.pareto import WHOLE, is_measured, running_best
from leaderboards.stats.reads import READ, is_read
from leaderboards.stats.stored import STORED, percent_column
from leaderboards.stats.stored import words as words_of
from leaderboards.tables.picture import LINES, MARKERS, plain_text
from leaderboards.tables.sections import LACKS
from leaderboards.tables.verdicts import has_other_samples
from leaderboards.text import clean, number

SIZE = (4.4, 3.3)  # inches: as an SVG about as wide as a phone, so that its text is not scaled down there
RC: dict[Any, Any] = {"font.size": 9, "axes.linewidth": 0.7}
RC |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
LOOK: dict[str, Any] = {"ms": 4.5, "lw": 1.2, "elinewidth": 0.8}
DASHES = {"-": "", ":": "2 2", "-.": "6 2 2 2"}
"""Line of a series to the dashes of its key."""


class Chart(NamedTuple):
    """title and about: words. svg: the element. table: the same as a frame of text."""

    title: str
    about: str
    svg: Markup
    table: pd.DataFrame


class Series(NamedTuple):
    """A method's key. ink: class of its colour; dashes: of its line, empty for a solid one; corners: its marker's."""

    method: str
    ink: str
    dashes: str
    corners: str


class ChartList(NamedTuple):
    """The charts of one table and the keys of their methods."""

    series: Sequence[Series]
    charts: Sequence[Chart]


class Cost(NamedTuple):
    """What a chart has on its x axis. front: column of the marks of its Pareto front, empty for all fair cells."""

    title: str
    column: str
    label: str
    unit: str
    scale: float = 1
    front: str = ""


BYTES = Cost("Score against cache bytes", "kv_percent_of_full", "KV bytes, % of the full cache (measured)", "KV %")
TPOT = Cost("Score against time per token", "tpot_s_mean", "TPOT, ms (measured)", "TPOT ms", 1000, "front_tpot")
READING = Cost(
    "Score against bytes read per decoded token", READ, "bytes read per decoded token, % of the full cache", "read %"
)
SCORE_COLUMNS = ("score", "low", "high")


def bytes_cost(table: Table) -> Cost:
    """The bytes that a table is drawn against: stored ones where it has them."""
    column = percent_column(table.rows)
    if column == BYTES.column:
        return BYTES
    label = f"{words_of(table.rows)}, % of the full cache (measured)"
    return BYTES._replace(title="Score against stored cache bytes", column=column, label=label, unit="stored %")


def methods_of(table: Table) -> list[str]:
    """Methods that do not keep everything, in the order of their colours."""
    return sorted(set(table.rows["method"][table.rows["budget"] != FULL]))


def charts(table: Table, *, salt: str) -> ChartList | None:
    """Score against bytes, against bytes read and TPOT where those were measured, and by budget; None without scores.

    salt: begins the ids of these charts on the page.
    """
    scored = [row for row in table.rows.to_dict("records") if row["n_ok"]]
    if not any(row["budget"] != FULL for row in scored):
        return None
    with plain_text(RC):
        found = [_against(table, scored, bytes_cost(table), salt=f"{salt}-bytes")]
        if is_read(table.rows):
            found.append(_against(table, scored, READING, salt=f"{salt}-read"))
        found.append(_by_budget(table, scored, salt=f"{salt}-budget"))
        if is_measured(table.rows) and any(row["n_measured"] for row in scored):
            timed = [row for row in scored if row["n_measured"]]
            found.append(_against(table, timed, TPOT, salt=f"{salt}-tpot"))
    return ChartList([_key_of(i, method) for i, method in enumerate(methods_of(table))], found)


def _key_of(i: int, method: str) -> Series:
    color, marker, dash = _style(i)
    shape = MarkerStyle(marker)
    path = shape.get_path().transformed(shape.get_transform())
    corners = " ".join(f"{14 + 8 * x:.1f},{8 - 8 * y:.1f}" for x, y in np.asarray(path.to_polygons()[0]))
    return Series(method, INKS[color], DASHES[dash], corners)


def _style(i: int) -> tuple[str, str, str]:
    """Colour, marker and line of the i-th method."""
    turn = i // len(SERIES)
    return SERIES[i % len(SERIES)], MARKERS[(i + turn) % len(MARKERS)], LINES[turn % len(LINES)]


def _against(table: Table, rows: Sequence[TableRow], cost: Cost, *, salt: str) -> Chart:
    rows = [row for row in rows if not math.isnan(row[cost.column])]
    figure, axes = _figure()
    said: dict[str, list[str]] = {}
    for i, method in enumerate(methods_of(table)):
        own = sorted((r for r in rows if r["method"] == method and r["budget"] != FULL), key=lambda r: r[cost.column])
        said |= _series(axes, i, own, [cost.scale * row[cost.column] for row in own], line=cost.column != TPOT.column)
    _full(axes, rows, cost)
    _front(axes, rows, cost)
    costs = [cost.scale * row[cost.column] for row in rows if row["budget"] != FULL]
    if costs and max(costs) - min(costs) < 0.05 * max(costs):  # a range that would look wide and is not
        axes.set_xlim(left=0)
    axes.set_xlabel(cost.label)
    about = (
        f"One point per method and budget with its {LEVEL:.0%} interval; up and to the left is better. The broad step "
        "is the Pareto front of the means. The line or dash in the colour of the text is the uncompressed cache."
    )
    values = [(*_key(row), number(cost.scale * row[cost.column], digits=2), *_score(row)) for row in rows]
    frame = pd.DataFrame(values, columns=["method", "budget", cost.unit, *SCORE_COLUMNS])
    return Chart(cost.title, about, inline(figure, salt=salt, title=cost.title, about=about, points=said), frame)


def _by_budget(table: Table, rows: Sequence[TableRow], *, salt: str) -> Chart:
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["budget"] not in NOT_GIVEN))
    methods = methods_of(table)
    figure, axes = _figure()
    said: dict[str, list[str]] = {}
    for i, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method and row["budget"] not in NOT_GIVEN]
        aside = 0.5 * (i - (len(methods) - 1) / 2) / len(methods)
        said |= _series(axes, i, own, [budgets.index(row["budget"]) + aside for row in own], line=True)
    _full(axes, rows, bytes_cost(table))
    axes.set_xlabel("budget as asked: tokens, or a fraction")
    axes.set_xticks(range(len(budgets)), [clean(budget) for budget in budgets])
    title = "Score by budget"
    about = (
        f"A line per method with {LEVEL:.0%} intervals, moved a little aside so that none hides another. The "
        "dashed line is the uncompressed cache."
    )
    frame = pd.DataFrame([(*_key(row), *_score(row)) for row in rows], columns=["method", "budget", *SCORE_COLUMNS])
    return Chart(title, about, inline(figure, salt=salt, title=title, about=about, points=said), frame)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, lw=0.5, alpha=0.5)
    axes.set_ylabel("score (0-100)")
    return figure, axes


def _series(axes: Axes, i: int, rows: Sequence[TableRow], x: Sequence[float], *, line: bool) -> dict[str, list[str]]:
    """Draw a method's points; the gid of its line to the words of each point."""
    if not rows:
        return {}
    color, marker, dash = _style(i)
    mean, low, high = (np.array([row[f"score_points_{part}"] for row in rows]) for part in ("mean", "low", "high"))
    yerr = [(mean - low).clip(min=0), (high - mean).clip(min=0)]  # intervals are rounded, means are not
    drawn = axes.errorbar(x, mean, yerr=yerr, color=color, marker=marker, ls=dash if line else "", **LOOK)
    if fewer := [j for j, row in enumerate(rows) if has_other_samples(row)]:
        hollow = {"mfc": "white", "ms": LOOK["ms"], "ls": "", "gid": f"series-{i}-hollow"}
        axes.plot([x[j] for j in fewer], mean[fewer], color=color, marker=marker, **hollow)
    drawn.lines[0].set_gid(f"series-{i}")
    for bars in drawn.lines[2]:
        bars.set_gid(f"series-{i}-bars")
    return {f"series-{i}": [words(row) for row in rows]}


def words(row: TableRow) -> str:
    """A cell in words: method, budget, score with its interval, share of the bytes, bytes read and TPOT if measured."""
    mean, low, high = _score(row)
    spread = "" if low == "-" else f" ({low} to {high})"
    timed = row.get("tpot_s_mean", math.nan)
    what, column = ("stored", STORED) if STORED in row else ("KV", BYTES.column)
    kept = f"{what} {number(row[column])} %"
    read = row.get(READ, math.nan)
    kept += "" if math.isnan(read) else f", reads {number(read)} %"
    tpot = "" if math.isnan(timed) else f", TPOT {1000 * timed:.2f} ms"
    method, budget = _key(row)
    return f"{method} at {budget}: score {mean}{spread}, {kept}{tpot}"


def _full(axes: Axes, rows: Sequence[TableRow], cost: Cost) -> None:
    for row in [row for row in rows if row["budget"] == FULL]:
        if cost.column != TPOT.column and row[cost.column] > WHOLE:
            axes.axhline(row["score_points_mean"], color=INK, lw=1, ls="--")
        else:
            axes.plot(cost.scale * row[cost.column], row["score_points_mean"], color=INK, marker="_", ms=10, ls="")


def _front(axes: Axes, rows: Sequence[TableRow], cost: Cost) -> None:
    """The staircase over the cells on the front; without marks, over the physical ones within their bytes.

    None of them lacks samples.
    """
    alike = [row for row in rows if not has_other_samples(row)]
    fair = [row for row in alike if row["budget"] != FULL and row.get("memory", "physical") == "physical"]
    fair = [row for row in fair if not row["n_over_budget"]]
    on = [row for row in alike if row[cost.front]] if cost.front else fair
    best = running_best([(cost.scale * row[cost.column], row["score_points_mean"]) for row in on])
    if best:
        x, y = zip(*best, strict=True)
        axes.step(x, y, where="post", color=FRONT, lw=4, alpha=0.4, zorder=1)


def _key(row: TableRow) -> tuple[str, str]:
    return clean(row["method"]) + (LACKS if has_other_samples(row) else ""), clean(row["budget"])


def _score(row: TableRow) -> tuple[str, str, str]:
    mean, low, high = (number(row[f"score_points_{part}"]) for part in ("mean", "low", "high"))
    return mean, low, high
