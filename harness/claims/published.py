"""A paired difference of the records of a published board, as the boards compute theirs.

Its tasks are those that could rank (`leaderboards.stats.eligible`): what the full cache cannot solve tells no methods
apart. Clusters are contexts; where a task has fewer than a rank asks for, the number is shown and nothing is concluded.
"""

from functools import cache

import numpy as np

from harness.boards.sources import KEPT, collect
from harness.claims.claim import Found, Records
from harness.records.board_record import board_records
from leaderboards.stats.bootstrap import RESAMPLES, SEED, Array, Indexes
from leaderboards.stats.comparable import one_per_key, split_by_axes
from leaderboards.stats.eligible import CONTEXTS, contexts, eligible
from leaderboards.stats.grid import Grid


def contrast(check: Records) -> Found:
    """The mean over tasks of `first` less `share` of `second`; why there is none, where the board lacks one of them."""
    if not (KEPT / check.board).is_dir():
        return Found(why=f"no records of board {check.board} are published here")
    having = [grid for grid in grids(check.board) if {check.first, check.second} <= grid.cells.keys()]
    if not having:
        cells = " and ".join(f"{method} at {budget}" for method, budget in (check.first, check.second))
        return Found(why=f"board {check.board} has no table with {cells}")
    parts = [_difference(grid, check) for grid in having]
    grid, difference, tasks = max(parts, key=lambda part: sum(rows.size for rows in part[2].values()))
    if not tasks:
        return Found(why="no task that could rank has both")
    told = grid.bootstrap.estimate(difference, weights=dict.fromkeys(tasks, 1.0))
    fewest, task = min((contexts(grid, rows), task) for task, rows in tasks.items())
    why = f"{task} names {fewest} contexts, {CONTEXTS} are needed" if fewest < CONTEXTS else ""
    return Found(told.mean, told.low, told.high, told.n, why)


def _difference(grid: Grid, check: Records) -> tuple[Grid, Array, dict[str, Indexes]]:
    """The grid, the difference of each of its samples, and the tasks that count with their samples."""
    first, second = (grid.values(cell, check.measure) for cell in (check.first, check.second))
    difference = np.round(first - check.share * second, 9)
    chosen = [task for task in eligible(grid, check.measure).tasks if task.startswith(check.tasks)]
    return grid, difference, grid.bootstrap.present(difference, chosen)


@cache
def grids(board: str) -> tuple[Grid, ...]:
    """The tables of a published board."""
    sources = collect([KEPT / board])
    split = split_by_axes(board_records(sources.records), manifests=sources.manifests)
    chosen = (one_per_key(records, manifests=sources.manifests).records for records in split.values())
    return tuple(Grid(records, seed=SEED, resamples=RESAMPLES) for records in chosen)
