"""Long outputs: how much longer answers get on a compressed cache, how many come to an end, and what they cost.

Only tasks whose records have the metric `ended` count, on the samples that the cell and the full cache both have.

Inflation is the number of tokens generated over that of the full cache: in each task the ratio of the means, over tasks
their geometric mean, so that half and double cancel out. A mean of each prompt's ratio would weigh most the prompts on
which the full cache ends early; tokens, which are what is waited for, weigh alike here. An answer without a token
counts as one. Cost is the same ratio of `byte_steps`: stored bytes, summed over the tokens. Intervals redraw contexts;
there is none where those have no names, or are too few.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import MIN_PAIRS, Array, Mask, Request, percentiles
from leaderboards.stats.eligible import REFERENCE
from leaderboards.stats.grid import Grid

MEANS = {"ended": "metrics.ended", "until": "score", "right": "metrics.right", "stored_bytes_end": "stored_bytes_end"}
"""Column to what it is the mean of task means of."""
RATIOS = {"inflation": "tokens", "cost": "byte_steps"}
"""Column to what it is the ratio of."""
COLUMNS = ["budget", "method", *(f"{name}_{part}" for name in RATIOS for part in ("mean", "low", "high")), *MEANS, "n"]


def lengths(grid: Grid, order: Sequence[CellKey]) -> pd.DataFrame:
    """One row per cell, in order, with `COLUMNS`; none without `fullkv`, or where no task tells whether answers ended.

    Ratios are to the full cache, NaN where unknown. ended, until, right: percent. n: samples.
    """
    rows = list(_rows(grid, order)) if REFERENCE in grid.cells else []
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(grid: Grid, order: Sequence[CellKey]) -> Iterator[Mapping[str, object]]:
    for cell in order:
        ended = np.column_stack([grid.values(one, "metrics.ended") for one in (cell, REFERENCE)])
        where: Mask = np.asarray(~np.isnan(ended).any(axis=1))
        if not where.any():
            continue
        own = {name: np.where(where, grid.values(cell, what), np.nan) for name, what in MEANS.items()}
        ratios = [_ratio(grid, cell, where, name, what) for name, what in RATIOS.items()]
        means = {name: grid.bootstrap.mean(values) for name, values in own.items()}
        yield {"budget": cell[1], "method": cell[0]} | ratios[0] | ratios[1] | means | {"n": int(where.sum())}


def _ratio(grid: Grid, cell: CellKey, where: Mask, name: str, what: str) -> dict[str, float]:
    values = np.column_stack([np.maximum(grid.values(one, what), 1) for one in (cell, REFERENCE)])  # NaN stays
    parts = [f"{name}_{part}" for part in ("mean", "low", "high")]
    if np.isnan(values[where]).any():
        return dict.fromkeys(parts, np.nan)
    (drawn,) = grid.bootstrap.joint([Request(where, (0, 1), values)])
    named = not grid.unnamed(np.where(where, 0.0, np.nan))
    sure = named and drawn.clusters.sum() >= MIN_PAIRS and drawn.clusters.min() >= 2
    ends = percentiles(_log_ratio(drawn.redrawn)) if sure and cell != REFERENCE else (np.nan, np.nan)
    logs = (float(_log_ratio(drawn.observed)), *ends)
    return dict(zip(parts, np.exp(logs).tolist(), strict=True))


def _log_ratio(means: Array) -> Array:
    """Of means [T, ..., 2]: the mean over tasks of the logarithm of the first over the second."""
    return np.asarray((np.log(means[..., 0]) - np.log(means[..., 1])).mean(axis=0))
