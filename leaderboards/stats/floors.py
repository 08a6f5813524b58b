"""The smallest cache that keeps a share of the full cache's score: of every method in every task family.

A method's curve in a family goes through its budgets, ascending in measured bytes, and ends at the full cache: at each
the mean over tasks of its scores over that of the full cache, on the samples that all of them have. The smallest cache
for a floor is where the curve first reaches it, between two budgets by interpolation over the logarithm of the bytes.
Every redraw of contexts has a curve of its own; the interval is that of where they reach the floor. What lies beyond
the largest budget was not measured, and what the smallest budget reaches may need less: only that is told then.
Tasks where the full cache has fewer than `LOWEST` points, of which a share says nothing, are left out. There is no
interval where contexts have no names, or are too few. `graded` is several families, by the first word of its tasks.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from harness.records.spec import AS
from leaderboards.stats.bootstrap import MIN_PAIRS, Array, Mask, Request, percentiles
from leaderboards.stats.comparable import NOT_GIVEN, is_of_reading
from leaderboards.stats.eligible import LOWEST, REFERENCE
from leaderboards.stats.grid import Grid
from leaderboards.stats.stored import is_stored, share

FLOORS = (95, 99)
"""Percent of the full cache's score."""
ALL = "all tasks"
"""What stands for a family where there are several."""
COLUMNS = ["method", "family", "floor", "percent", "low", "high", "smallest", "largest", "tasks", "n"]


class Kept(NamedTuple):
    """Shares of the full cache's mean over T tasks: observed [K + 1], redrawn [R, K + 1]; the last is its own, 1.

    full: that mean, points. clusters: [T]. named: whether their contexts have names.
    """

    observed: Array
    redrawn: Array
    full: float
    clusters: Array
    named: bool

    @property
    def sure(self) -> bool:
        """Whether there are enough contexts for an interval."""
        return bool(self.named and self.clusters.sum() >= MIN_PAIRS and self.clusters.min() >= 2)


def floors(grid: Grid) -> pd.DataFrame:
    """One row per method, family and floor, with `COLUMNS`.

    percent: bytes of the full cache's, with the interval low to high, NaN where there is none. smallest, largest: those
    of the budgets at the ends of the curve. Empty without `fullkv`.
    """
    rows = list(_rows(grid)) if REFERENCE in grid.cells else []
    return pd.DataFrame(rows, columns=COLUMNS)


def family_of(task: str) -> str:
    """The family that a task is counted in: `ruler`, or `graded/tracking` of `graded/tracking_moves`."""
    family, _, name = task.partition("/")
    return f"{family}/{name.partition('_')[0]}" if family == "graded" else family


def families(grid: Grid, here: Mask) -> dict[str, Mask]:
    """[S] of each family: its samples in `here` [S]; a family that has none is left out."""
    names = np.array([family_of(task) for task, _ in grid.samples])
    return {name: own for name in dict.fromkeys(names.tolist()) if (own := here & (names == name)).any()}


def kept_shares(grid: Grid, cells: Sequence[CellKey], where: Mask) -> Kept | None:
    """Of cells that have the samples of `where` [S], as the full cache has; None where no task says anything."""
    values = np.column_stack([grid.values(cell, "score") for cell in (*cells, REFERENCE)])
    (drawn,) = grid.bootstrap.joint([Request(where, tuple(range(len(cells) + 1)), values)])
    full = dict(zip(drawn.tasks, drawn.observed[:, -1].tolist(), strict=True))
    drawn = drawn.of([task for task, points in full.items() if points >= LOWEST])
    if not drawn.tasks:
        return None
    named = not grid.unnamed(np.where(where, 0.0, np.nan))
    mean = float(drawn.observed[:, -1].mean())
    return Kept(_shares(drawn.observed), _shares(drawn.redrawn), mean, drawn.clusters, named)


def reached(shares: Array, sizes: Array, floor: float) -> Array:
    """[R]: log size where each curve first has the floor. shares: [R, B + 1], ending at 1; sizes: [B + 1], of logs."""
    first = (shares >= floor).argmax(axis=1)
    before = np.maximum(first - 1, 0)
    rows = np.arange(len(shares))
    low, high = shares[rows, before], shares[rows, first]
    way = np.divide(floor - low, high - low, out=np.ones_like(low), where=high > low)
    return np.asarray(sizes[before] + np.where(first > 0, way, 1.0) * (sizes[first] - sizes[before]))


def _rows(grid: Grid) -> Iterator[dict[str, object]]:
    for method, cells in _curves(grid).items():
        here = np.all([~np.isnan(grid.values(cell, "score")) for cell in (*cells, REFERENCE)], axis=0)
        for family, where in families(grid, here).items():
            kept = kept_shares(grid, cells, where)
            if kept is None:
                continue
            shares = [*(_share(grid, cell, where) for cell in cells), 1.0]
            if not min(shares) > 0:  # NaN too: nothing was held, or nothing is said of the full cache
                continue
            sizes = np.log(shares)
            for floor in FLOORS:
                found = _row(kept, sizes, floor / 100)
                yield {"method": method, "family": family, "floor": floor, **found, "n": int(where.sum())}


def _row(kept: Kept, sizes: Array, floor: float) -> dict[str, object]:
    order = np.argsort(sizes[:-1], kind="stable")
    order = np.append(order, len(order))
    observed, redrawn, sizes = kept.observed[order], kept.redrawn[:, order], sizes[order]
    low, high = percentiles(reached(redrawn, sizes, floor)) if kept.sure else (np.nan, np.nan)
    logs = {"percent": reached(observed[None], sizes, floor)[0], "low": low, "high": high}
    logs |= {"smallest": sizes[0], "largest": sizes[-2]}
    return {**{name: 100 * float(np.exp(x)) for name, x in logs.items()}, "tasks": len(kept.clusters)}


def _shares(means: Array) -> Array:
    """Of the last member's mean over tasks: [T, ..., K] -> [..., K]; 1 where that is 0."""
    whole = means.mean(axis=0)
    full = whole[..., -1:]
    return np.asarray(np.divide(whole, full, out=np.ones_like(whole), where=full > 1e-9))


def _curves(grid: Grid) -> dict[str, list[CellKey]]:
    """The cells of each method at budgets of what it holds: what another one kept differs from prompt to prompt."""
    found = defaultdict[str, list[CellKey]](list)
    for cell in grid.cells:
        if cell[1] not in NOT_GIVEN and not cell[1].startswith(AS) and not is_of_reading(cell[1]):
            found[cell[0]].append(cell)
    return found


def _share(grid: Grid, cell: CellKey, where: Mask) -> float:
    """Bytes of the full cache's, on all samples together; stored ones where every record knows them."""
    own = grid.values(cell, "stored_bytes" if is_stored(grid) else "kv_bytes")
    return share(own[where], grid.values(cell, "full_bytes")[where])
