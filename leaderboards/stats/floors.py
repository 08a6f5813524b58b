"""The smallest cache that keeps a share of the full cache's score: of every method in every task family.

A method's curve in a family goes through its budgets, ascending in measured bytes, and ends at the full cache: at each
the mean over tasks of its scores over that of the full cache, on the samples that all of them have. The smallest cache
for a floor is where the curve first reaches it, between two budgets by interpolation over the logarithm of the bytes.
Every redraw of contexts has a curve of its own; the interval is that of where they reach the floor. What lies beyond
the largest budget was not measured, and what the smallest budget reaches may need less: only that is told then.
Tasks where the full cache has fewer than `LOWEST` points, of which a share says nothing, are left out. There is no
interval where contexts have no names, or are too few.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import MIN_PAIRS, Array, Drawn, Request, percentiles
from leaderboards.stats.comparable import FULL
from leaderboards.stats.eligible import LOWEST
from leaderboards.stats.grid import Grid
from leaderboards.stats.stored import is_stored

FLOORS = (95, 99)
"""Percent of the full cache's score."""
REFERENCE: CellKey = ("fullkv", FULL)
COLUMNS = ["method", "family", "floor", "percent", "low", "high", "smallest", "largest", "tasks", "n"]


def floors(grid: Grid) -> pd.DataFrame:
    """One row per method, family and floor, with `COLUMNS`.

    percent: bytes of the full cache's, with the interval low to high, NaN where there is none. smallest, largest: those
    of the budgets at the ends of the curve. Empty without `fullkv`.
    """
    rows = list(_rows(grid)) if REFERENCE in grid.cells else []
    return pd.DataFrame(rows, columns=COLUMNS)


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
        for family, where in _families(grid, cells).items():
            values = np.column_stack([grid.values(cell, "score") for cell in (*cells, REFERENCE)])
            (drawn,) = grid.bootstrap.joint([Request(where, tuple(range(len(cells) + 1)), values)])
            full = dict(zip(drawn.tasks, drawn.observed[:, -1].tolist(), strict=True))
            drawn = drawn.of([task for task, points in full.items() if points >= LOWEST])
            if not drawn.tasks:
                continue
            sizes = np.log([*(_share(grid, cell, where) for cell in cells), 1.0])
            named = not grid.unnamed(np.where(where, 0.0, np.nan))
            for floor in FLOORS:
                found = _row(drawn, sizes, floor / 100, named=named)
                yield {"method": method, "family": family, "floor": floor, **found, "n": int(where.sum())}


def _row(drawn: Drawn, sizes: Array, floor: float, *, named: bool) -> dict[str, object]:
    order = np.argsort(sizes[:-1], kind="stable")
    order = np.append(order, len(order))
    observed, redrawn = (_shares(means)[..., order] for means in (drawn.observed, drawn.redrawn))
    sizes = sizes[order]
    sure = named and drawn.clusters.sum() >= MIN_PAIRS and drawn.clusters.min() >= 2
    low, high = percentiles(reached(redrawn, sizes, floor)) if sure else (np.nan, np.nan)
    logs = {"percent": reached(observed[None], sizes, floor)[0], "low": low, "high": high}
    logs |= {"smallest": sizes[0], "largest": sizes[-2]}
    return {**{name: 100 * float(np.exp(x)) for name, x in logs.items()}, "tasks": len(drawn.tasks)}


def _shares(means: Array) -> Array:
    """Of the last member's mean over tasks: [T, ..., K] -> [..., K]; 1 where that is 0."""
    whole = means.mean(axis=0)
    full = whole[..., -1:]
    return np.asarray(np.divide(whole, full, out=np.ones_like(whole), where=full > 0))


def _curves(grid: Grid) -> dict[str, list[CellKey]]:
    """The cells of each method that have a budget."""
    found = defaultdict[str, list[CellKey]](list)
    for cell in grid.cells:
        if cell[1] != FULL:
            found[cell[0]].append(cell)
    return found


def _families(grid: Grid, cells: Sequence[CellKey]) -> dict[str, np.ndarray]:
    """[S] of each family: its samples that all cells and the full cache have."""
    here = np.all([~np.isnan(grid.values(cell, "score")) for cell in (*cells, REFERENCE)], axis=0)
    names = np.array([task.partition("/")[0] for task, _ in grid.samples])
    return {name: own for name in dict.fromkeys(names.tolist()) if (own := here & (names == name)).any()}


def _share(grid: Grid, cell: CellKey, where: np.ndarray) -> float:
    """Bytes of the full cache's, on all samples together; stored ones where every record knows them."""
    own = grid.values(cell, "stored_bytes" if is_stored(grid) else "kv_bytes")
    return float(own[where].sum() / grid.values(cell, "full_bytes")[where].sum())
