"""What the best of one kind of method is worth beside the best of another, such as codes beside eviction.

Kinds. A board file names them: label of a kind to the methods that are of it, the first being what the others are set
against. At a budget a kind has its cells of that budget that are complete and within their bytes, and those of methods
without a budget that hold no more bytes than the budget allows.

Choice. A kind's best is chosen by the mean of task means, apart for NLL and for score, on half of each task's contexts,
and counts on the other half, and the other way round: so no method is chosen on the samples that it is then compared
on, which would favour kinds of many methods. Halves may choose two methods.

Gain. Per sample, positive where the kind is better than the first one, on the samples that both have, mean of task
means, with the 95 % interval of any paired difference (`leaderboards.stats.bootstrap`), which takes the two choices as
given. Verdicts are those of `leaderboards.stats.subject`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import Array, Mask
from leaderboards.stats.comparable import NOT_GIVEN, budget_order, is_of_given
from leaderboards.stats.eligible import contexts
from leaderboards.stats.grid import Grid
from leaderboards.stats.stored import is_stored, share
from leaderboards.stats.subject import SIGNS, verdict_of

Frontiers = Mapping[str, Sequence[str]]
"""Kind to the labels of its methods; the others are set against the first."""
COLUMNS = ["budget", "measure", "kind", "chosen", "tasks", "n", "percent", "mean", "against", "gain", "low", "high"]
COLUMNS += ["verdict"]


def compare_kinds(grid: Grid, frontiers: Frontiers) -> pd.DataFrame:
    """One row per budget, measure and kind that has a method there, columns as `COLUMNS`; percent is of full bytes."""
    rows, halves = list[dict[str, Any]](), _halves(grid)
    first = next(iter(frontiers), "")
    for budget in sorted({budget for _, budget in grid.cells if is_of_given(budget)}, key=budget_order):
        kinds = {kind: own for kind, labels in frontiers.items() if (own := list(_cells(grid, budget, labels)))}
        for measure in SIGNS:
            best = {kind: _chosen(grid, own, measure, halves) for kind, own in kinds.items()}
            other = _joined(grid, best[first], measure, halves) if first in best else None
            for kind, chosen in best.items():
                row = {"budget": budget, "measure": measure, "kind": kind, "against": "" if kind == first else first}
                rows.append(row | _row(grid, chosen, measure, halves, None if kind == first else other))
    return pd.DataFrame(rows, columns=COLUMNS)


def _halves(grid: Grid) -> tuple[Mask, Mask]:
    """Samples [S] of every other context of each task, and the rest."""
    even = np.zeros(len(grid.samples), dtype=bool)
    for rows in grid.bootstrap.rows.values():
        even[rows] = grid.bootstrap.clusters(rows) % 2 == 0
    return even, ~even


def _cells(grid: Grid, budget: str, labels: Sequence[str]) -> Iterator[CellKey]:
    """The cells of a kind that hold no more than a budget allows."""
    asked = next(grid.values(cell, "asked_bytes") for cell in grid.cells if cell[1] == budget)
    for cell in ((label, size) for label in labels for size in (budget, *NOT_GIVEN)):
        if cell in grid.cells and grid.complete(cell) and not grid.over_budget(cell):
            held = _held(grid, cell)
            both = ~np.isnan(asked - held)
            if cell[1] == budget or held[both].sum() <= asked[both].sum():
                yield cell


def _held(grid: Grid, cell: CellKey) -> Array:
    return grid.values(cell, "stored_bytes" if is_stored(grid) else "kv_bytes")


def _chosen(grid: Grid, cells: Sequence[CellKey], measure: str, halves: Sequence[Mask]) -> list[CellKey | None]:
    """The best cell of a kind by each half of the samples, of equal ones the first; None where none has a value."""
    found = list[CellKey | None]()
    for half in halves:
        means = {c: grid.bootstrap.mean(np.where(half, grid.values(c, measure), np.nan)) for c in cells}
        known = [c for c in cells if not math.isnan(means[c])]
        found.append(max(known, key=lambda c: SIGNS[measure] * means[c]) if known else None)
    return found


def _joined(grid: Grid, chosen: Sequence[CellKey | None], what: str, halves: Sequence[Mask]) -> Array:
    """[S]: on each half the value of what the other half chose."""
    values = np.full(len(grid.samples), np.nan)
    for cell, half in zip(reversed(chosen), halves, strict=True):
        if cell is not None:
            own = _held(grid, cell) if what == "held" else grid.values(cell, what)
            values[half] = own[half]
    return values


def _row(
    grid: Grid, chosen: Sequence[CellKey | None], measure: str, halves: Sequence[Mask], other: Array | None
) -> dict[str, Any]:
    own = _joined(grid, chosen, measure, halves)
    there = ~np.isnan(own)
    held, full = (_joined(grid, chosen, what, halves)[there] for what in ("held", "full_bytes"))
    row = {
        "chosen": ", ".join(dict.fromkeys(label for label, _ in filter(None, chosen))),
        "tasks": len(grid.bootstrap.present(own)),
        "n": int(there.sum()),
        "percent": 100 * share(held, full),
        "mean": grid.bootstrap.mean(own),
    }
    if other is None:
        return {**row, "gain": math.nan, "low": math.nan, "high": math.nan, "verdict": ""}
    gains = SIGNS[measure] * (own - other)
    gain = grid.bootstrap.estimate(gains)
    fewest = min((contexts(grid, rows) for rows in grid.bootstrap.present(gains).values()), default=0)
    verdict = verdict_of(gain.low, gain.high, fewest)
    return {**row, "gain": gain.mean, "low": gain.low, "high": gain.high, "verdict": verdict}
