"""The closed division: who is smallest, and who fastest, of those that are told to lose next to nothing.

Of every family and floor, and of all tasks, only rows compete whose share of the full cache's score is told to be at
least the floor: the lower end of its 95 % interval is. A row whose whole interval is below the floor is out; one whose
interval straddles it is not told, nor is one that lacks samples, one of simulated memory, which holds no such bytes, or
any where a task has fewer than `CONTEXTS` named contexts. Shares, tasks and redraws are those of
`leaderboards.stats.floors`.

What redraws cannot show. A method that lost nothing in N contexts has no spread, and may yet lose one in N / 4: as
often as 1 - .025^(1/N), by the exact binomial bound. The lower end of the interval is as far below the share as that
and the redraws' own distance together, as a root of squares. It is the exact bound where nothing was lost, and close to
it where some was, where percentiles alone are too narrow (`tests/leaderboards/stats/test_closed.py`). N counts contexts
that the full cache answers, of the task with the fewest, times the tasks: 95 % cannot be told with fewer than 72, nor
99 % with fewer than 368.

Places. By bytes at the end of decoding: stored ones where every record has them, else live ones. Rows within 1 % of
each other share a place. By time per output token, where rows were timed: a row is behind those that are surely faster,
by the paired interval. Nobody is ahead by noise.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import OVER, CellKey
from leaderboards.stats.bootstrap import LEVEL, Mask, percentiles
from leaderboards.stats.comparable import budget_order, is_of_reading
from leaderboards.stats.eligible import CONTEXTS, REFERENCE
from leaderboards.stats.floors import ALL, FLOORS, Kept, families, kept_shares
from leaderboards.stats.grid import Grid
from leaderboards.stats.stored import at_end

UNNAMED = "contexts have no names"
COLUMNS = [
    *("family", "floor", "state", "why", "place_low", "place_high", "method", "budget", "kept", "low", "high"),
    *("bytes", "what", "percent", "tpot_s", "time_low", "time_high", "tasks", "n", "contexts"),
]


def closed(grid: Grid) -> pd.DataFrame:
    """One row per family, floor and cell other than the full cache; with `COLUMNS`. Empty without `fullkv`.

    state: `in`, `not told` or `out`, with `why` where that is no matter of the interval. kept, low, high: percent of
    the full cache's score. bytes: mean over samples, of the kind `what`; percent: of the full cache's. place, time:
    ends of the place by bytes and by time per output token, NaN for rows that are not in. contexts: the fewest of a
    task.
    """
    if REFERENCE not in grid.cells:
        return pd.DataFrame(columns=COLUMNS)
    full = ~np.isnan(grid.values(REFERENCE, "score"))
    found = families(grid, full)
    if len(found) > 1:
        found[ALL] = full
    return pd.DataFrame([row for name, where in found.items() for row in _rows(grid, name, where)], columns=COLUMNS)


def unseen(contexts: float) -> float:
    """How often contexts may be lost, as a share, of which none was in so many."""
    return 1 - float(((1 - LEVEL) / 2) ** (1 / contexts))


def ends(kept: Kept, i: int) -> tuple[float, float]:
    """The interval of the i-th member's share; NaN where there is none."""
    if not kept.sure:
        return math.nan, math.nan
    low, high = percentiles(kept.redrawn[:, i])
    answered = len(kept.clusters) * float(kept.clusters.min()) * kept.full / 100
    share = float(kept.observed[i])
    return share - math.hypot(share - low, unseen(answered)), high


def state_of(low: float, high: float, floor: float) -> str:
    """Whether an interval is above the floor, below it, or neither."""
    return "in" if low >= floor else "out" if high < floor else "not told"


def _rows(grid: Grid, family: str, where: Mask) -> Iterator[dict[str, Any]]:
    held = {cell for cell in grid.cells if not is_of_reading(cell[1])}
    cells = sorted(held - {REFERENCE}, key=lambda cell: (cell[0], budget_order(cell[1])))
    whole = [cell for cell in cells if not np.isnan(grid.values(cell, "score")[where]).any()]
    kept = kept_shares(grid, whole, where)
    if kept is None:
        return
    least = int(kept.clusters.min()) if kept.named else 0
    few = f"{least} contexts in a task, {CONTEXTS} are needed" if least < CONTEXTS else ""
    few = few if kept.named else UNNAMED
    what = at_end(grid)
    full = grid.values(REFERENCE, what)[where].sum()
    about = {"family": family, "what": what, "tasks": len(kept.clusters), "n": int(where.sum()), "contexts": least}
    for floor in FLOORS:
        rows = [{**about, "floor": floor, "method": method, "budget": budget} for method, budget in cells]
        for cell, row in zip(cells, rows, strict=True):
            row |= {"state": "not told", "why": few or "lacks samples"}
            if cell in whole:
                i = whole.index(cell)
                low, high = ends(kept, i)
                simulated = "simulated memory" if grid.memory(cell) == "simulated" else ""
                row["why"] = few or simulated
                row["state"] = "not told" if row["why"] else state_of(low, high, floor / 100)
                size = grid.values(cell, what)[where]
                row |= {"kept": 100 * kept.observed[i], "low": 100 * low, "high": 100 * high}
                row |= {"bytes": size.mean(), "percent": 100 * size.sum() / full if full else math.nan}
        inside = [cell for cell, row in zip(cells, rows, strict=True) if row["state"] == "in"]
        places, times = _by_bytes(grid, inside, what, where), _by_time(grid, inside, where)
        yield from (row | places.get(cell, {}) | times.get(cell, {}) for cell, row in zip(cells, rows, strict=True))


def _by_bytes(grid: Grid, cells: Sequence[CellKey], what: str, where: Mask) -> Mapping[CellKey, dict[str, float]]:
    sizes = np.array([grid.values(cell, what)[where].mean() for cell in cells])
    smaller = sizes[:, None] * OVER < sizes  # [K, K], whether the first is
    return _places(cells, smaller, "place")


def _by_time(grid: Grid, cells: Sequence[CellKey], where: Mask) -> Mapping[CellKey, dict[str, float]]:
    """Of the cells that were timed on some of the samples in `where` [S]."""
    times = {cell: np.where(where, grid.values(cell, "tpot_s"), np.nan) for cell in cells}
    timed = [cell for cell, own in times.items() if not np.isnan(own).all()]
    pairs = [times[one] - times[other] for one in timed for other in timed]
    faster = np.array([paired.high < 0 for paired in grid.bootstrap.estimates(pairs)], dtype=bool).reshape(
        len(timed), len(timed)
    )
    found = _places(timed, faster, "time")
    return {cell: {**found[cell], "tpot_s": float(np.nanmean(times[cell]))} for cell in timed}


def _places(cells: Sequence[CellKey], ahead: Mask, name: str) -> dict[CellKey, dict[str, float]]:
    """The places of K cells. ahead: [K, K], whether the first surely is ahead of the second."""
    return {
        cell: {f"{name}_low": 1.0 + ahead[:, i].sum(), f"{name}_high": float(len(cells) - ahead[i].sum())}
        for i, cell in enumerate(cells)
    }
