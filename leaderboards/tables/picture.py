"""One picture of a board: score and answer loss against measured cache bytes, a line per method, with intervals.

Where it was measured, a second row: the same against the bytes that a decoded token reads.

A hollow marker is a mean over other samples than those beside it; it is on no front.

A table with measured cells has the Pareto fronts too, and a panel of score against TPOT.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.errors import HarnessError
from harness.records.run_folder import write_text
from leaderboards.stats.aggregate import Table
from leaderboards.stats.comparable import FULL
from leaderboards.stats.pareto import WHOLE, is_measured, running_best
from leaderboards.stats.reads import READ, is_read
from leaderboards.stats.stored import percent_column, words
from leaderboards.tables.board import heading
from leaderboards.tables.sections import LACKS
from leaderboards.tables.verdicts import has_other_samples
from leaderboards.text import clean

KEY_CHARS = 60
"""Characters of a label in a picture."""
MARKERS = "osD^vPX*<>hd"
COLORS, LINES = 10, ("-", ":", "-.")  # matplotlib has 10 colours; the next 10 methods are told by their lines
LOOK: dict[str, Any] = {"ms": 5, "lw": 1.2, "capsize": 2, "elinewidth": 0.7}


class Panel(NamedTuple):
    """A column of the table over another one. front: column of its marks. full_line: uncompressed cells as lines."""

    y: str
    ylabel: str
    x: str = "kv_percent_of_full"
    xlabel: str = "KV bytes, % of the full cache (measured)"
    scale: float = 1
    front: str = ""
    full_line: bool = True


SCORE = Panel("score_points", "score (0-100), higher is better")
PANELS = (SCORE, Panel("nll_nats", "answer NLL (nats/token), lower is better"))
TPOT = SCORE._replace(x="tpot_s_mean", xlabel="TPOT, ms (measured)", scale=1000, front="front_tpot", full_line=False)
READING = "bytes read per decoded token, % of full (measured)"
READ_PANELS = tuple(panel._replace(x=READ, xlabel=READING) for panel in PANELS)
MEASURED_PANELS = (SCORE._replace(front="front_bytes"), *PANELS[1:], TPOT)


def write_picture(tables: list[Table], out_dir: Path, name: str) -> Path:
    """Write `<name>.svg` of the first table into `out_dir` and return its path.

    The same table gives the same bytes. Raises HarnessError when there is no table or the file cannot be written.
    """
    if not tables:
        raise HarnessError("there is no table to draw; run a benchmark first")
    table = tables[0]
    panels = [_of_bytes(panel, table.rows) for panel in (MEASURED_PANELS if is_measured(table.rows) else PANELS)]
    grid = [panels, READ_PANELS] if is_read(table.rows) else [panels]
    text = io.StringIO()
    with plain_text({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.5 * len(panels), 4.6 * len(grid)), layout="constrained")
        figure.suptitle(heading(table), fontsize=10)
        for row, of in zip(figure.subplots(len(grid), len(panels), squeeze=False), grid, strict=True):
            for axes, panel in zip_longest(row, of):
                _panel(axes, table.rows, panel)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.savefig(text, format="svg", metadata={"Date": None})
    path = Path(out_dir) / f"{name}.svg"
    write_text(path, text.getvalue())
    return path


@contextmanager
def plain_text(settings: dict[Any, Any]) -> Iterator[None]:
    """Draw with these settings, and every text as it is: a dollar sign is one, and no letter is too rare for a font."""
    with mpl.rc_context({"text.parse_math": False, "text.usetex": False, **settings}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        warnings.filterwarnings("ignore", message="constrained_layout not applied", category=UserWarning)
        yield


def key_text(label: object) -> str:
    """A label for the key of a picture, which leaves out what is empty or begins with an underscore."""
    text = clean(label, longest=KEY_CHARS)
    return f" {text}" if text.startswith("_") else text or "(no name)"


def _of_bytes(panel: Panel, rows: pd.DataFrame) -> Panel:
    """The panel over stored bytes, where the rows have them and it is of bytes."""
    if panel.x != SCORE.x:
        return panel
    return panel._replace(x=percent_column(rows), xlabel=f"{words(rows)}, % of the full cache (measured)")


def _panel(axes: Axes, rows: pd.DataFrame, panel: Panel | None) -> None:
    """Draw one panel, or none where there is nothing to draw."""
    if panel is None:
        axes.set_axis_off()
        return
    _draw(axes, rows, panel)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.grid(alpha=0.3)


def _draw(axes: Axes, rows: pd.DataFrame, panel: Panel) -> None:
    x, y = rows[panel.x] * panel.scale, rows[f"{panel.y}_mean"]
    lacking = pd.Series([has_other_samples(row) for row in rows.to_dict("records")], index=rows.index)
    for i, (method, cells) in enumerate(rows[rows["budget"] != FULL].groupby("method")):
        cells = cells.sort_values(panel.x)
        mean = cells[f"{panel.y}_mean"]
        ends = (mean - cells[f"{panel.y}_low"], cells[f"{panel.y}_high"] - mean)
        spread = [end.clip(lower=0) for end in ends]  # intervals are rounded, means are not
        turn = i // COLORS
        marker, line = MARKERS[(i + turn) % len(MARKERS)], LINES[turn % len(LINES)]
        drawn = axes.errorbar(x[cells.index], mean, yerr=spread, label=key_text(method), marker=marker, ls=line, **LOOK)
        color = drawn.lines[0].get_color()
        if (fewer := lacking[cells.index]).any():  # hollow: its mean is over other samples
            at = cells.index[fewer]
            axes.plot(x[at], mean[at], color=color, marker=marker, mfc="white", ms=5, ls="", zorder=3)
    for row in rows[rows["budget"] == FULL].to_dict("records"):
        mean, label = row[f"{panel.y}_mean"], key_text(row["method"]) + (LACKS if has_other_samples(row) else "")
        if panel.full_line and row[panel.x] > WHOLE:
            axes.axhline(mean, color="black", lw=1, ls="--", label=label)
        else:
            axes.plot(row[panel.x] * panel.scale, mean, color="black", marker="_", ms=9, ls="", label=label)
    if panel.front:
        on = (rows[panel.front] != "") & ~lacking
        best = pd.DataFrame(running_best(list(zip(x[on], y[on], strict=True))), columns=["cost", "score"])
        axes.step(best.cost, best.score, where="post", color="0.4", lw=3, alpha=0.35, label="front of the means")
