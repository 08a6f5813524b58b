"""What a mean hides: samples that the compression broke, and the samples that it answers worst.

Broken. Right is a score of at least half of its maximum, so 50 of 100; wrong is less. `broken_percent` is the share of
wrong answers among the samples that `fullkv` answers right and both have: mean over the tasks that have such samples,
with the interval of every mean (`leaderboards.stats.bootstrap`). `n_broken` of `broken_percent_n` counts the samples.
Where none or all are broken the redraws do not differ, so the interval has no width: read the counts.

Worst decile. In each task the ceil(n / 10) samples with the highest NLL, of the n that have one; of equal NLL the first
by sample id. `nll_worst` is the mean over tasks of their mean NLL: the conditional value at risk of a task at 90 %
(Rockafellar and Uryasev, "Optimization of Conditional Value-at-Risk", Journal of Risk 2, 2000), for a whole number of
samples. `nll_worst_vs_fullkv` is NLL less that of `fullkv`, averaged the same way over those of them that `fullkv` has
too. The samples are chosen by the cell's own NLL, which favours `fullkv`; they differ from cell to cell.
"""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import NOTHING, Array, Estimate
from leaderboards.stats.comparable import FULL
from leaderboards.stats.grid import Grid

RIGHT = 50.0
"""Points, 0-100, from which on an answer is right."""
PARTS = 10
"""One sample of so many is in the tail, and one at least."""
REFERENCE: CellKey = ("fullkv", FULL)


def tail_columns(grid: Grid) -> dict[CellKey, dict[str, Any]]:
    """Columns of every cell's row, NaN where there is none.

    `broken_percent` with `_mean _low _high _n`, and `n_broken`; `nll_worst_nats_mean` (per token) and `_n`;
    `nll_worst_nats_vs_fullkv_mean` and `_n`. Nothing is compared without `fullkv`, nor that with itself.
    """
    others = [cell for cell in grid.cells if REFERENCE in grid.cells and cell != REFERENCE]
    broken = dict(zip(others, grid.bootstrap.estimates(_broken(grid, cell) for cell in others), strict=True))
    return {cell: {**_columns(grid, cell, broken.get(cell)), **_worst(grid, cell)} for cell in grid.cells}


def _broken(grid: Grid, cell: CellKey) -> Array:
    """[S]: of the samples that fullkv answers right 100 where the cell is wrong, else 0; NaN for the others."""
    own = grid.values(cell, "score")
    of = (grid.values(REFERENCE, "score") >= RIGHT) & ~np.isnan(own)  # NaN is not right
    return np.where(of, 100.0 * (own < RIGHT), np.nan)


def _columns(grid: Grid, cell: CellKey, estimate: Estimate | None) -> dict[str, Any]:
    wrong = math.nan if estimate is None else float((_broken(grid, cell) > 0).sum())
    parts = asdict(estimate or NOTHING)
    return {**{f"broken_percent_{part}": value for part, value in parts.items()}, "n_broken": wrong}


def _worst(grid: Grid, cell: CellKey) -> dict[str, Any]:
    own = grid.values(cell, "nll")
    chosen = [worst(own, rows) for rows in grid.bootstrap.rows.values()]
    columns = dict(zip(("nll_worst_nats_mean", "nll_worst_nats_n"), _mean(own, chosen), strict=True))
    alone = REFERENCE not in grid.cells or cell == REFERENCE
    loss = np.full(own.shape, np.nan) if alone else own - grid.values(REFERENCE, "nll")
    names = ("nll_worst_nats_vs_fullkv_mean", "nll_worst_nats_vs_fullkv_n")
    return {**columns, **dict(zip(names, _mean(loss, chosen), strict=True))}


def worst(values: Array, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The tenth of the rows with the highest values [S], rounded up, of those that have one; ties by order."""
    here = rows[~np.isnan(values[rows])]
    order = np.argsort(-values[here], kind="stable")
    return here[order[: math.ceil(here.size / PARTS)]]


def _mean(values: Array, parts: list[npt.NDArray[np.intp]]) -> tuple[float, int]:
    """Mean of the means of the parts of values [S], and of how many values; NaN where there is none."""
    found = [values[rows][~np.isnan(values[rows])] for rows in parts]
    found = [part for part in found if part.size]
    return (float(np.mean([part.mean() for part in found])) if found else math.nan), sum(part.size for part in found)


def is_known(rows: pd.DataFrame) -> bool:
    """Whether the rows of a table have something to say about tails."""
    return bool(rows["broken_percent_n"].any() or rows["nll_worst_nats_n"].any())
