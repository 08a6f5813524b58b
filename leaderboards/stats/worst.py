"""What a mean hides: samples that the compression broke, and the samples that it answers worst.

Broken. Right is a score of at least half of its maximum, so 50 of 100; wrong is less. `broken_percent` is the share of
wrong answers among the samples that `fullkv` answers right and both have: mean over the tasks that have such samples.
`n_broken` of `broken_percent_n` counts them. Where none or all are broken the interval has no width: read the counts.

Worst decile. In each task the ceil(n / 10) samples with the highest NLL, of the n that have one; of equal NLL the first
by sample id. `nll_worst` is the mean over tasks of their mean NLL: the conditional value at risk of a task at 90 %
(Rockafellar and Uryasev, "Optimization of Conditional Value-at-Risk", Journal of Risk 2, 2000), for a whole number of
samples. `nll_worst_vs_fullkv` is NLL less that of `fullkv`, averaged the same way over those of them that `fullkv` has
too. The samples are chosen by the cell's own NLL, which favours `fullkv`; they differ from cell to cell.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import NOTHING, Array, Indexes
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
    broken = {cell: _broken(grid, cell) for cell in others}
    estimates = dict(zip(others, grid.bootstrap.estimates(broken.values()), strict=True))
    columns = {}
    for cell in grid.cells:
        row = {f"broken_percent_{part}": x for part, x in estimates.get(cell, NOTHING)._asdict().items()}
        row["n_broken"] = float((broken[cell] > 0).sum()) if cell in broken else math.nan
        columns[cell] = row | _worst(grid, cell)
    return columns


def _broken(grid: Grid, cell: CellKey) -> Array:
    """[S]: of the samples that fullkv answers right 100 where the cell is wrong, else 0; NaN for the others."""
    own = grid.values(cell, "score")
    of = (grid.values(REFERENCE, "score") >= RIGHT) & ~np.isnan(own)  # NaN is not right
    return np.where(of, 100.0 * (own < RIGHT), np.nan)


def _worst(grid: Grid, cell: CellKey) -> dict[str, float]:
    own = grid.values(cell, "nll")
    chosen = [_worst_tenth(own, rows) for rows in grid.bootstrap.present(own).values()]
    alone = REFERENCE not in grid.cells or cell == REFERENCE
    loss = np.full(own.shape, np.nan) if alone else own - grid.values(REFERENCE, "nll")
    columns: dict[str, float] = {}
    for name, values in (("nll_worst_nats", own), ("nll_worst_nats_vs_fullkv", loss)):
        found = [part for rows in chosen if (part := values[rows][~np.isnan(values[rows])]).size]
        columns[f"{name}_mean"] = float(np.mean([part.mean() for part in found])) if found else math.nan
        columns[f"{name}_n"] = sum(part.size for part in found)
    return columns


def _worst_tenth(values: Array, rows: Indexes) -> Indexes:
    """The tenth of the rows with the highest values [S], rounded up; ties by order."""
    return rows[np.argsort(-values[rows], kind="stable")[: math.ceil(rows.size / PARTS)]]


def is_known(rows: pd.DataFrame) -> bool:
    """Whether the rows of a table have something to say about tails."""
    return bool(rows["broken_percent_n"].any() or rows["nll_worst_nats_n"].any())
