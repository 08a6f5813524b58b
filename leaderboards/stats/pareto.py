"""Which cells of a measured table are on a Pareto front: of score against KV bytes, and of score against TPOT.

A cell is off the front when another one surely costs no more and is told better: the interval of their paired
difference in score lies above 0. It is on the front, `*`, when it is told better than every cell that may cost no
more; the cheapest one is, whatever its score. Every other cell is `=`.

Costs are compared on the samples that both cells have. Bytes are exact, so their mean decides. A cell's TPOT surely is
no more when the whole interval of the paired difference is at most 0, and may be unless the whole interval is above 0.

Where a table ranks nothing by score (`leaderboards.stats.eligible`) no cell is told better, and there are no marks.

A cell that lacks samples, or measurements where TPOT counts, puts no other off and is never `*`; one without any has no
mark. One with simulated memory has none either and puts no other off: no such memory was held. Like the other marks
these are 95 % per comparison, and `=` is no proof of equality.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.grid import Grid
from leaderboards.stats.stored import is_stored

FRONTS = {"front_bytes": "kv_bytes", "front_tpot": "tpot_s"}
"""Column of the table to the cost. Bytes are stored ones where every record knows them."""
EXACT = ("kv_bytes", "stored_bytes")
"""Costs without noise."""
WHOLE = 99.9
"""Percent of the full cache above which a method without a budget is a line in a picture of bytes, and else a point."""


def fronts(grid: Grid) -> dict[CellKey, dict[str, str]]:
    """`*`, `=` or nothing for every cell, by the columns of `FRONTS`."""
    costs = FRONTS | ({"front_bytes": "stored_bytes"} if is_stored(grid) else {})
    marks = {name: _front(grid, cost) for name, cost in costs.items()}
    return {cell: {name: own.get(cell, "") for name, own in marks.items()} for cell in grid.cells}


def is_measured(rows: pd.DataFrame) -> bool:
    """Whether the rows of a table have the columns of measured cells."""
    return "n_measured" in rows


def _front(grid: Grid, cost: str) -> dict[CellKey, str]:
    known = {cell: np.count_nonzero(~np.isnan(grid.values(cell, cost))) for cell in grid.cells}
    here = [cell for cell in grid.cells if grid.memory(cell) == "physical" and grid.counts(cell)["ok"] and known[cell]]
    whole = {cell for cell in here if grid.complete(cell) and known[cell] == grid.counts(cell)["ok"]}
    few = {cell for cell in here if grid.few(cell)}

    def told_better(one: CellKey, other: CellKey) -> bool:
        return not few & {one, other} and grid.estimate(one, "score", minus=other).low > 0

    off: set[CellKey] = set()
    doubtful = set(here) - whole
    pairs = list(permutations(here, 2))
    if cost not in EXACT:
        grid.prepare((other, cost, cell) for cell, other in pairs)
    cheaper = {pair: costs for pair in pairs if (costs := _costs_no_more(grid, pair[1], pair[0], cost))[1]}
    grid.prepare((a, "score", b) for pair in cheaper for a, b in (pair, pair[::-1]))
    for (cell, other), (surely, _) in cheaper.items():
        if surely and other in whole and told_better(other, cell):
            off.add(cell)
        elif not told_better(cell, other):
            doubtful.add(cell)
    return {cell: "=" if cell in doubtful else "*" for cell in here if cell not in off}


def _costs_no_more(grid: Grid, cell: CellKey, other: CellKey, cost: str) -> tuple[bool, bool]:
    """Whether `cell` surely costs no more than `other`, and whether it may."""
    if cost in EXACT:
        mean = grid.bootstrap.mean(grid.values(cell, cost) - grid.values(other, cost))
        return mean <= 0, not mean > 0  # not: without common samples nothing is known
    paired = grid.estimate(cell, cost, minus=other)
    return paired.high <= 0, not paired.low > 0


def running_best(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) points that no other one matches at most its cost and at least its score, by cost."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best
