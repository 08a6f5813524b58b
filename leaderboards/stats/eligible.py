"""Which tasks of a table rank its methods, and why none does where none does.

Contexts. A rank says that other texts would give the same order, so its unit is the text that a prompt was drawn from,
`meta.group`. Every task that ranks needs `CONTEXTS` of them among its scored samples. Where a sample does not name its
text, nobody knows how many there are: the task counts as having one. One task with too few, and the table ranks
nothing by that measure: means and intervals stay.

Left out. By score a task ranks when the full cache has `LOWEST` points or more, and some method with a budget is above
its own noise there: its mean less two standard errors, over contexts, is above 0. Neither asks how methods differ, so
leaving a task out favours no claim. By NLL a task ranks when the full cache has an NLL there. Without `fullkv` nothing
is left out, for nothing could be checked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import Indexes
from leaderboards.stats.comparable import FULL, NOT_GIVEN
from leaderboards.stats.grid import Grid

CONTEXTS = 20
"""Contexts in a task below which nothing is ranked."""
LOWEST = 20.0
"""Points of the full cache, 0-100, below which a task ranks nothing."""
REFERENCE: CellKey = ("fullkv", FULL)


@dataclass(frozen=True)
class Eligible:
    """What ranks by one measure. tasks: in order; why: why nothing is ranked, empty where something is.

    left_out: task and why; checked: whether there is a full cache to leave tasks out by.
    """

    tasks: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    why: str
    checked: bool


def eligible(grid: Grid, measure: str) -> Eligible:
    """The tasks that rank by a measure, `score` or `nll`."""
    limited = [cell for cell in grid.cells if cell[1] not in NOT_GIVEN]
    scored = np.zeros(len(grid.samples), dtype=bool)
    for cell in limited:
        scored |= ~np.isnan(grid.values(cell, measure))
    present = {task: rows[scored[rows]] for task, rows in grid.bootstrap.rows.items() if scored[rows].any()}
    checked = REFERENCE in grid.cells
    reasons = {task: _why_not(grid, limited, measure, rows) if checked else "" for task, rows in present.items()}
    tasks = tuple(task for task, reason in reasons.items() if not reason)
    why = _too_few({task: contexts(grid, present[task]) for task in tasks})
    left_out = tuple((task, reason) for task, reason in reasons.items() if reason)
    return Eligible(tasks, left_out, why or ("" if tasks else "no task is left that could"), checked)


def contexts(grid: Grid, rows: Indexes) -> int:
    """How many texts these samples of one task are known to be drawn from; 0 where some do not name theirs."""
    groups = {grid.groups[i] for i in rows}
    return 0 if None in groups else len(groups)


def _why_not(grid: Grid, limited: Sequence[CellKey], measure: str, rows: Indexes) -> str:
    """Why the task of these samples ranks nothing; empty when it ranks."""
    full = grid.values(REFERENCE, measure)[rows]
    if np.isnan(full).all():
        return "the full cache has none"
    mean = float(np.nanmean(full))
    if measure == "score" and mean < LOWEST:
        return f"the full cache has {mean:.1f} points"
    above = measure != "score" or any(_above_noise(grid, cell, rows) for cell in limited)
    return "" if above else "no method is above its own noise"


def _above_noise(grid: Grid, cell: CellKey, rows: Indexes) -> bool:
    """Whether the cell's mean score is more than two standard errors above 0; so too where there is no error."""
    values = grid.values(cell, "score")
    here = rows[~np.isnan(values[rows])]
    if not here.size:
        return False
    mean, error = float(values[here].mean()), grid.bootstrap.noise(values, here)
    return mean > (0.0 if math.isnan(error) else 2 * error)


def _too_few(found: dict[str, int]) -> str:
    """The task with the fewest contexts, where those are too few, and how many others have too few."""
    few = sorted((n, task) for task, n in found.items() if n < CONTEXTS)
    if not few:
        return ""
    n, task = few[0]
    more = f" (and {len(few) - 1} more tasks have too few)" if few[2:] else " (and so has another)" if few[1:] else ""
    has = f"has {n} context{'s' if n > 1 else ''}" if n else "does not name its contexts, which count as one"
    return f"{task} {has}, {CONTEXTS} are needed{more}"
