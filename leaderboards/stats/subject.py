"""Is one method, the subject, better than the strongest other method of each task family?

Rivals. Every method with a budget and another name before its `@` that is complete at that budget and within its bytes.
The strongest has the best mean of task means in the family, per budget and apart for NLL and for score. It is chosen on
the samples that it is then compared on, which favours it.

Gain. Per sample, positive where the subject is better, in nats per token or points (0-100), on the samples that both
have; the mean of task means. Loss. NLL minus NLL of `fullkv`, on the samples that all three have, averaged the same
way; ratio: the subject's loss by the rival's, where the latter is above 0.

Intervals. Percentile task bootstrap, 95 % a row: the tasks of a family are redrawn with replacement, and in each drawn
task, each time that it is drawn, its clusters of samples. So the interval speaks of other tasks like these. It is too
narrow with few, by about sqrt(1 - 1/tasks); a family of one has the level of samples only. None below `MIN_PAIRS`
clusters in the family or with a task of one. For all families, the mean of their gains, the families are fixed.

Verdict. `better` only where the whole interval is above 0, `worse` where it is below 0, else `not told apart`. A
subject over budget or incomplete is not judged, nor one with fewer than `CONTEXTS` named contexts in a task of the
family (`leaderboards.stats.eligible`), and that is said.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import MIN_PAIRS, Array, Counts, Indexes, draw_counts, drawn_sums, percentiles, seeded
from leaderboards.stats.comparable import FULL, NOT_GIVEN, budget_order
from leaderboards.stats.eligible import CONTEXTS, contexts
from leaderboards.stats.grid import Grid

FAMILIES: Mapping[str, str] = {
    "ruler/niah_single_*": "needles",
    "niah/*": "needles",
    "ruler/niah_multikey_*": "multi-key",
    "ruler/niah_multivalue": "multi-key",
    "ruler/niah_multiquery": "multi-key",
    "ruler/vt": "tracking",
}
"""Pattern of task names to family, the first that fits; else it is the task's name before its last `/`.

Families are listed in this order, the others behind them.
"""
ALL = "all families"
OWN = "strongest of each"
"""What stands for the rival of `ALL`."""

SIGNS: Mapping[str, float] = {"nll": -1.0, "score": 1.0}
"""Measure to the sign of subject minus rival."""

COLUMNS = [
    *("subject", "budget", "family", "tasks", "n", "measure", "rival", "subject_mean", "rival_mean"),
    *("gain", "low", "high", "subject_loss", "rival_loss", "loss_ratio", "verdict"),
]


class _Comparison(NamedTuple):
    """The subject and its strongest rival. draws: [resamples], the gain in each; None where it has no interval.

    contexts: the fewest of its tasks; 0 where one does not name them.
    """

    rival: str
    tasks: int
    n: int
    subject_mean: float
    rival_mean: float = math.nan
    gain: float = math.nan
    subject_loss: float = math.nan
    rival_loss: float = math.nan
    draws: Array | None = None
    contexts: int = 0


def verdict_of(low: float, high: float, contexts: int) -> str:
    """What an interval of a gain says, of which the task with the fewest has so many contexts."""
    if contexts < CONTEXTS:
        return "too few contexts"
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def family_of(task: str) -> str:
    """The family that a task is counted in."""
    named = next((family for pattern, family in FAMILIES.items() if fnmatchcase(task, pattern)), "")
    return named or task.rpartition("/")[0] or task


def bare_name(label: str) -> str:
    """The method that a label names: `compilerkv` of `compilerkv@window[beta=2]`."""
    return re.split(r"[@\[]", label, maxsplit=1)[0]


def compare(grid: Grid, subject: str | None) -> pd.DataFrame:
    """One row per budget, measure and family of the subject, columns as `COLUMNS`; empty without a subject.

    A family for which there is no rival has a row that says so.
    """
    rows = []
    own = [cell for cell in grid.cells if cell[0] == subject and cell[1] not in NOT_GIVEN]
    for cell in sorted(own, key=lambda c: budget_order(c[1])):
        unfair = "over budget" if grid.over_budget(cell) else "" if grid.complete(cell) else "incomplete"
        for measure in SIGNS:
            found = dict(_families(grid, cell, measure))
            if known := [comparison for comparison in found.values() if comparison.rival]:
                found[ALL] = _all(known)
            for family, comparison in found.items():
                row = {"subject": cell[0], "budget": cell[1], "family": family, "measure": measure}
                rows.append({**row, **_row(comparison, unfair)})
    return pd.DataFrame(rows, columns=COLUMNS)


def _families(grid: Grid, cell: CellKey, measure: str) -> Iterator[tuple[str, _Comparison]]:
    """The families where the subject has values, each with its strongest rival."""
    own, families = grid.values(cell, measure), dict[str, list[str]]()
    for task in grid.bootstrap.present(own):
        families.setdefault(family_of(task), []).append(task)
    others = [c for c in grid.cells if c[1] == cell[1] and bare_name(c[0]) != bare_name(cell[0])]
    rivals = [c for c in others if grid.complete(c) and not grid.over_budget(c)]
    order = list(dict.fromkeys(FAMILIES.values()))
    for family in sorted(families, key=lambda f: (order.index(f) if f in order else len(order), f)):
        tasks = families[family]
        masked = {c: np.where(np.isnan(own), np.nan, grid.values(c, measure)) for c in rivals}
        means = {c: SIGNS[measure] * grid.bootstrap.mean(values, tasks) for c, values in masked.items()}
        ranked = sorted((-mean, c) for c, mean in means.items() if not math.isnan(mean))
        if ranked:
            rival = ranked[0][1]  # of equal means the first label
            yield family, _comparison(grid, cell, rival, measure, tasks=tasks, family=family)
        else:
            n = sum(rows.size for rows in grid.bootstrap.present(own, tasks).values())
            yield family, _Comparison("", len(tasks), n, grid.bootstrap.mean(own, tasks))


def _comparison(
    grid: Grid, cell: CellKey, rival: CellKey, measure: str, *, tasks: Sequence[str], family: str
) -> _Comparison:
    own, other = (grid.values(c, measure) for c in (cell, rival))
    difference = SIGNS[measure] * (own - other)
    both, mean = ~np.isnan(difference), partial(grid.bootstrap.mean, tasks=tasks)
    full, unknown = ("fullkv", FULL), np.full(own.shape, np.nan)
    base = grid.values(full, measure) if measure == "nll" and full in grid.cells else unknown
    base = np.where(both, base, np.nan)
    paired = grid.bootstrap.present(difference, tasks)
    return _Comparison(
        rival=rival[0],
        tasks=len(paired),
        n=sum(rows.size for rows in paired.values()),
        subject_mean=mean(np.where(both, own, np.nan)),
        rival_mean=mean(np.where(both, other, np.nan)),
        gain=mean(difference),
        subject_loss=mean(own - base),
        rival_loss=mean(other - base),
        draws=_redraw(grid, difference, paired, family),
        contexts=min((contexts(grid, rows) for rows in paired.values()), default=0),
    )


def _all(parts: Sequence[_Comparison]) -> _Comparison:
    """The mean of the families, which weigh the same; their draws are independent of each other."""
    draws = [part.draws for part in parts if part.draws is not None]
    names = ("subject_mean", "rival_mean", "gain", "subject_loss", "rival_loss")
    means = {name: float(np.mean([getattr(part, name) for part in parts])) for name in names}
    tasks, n = (sum(counts) for counts in zip(*((part.tasks, part.n) for part in parts), strict=True))
    drawn, fewest = np.mean(draws, axis=0) if len(draws) == len(parts) else None, min(part.contexts for part in parts)
    return _Comparison(OWN, tasks, n, **means, draws=drawn, contexts=fewest)


def _row(c: _Comparison, unfair: str) -> dict[str, Any]:
    low, high = (math.nan, math.nan) if c.draws is None else percentiles(c.draws)
    ratio = c.subject_loss / c.rival_loss if c.rival_loss > 0 else math.nan
    verdict = unfair or verdict_of(low, high, c.contexts) if c.rival else "no rival"
    return {**c._asdict(), "low": low, "high": high, "loss_ratio": ratio, "verdict": verdict}


@lru_cache(maxsize=16)
def _draws(seed: int, family: str, counts: tuple[int, ...], resamples: int) -> tuple[Indexes, list[Counts]]:
    """[R, T], the tasks drawn, and of each task, for each time it is drawn, how often each of its clusters is.

    counts: [T], the number of clusters of each task.
    """
    generator = seeded(seed, family)
    drawn = generator.integers(len(counts), size=(resamples, len(counts)))
    times = np.bincount(drawn.ravel(), minlength=len(counts))
    return drawn, [draw_counts(generator, n, int(often)) for n, often in zip(counts, times, strict=True)]


def _redraw(grid: Grid, values: Array, tasks: Mapping[str, Indexes], family: str) -> Array | None:
    """[resamples]: the mean of as many redrawn tasks as there are, each of its redrawn clusters."""
    clusters = [grid.bootstrap.cluster_sums(values, rows) for rows in tasks.values()]
    counts = tuple(map(len, clusters))
    if sum(counts) < MIN_PAIRS or min(counts) < 2:
        return None
    drawn, often = _draws(grid.bootstrap.seed, family, counts, grid.bootstrap.resamples)
    means = np.empty(drawn.shape)
    for t, own in enumerate(clusters):
        sizes, sums = drawn_sums(often[t], own).T
        means[drawn == t] = sums / sizes
    return np.asarray(means.mean(axis=1))
