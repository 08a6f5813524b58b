"""One picture of a board: score and answer loss against measured cache bytes, a line per method, with intervals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from harness.errors import HarnessError
from harness.store import write_text
from leaderboards.aggregate import Table
from leaderboards.axes import FULL
from leaderboards.render import heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

MARKERS = "osD^vPX*<>hd"
COLORS, LINES = 10, ("-", ":", "-.")  # matplotlib has 10 colours; the next 10 methods are told by their lines
PANELS = (("score_points", "score (0-100), higher is better"), ("nll_nats", "answer NLL (nats/token), lower is better"))


def write_picture(tables: list[Table], out_dir: Path, name: str) -> Path:
    """Write `<name>.svg` of the first table into `out_dir` and return its path.

    The same table gives the same bytes. Raises HarnessError when there is no table or the file cannot be written.
    """
    if not tables:
        raise HarnessError("there is no table to draw; run a benchmark first")
    table = tables[0]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(heading(table), fontsize=10)
    for panel, (column, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw(panel, table.rows, column)
        panel.set(xlabel="KV bytes, % of the full cache (measured)", ylabel=label)
        panel.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    path = Path(out_dir) / f"{name}.svg"
    write_text(path, text.getvalue())
    return path


def _draw(panel: Axes, rows: DataFrame, column: str) -> None:
    for i, (method, cells) in enumerate(rows[rows["budget"] != FULL].groupby("method")):
        cells = cells.sort_values("kv_percent_of_full")
        mean = cells[f"{column}_mean"]
        spread = [mean - cells[f"{column}_low"], cells[f"{column}_high"] - mean]
        style = {
            "marker": MARKERS[(i + i // COLORS) % len(MARKERS)],
            "ls": LINES[i // COLORS % len(LINES)],
            "ms": 5,
            "lw": 1.2,
            "capsize": 2,
            "elinewidth": 0.7,
        }
        panel.errorbar(cells["kv_percent_of_full"], mean, yerr=spread, label=str(method), **style)  # type: ignore[arg-type]
    for _, full in rows[rows["budget"] == FULL].iterrows():
        panel.axhline(full[f"{column}_mean"], color="black", lw=1, ls="--", label=str(full["method"]))
