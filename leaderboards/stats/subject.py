"""Is one method, the subject, better than the strongest other method of each task family?

Families. `FAMILIES` names those that are not simply the task's name before its last `/`.

Rivals. Every method with a budget and another name before its `@` that is complete at that budget and within its bytes.
The strongest is the one with the best mean of task means in the family, per budget and apart for NLL and for score.
It is chosen on the same samples that it is then compared on, which favours the rival.

Gain. Per sample, positive where the subject is better: NLL of the rival minus NLL of the subject (nats per token) or
score of the subject minus score of the rival (points, 0-100). On the samples that both have; the mean of task means.
Loss. NLL minus NLL of `fullkv`, on the samples that all three have, averaged the same way; ratio: the subject's loss by
the rival's, where the latter is above 0.

Intervals. Percentile task bootstrap, 95 %, with the level, resamples and seed of `leaderboards.stats.bootstrap`: the
tasks of a family are redrawn with replacement, and in each drawn task, each time that it is drawn, its clusters of
samples (`meta.group`). So the interval speaks of other tasks like these, where that of `leaderboards.stats.bootstrap`
speaks of other samples of these tasks. With few tasks it is too narrow, by about sqrt(1 - 1/tasks); a family of one
task has the level of samples only. No interval below `MIN_PAIRS` clusters in the family or with a task of one cluster.

All families. The mean over families of their gains, each against its own strongest rival. Its interval redraws tasks
within families and clusters within tasks; the families are fixed. None where a family has none.

Verdict. `better` only where the whole interval is above 0, `worse` where it is below 0, else `not told apart`. That is
95 % per row, without a correction for the number of rows. A subject that is over budget or incomplete is not judged,
and its verdict says so.
"""

import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import LEVEL, MIN_PAIRS, Array, Counts, Kept, draw_counts, drawn_sums
from leaderboards.stats.comparable import FULL, budget_order
from leaderboards.stats.grid import Grid

FAMILIES: tuple[tuple[str, str], ...] = (
    ("ruler/niah_single_*", "needles"),
    ("niah/*", "needles"),
    ("ruler/niah_multikey_*", "multi-key"),
    ("ruler/niah_multivalue", "multi-key"),
    ("ruler/niah_multiquery", "multi-key"),
    ("ruler/vt", "tracking"),
)
"""Pattern of task names to family; the first that fits. Families are listed in this order, the others behind them."""
ALL = "all families"
OWN = "strongest of each"
"""What stands for the rival of `ALL`."""

SIGNS: Mapping[str, float] = {"nll": -1.0, "score": 1.0}
"""Measure to the sign of subject minus rival."""

COLUMNS = [
    *("subject", "budget", "family", "tasks", "n", "measure", "rival", "subject_mean", "rival_mean"),
    *("gain", "low", "high", "subject_loss", "rival_loss", "loss_ratio", "verdict"),
]

Tasks = dict[str, npt.NDArray[np.intp]]
"""Task to the indexes of its samples."""


@dataclass(frozen=True)
class SubjectComparison:
    """The subject and its strongest rival. draws: [resamples], the gain in each; None where it has no interval."""

    rival: str
    tasks: int
    n: int
    subject_mean: float
    rival_mean: float = math.nan
    gain: float = math.nan
    subject_loss: float = math.nan
    rival_loss: float = math.nan
    draws: Array | None = None


def family_of(task: str) -> str:
    """The family that a task is counted in."""
    named = next((family for pattern, family in FAMILIES if fnmatchcase(task, pattern)), "")
    return named or task.rpartition("/")[0] or task


def bare_name(label: str) -> str:
    """The method that a label names: `compilerkv` of `compilerkv@window[beta=2]`."""
    return re.split(r"[@\[]", label, maxsplit=1)[0]


class _Draws:
    """Redraws of the tasks of a family and of their clusters; those of equal numbers of clusters are the same."""

    def __init__(self, seed: int, resamples: int) -> None:
        self._seed, self._resamples, self._kept = seed, resamples, Kept()

    def of(self, family: str, counts: Sequence[int]) -> tuple[npt.NDArray[np.intp], list[Counts]]:
        """[R, T], the tasks drawn, and of each task, for each time it is drawn, how often each cluster is.

        counts: [T], the number of clusters of each task.
        """
        generator = np.random.default_rng([self._seed, zlib.crc32(family.encode())])
        drawn = generator.integers(len(counts), size=(self._resamples, len(counts)))
        times = np.bincount(drawn.ravel(), minlength=len(counts))
        key = (family, *counts)
        return drawn, self._kept.of(
            key, lambda: [draw_counts(generator, n, int(often)) for n, often in zip(counts, times, strict=True)]
        )


def compare(grid: Grid, subject: str | None, *, seed: int, resamples: int) -> pd.DataFrame:
    """One row per budget, measure and family of the subject, columns as `COLUMNS`; empty without a subject.

    A family for which there is no rival has a row that says so.
    """
    rows, draws = [], _Draws(seed, resamples)
    for cell in sorted((c for c in grid.cells if c[0] == subject and c[1] != FULL), key=lambda c: budget_order(c[1])):
        over, whole = grid.over_budget(cell), grid.complete(cell)
        unfair = "over budget" if over else "" if whole else "incomplete"
        for measure in SIGNS:
            found = dict(_families(grid, cell, measure, draws=draws))
            known = [comparison for comparison in found.values() if comparison.rival]
            for family, comparison in {**found, **({ALL: _all(known)} if known else {})}.items():
                row = {"subject": cell[0], "budget": cell[1], "family": family, "measure": measure}
                rows.append({**row, **_row(comparison, unfair)})
    return pd.DataFrame(rows, columns=COLUMNS)


def _families(grid: Grid, cell: CellKey, measure: str, *, draws: _Draws) -> Iterator[tuple[str, SubjectComparison]]:
    """The families where the subject has values, each with its strongest rival."""
    families: dict[str, Tasks] = {}
    for task, rows in grid.bootstrap.rows.items():
        families.setdefault(family_of(task), {})[task] = rows
    order = list(dict.fromkeys(family for _, family in FAMILIES))
    own = grid.values(cell, measure)
    rivals = _rivals(grid, cell)
    for family in sorted(families, key=lambda f: (order.index(f) if f in order else len(order), f)):
        tasks = families[family]
        present = _present(own, tasks)
        if not present:
            continue
        means = {c: _mean(np.where(np.isnan(own), np.nan, grid.values(c, measure)), tasks) for c in rivals}
        ranked = sorted((-SIGNS[measure] * mean, c) for c, mean in means.items() if not math.isnan(mean))
        if not ranked:
            n = sum(rows.size for rows in present.values())
            yield family, SubjectComparison("", len(present), n, _mean(own, tasks))
            continue
        pair = (cell, ranked[0][1])  # of equal means the first label
        yield family, _comparison(grid, pair, measure, tasks, family=family, draws=draws)


def _rivals(grid: Grid, cell: CellKey) -> list[CellKey]:
    others = [c for c in grid.cells if c[1] == cell[1] and bare_name(c[0]) != bare_name(cell[0])]
    return [c for c in others if grid.complete(c) and not grid.over_budget(c)]


def _comparison(
    grid: Grid,
    pair: tuple[CellKey, CellKey],
    measure: str,
    tasks: Tasks,
    *,
    family: str,
    draws: _Draws,
) -> SubjectComparison:
    own, other = (grid.values(cell, measure) for cell in pair)
    difference = SIGNS[measure] * (own - other)
    both = ~np.isnan(difference)
    paired = _present(difference, tasks)
    full = ("fullkv", FULL)
    unknown = np.full(own.shape, np.nan)
    base = np.where(both, grid.values(full, measure), np.nan) if measure == "nll" and full in grid.cells else unknown
    return SubjectComparison(
        rival=pair[1][0],
        tasks=len(paired),
        n=sum(rows.size for rows in paired.values()),
        subject_mean=_mean(np.where(both, own, np.nan), tasks),
        rival_mean=_mean(np.where(both, other, np.nan), tasks),
        gain=_mean(difference, tasks),
        subject_loss=_mean(own - base, tasks),
        rival_loss=_mean(other - base, tasks),
        draws=_redraw(grid, difference, paired, family=family, draws=draws),
    )


def _all(parts: Sequence[SubjectComparison]) -> SubjectComparison:
    """The mean of the families, which weigh the same; their draws are independent of each other."""
    draws = [part.draws for part in parts if part.draws is not None]
    names = ("subject_mean", "rival_mean", "gain", "subject_loss", "rival_loss")
    means = {name: float(np.mean([getattr(part, name) for part in parts])) for name in names}
    tasks, n = (sum(counts) for counts in zip(*((part.tasks, part.n) for part in parts), strict=True))
    return SubjectComparison(OWN, tasks, n, **means, draws=np.mean(draws, axis=0) if len(draws) == len(parts) else None)


def _row(c: SubjectComparison, unfair: str) -> dict[str, Any]:
    edge = (1 - LEVEL) / 2
    ends = (math.nan, math.nan)
    if c.draws is not None:
        low, high = np.quantile(np.round(c.draws, 9), [edge, 1 - edge])  # rounded: a sum that is 0 must compare as 0
        ends = (float(low), float(high))
    verdict = unfair or ("better" if ends[0] > 0 else "worse" if ends[1] < 0 else "not told apart")
    columns = {name: value for name, value in vars(c).items() if name != "draws"}
    ratio = c.subject_loss / c.rival_loss if c.rival_loss > 0 else math.nan
    return {
        **columns,
        "low": ends[0],
        "high": ends[1],
        "loss_ratio": ratio,
        "verdict": verdict if c.rival else "no rival",
    }


def _present(values: Array, tasks: Tasks) -> Tasks:
    """The tasks that have values [S], with the indexes of those."""
    kept = {task: rows[~np.isnan(values[rows])] for task, rows in tasks.items()}
    return {task: rows for task, rows in kept.items() if rows.size}


def _mean(values: Array, tasks: Tasks) -> float:
    """Mean of task means of values [S]; NaN where there is none."""
    means = [values[rows].mean() for rows in _present(values, tasks).values()]
    return float(np.mean(means)) if means else math.nan


def _redraw(grid: Grid, values: Array, tasks: Tasks, *, family: str, draws: _Draws) -> Array | None:
    """[resamples]: the mean of as many redrawn tasks as there are, each of its redrawn clusters."""
    clusters = [grid.bootstrap.cluster_sums(values, rows) for rows in tasks.values()]
    counts = [sums.size for sums, _ in clusters]
    if sum(counts) < MIN_PAIRS or min(counts) < 2:
        return None
    drawn, often = draws.of(family, counts)
    means = np.empty(drawn.shape)
    for t, parts in enumerate(clusters):
        sums, sizes = drawn_sums(often[t], np.stack(parts, axis=1)).T
        means[drawn == t] = sums / sizes
    return np.asarray(means.mean(axis=1))
