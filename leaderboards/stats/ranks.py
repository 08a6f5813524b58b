"""How sure a place in the ranking is: rank intervals, the strongest other method, and intervals over tasks.

Ranks. Per budget and measure, `low` is 1 plus the number of methods that are surely better, `high` the number of
methods less those that are surely worse (Mogstad, Romano, Shaikh and Wilhelm, "Inference for Ranks with Applications to
Mobility across Neighbourhoods and Academic Achievement across Countries", Review of Economic Studies 91(1), 2024).

Surely. All ordered pairs of methods of a budget are tested at once, by the paired difference. The step-down max-t
bootstrap (Romano and Wolf, "Exact and Approximate Stepdown Methods for Multiple Hypothesis Testing", JASA 100, 2005)
holds the chance of any wrong claim, direction included, at 5 % per budget and measure, and so that of an interval that
misses its method's true rank. All pairs see the same redraws of clusters, within tasks; the spread of a difference is
that of its redraws, times sqrt(g/(g-1)) in a task of g clusters. It rests on few clusters, so a difference in units of
it is read as Student's t, with the degrees of freedom of Welch and Satterthwaite, and turned into the normal deviate of
the same probability before it is compared with the redraws.

Who counts. Cells with a budget that are scored and within their bytes. A pair needs `FEW` clusters in all, `LEAST` in
every task and `FEW` - 1 degrees of freedom to be told apart: with tasks of 2 or 3 clusters beside larger ones, equal
methods are told apart too often. A cell that lacks samples is surely better than nobody: what it lacks may be what it
fails.

Best other. The method of another name (before `@`), complete and within its bytes, with the best mean at that budget
on the samples that the cell has, which favours it. Over tasks. A cell's mean with tasks and their clusters redrawn as
in `leaderboards.stats.subject`, from `MIN_TASKS` tasks on.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import FEW, LEVEL, MIN_PAIRS, NOTHING, Array, Drawn, Mask, Request, percentiles
from leaderboards.stats.comparable import FULL
from leaderboards.stats.grid import Grid
from leaderboards.stats.subject import SIGNS, bare_name

LEAST = 5
"""Clusters in a task below which nobody is told apart."""
MIN_TASKS = 3
"""Tasks below which nothing is said of other tasks."""
SUFFIXES: Mapping[str, str] = {"score": "", "nll": "_nll"}
"""Measure to what follows the column's name."""
PAIRED: Mapping[str, str] = {"score": "score_points_vs_best", "nll": "nll_nats_vs_best"}
"""Measure to the columns of the difference to the best other."""


def step_down(statistics: Array, draws: Array, *, level: float = LEVEL) -> Mask:
    """[P]: which one-sided hypotheses are rejected, with the chance of any wrong rejection at most 1 - level.

    statistics: [P], large where the hypothesis looks wrong; draws: [R, P], the same statistics redrawn and centred.
    """
    left = np.ones(len(statistics), dtype=bool)
    while left.any():
        limit = np.quantile(draws[:, left].max(axis=1), level, method="higher")
        rejected = left & (statistics > limit)
        if not rejected.any():
            break
        left &= ~rejected
    return ~left


def _normal_deviate(mean: float, error: float, *, freedom: float) -> float:
    """The normal deviate that is as improbable as mean / error is for Student's t; infinite without an error."""
    if not error:
        return math.copysign(math.inf, mean) if mean else 0.0
    tail = special.stdtr(freedom, -abs(mean / error))
    return round(math.copysign(float(-special.ndtri(tail)), mean), 9)


class _Field:
    """The cells of one budget by one measure. whole: cells that lack no sample that another one has."""

    def __init__(self, grid: Grid, cells: Sequence[CellKey], measure: str) -> None:
        self.cells, self.sign, self.seed = cells, SIGNS[measure], grid.bootstrap.seed
        values = np.stack([grid.values(cell, measure) for cell in cells], axis=1)  # [S, K]
        has = ~np.isnan(values)
        self.scored = np.flatnonzero(has.any(axis=0)).tolist()
        self.inside = [i for i in self.scored if not grid.over_budget(cells[i])]
        every = has.any(axis=1)
        self.whole = [i for i in self.inside if grid.complete(cells[i]) and has[every, i].all()]
        self._keys = [has[:, i].tobytes() for i in range(len(cells))]
        requests: dict[frozenset[bytes], Request] = {}
        for i, j in combinations_with_replacement(self.scored, 2):
            where = has[:, i] & has[:, j]
            if self._key(i, j) not in requests and where.any():
                members = tuple(k for k in self.scored if has[where, k].all())
                requests[self._key(i, j)] = Request(where, members, values[:, members])
        self._drawn = dict(zip(requests, grid.bootstrap.joint(list(requests.values())), strict=True))

    def _key(self, i: int, j: int) -> frozenset[bytes]:
        """What `_drawn` keeps the means over the samples of both cells under."""
        return frozenset((self._keys[i], self._keys[j]))

    def _own(self, i: int) -> Drawn:
        """Means over the samples of a cell."""
        return self._drawn[self._key(i, i)]

    def beats(self) -> Mask:
        """[K, K]: whether the first is surely better than the second."""
        known = {key: d for key, d in self._drawn.items() if d.clusters.sum() >= FEW and d.clusters.min() >= LEAST}
        spreads = {key: drawn.spread() for key, drawn in known.items()}
        pairs, statistics, draws = list[tuple[int, int]](), list[float](), list[Array]()
        for i, j in product(self.whole, self.inside):
            key = self._key(i, j)
            if i == j or key not in known:
                continue
            (spread, freedom), found = spreads[key], known[key]
            a, b = (found.members.index(cell) for cell in (i, j))
            if freedom[a, b] < FEW - 1:
                continue
            mean = round(self.sign * float(found.observed[:, a].mean() - found.observed[:, b].mean()), 9)
            drawn = self.sign * (spread[:, a] - spread[:, b])
            error = round(float(drawn.std()), 9)
            pairs.append((i, j))
            statistics.append(_normal_deviate(mean, error, freedom=float(freedom[a, b])))
            draws.append(drawn / error if error else np.zeros_like(drawn))
        better = np.zeros((len(self.cells), len(self.cells)), dtype=bool)
        if pairs:
            better[tuple(zip(*pairs, strict=True))] = step_down(np.array(statistics), np.stack(draws, axis=1))
        return better

    def ranks(self) -> dict[CellKey, tuple[int, int]]:
        """(low, high) of the cells that count; none where there are fewer than two."""
        here = self.inside
        if len(here) < 2:
            return {}
        better = self.beats()
        return {self.cells[i]: (1 + int(better[:, i].sum()), len(here) - int(better[i].sum())) for i in here}

    def best_other(self, i: int) -> CellKey | None:
        """The strongest other method on the samples of this cell; of equal means the first label."""
        if i not in self.scored:
            return None
        own, name = self._own(i), bare_name(self.cells[i][0])
        rivals = [j for j in self.whole if bare_name(self.cells[j][0]) != name]
        means = {j: self.sign * round(float(own.observed[:, own.members.index(j)].mean()), 9) for j in rivals}
        return min(((-mean, self.cells[j]) for j, mean in means.items()), default=(0.0, None))[1]

    def task_interval(self, i: int) -> tuple[float, float]:
        """(low, high) of a cell's mean over other tasks; NaN without enough tasks and clusters."""
        own = self._own(i) if i in self.scored else None
        if own is None or len(own.clusters) < MIN_TASKS or own.clusters.min() < 2 or own.clusters.sum() < MIN_PAIRS:
            return math.nan, math.nan
        means = own.redrawn[:, :, own.members.index(i)]  # [T, R]
        tasks, resamples = means.shape
        drawn = np.random.default_rng([self.seed, tasks]).integers(tasks, size=(resamples, tasks))
        shift = np.arange(tasks) * max(1, resamples // tasks)  # a task drawn twice has two redraws of its clusters
        others = (np.arange(resamples)[:, None] + shift) % resamples
        return percentiles(means[drawn, others].mean(axis=1))


def rank_columns(grid: Grid) -> dict[CellKey, dict[str, Any]]:
    """Columns of every cell's row.

    `rank_low _high`, `rank_nll_low _high`; `score_task_low _high`, 0-100; `best_other` and `best_other_nll`, labels;
    `score_points_vs_best` and `nll_nats_vs_best`, each with `_mean _low _high _n`. NaN or empty where there is none.
    """
    found: dict[CellKey, dict[str, Any]] = {cell: {} for cell in grid.cells}
    for budget in sorted({budget for _, budget in grid.cells}):
        cells = sorted(c for c in grid.cells if c[1] == budget)
        for measure, suffix in SUFFIXES.items():
            field = _Field(grid, cells, measure)
            ranks = {} if budget == FULL else field.ranks()
            others = [None if budget == FULL else field.best_other(i) for i in range(len(cells))]
            grid.prepare((cell, measure, best) for cell, best in zip(cells, others, strict=True) if best)
            for i, (cell, best) in enumerate(zip(cells, others, strict=True)):
                row = found[cell]
                row[f"rank{suffix}_low"], row[f"rank{suffix}_high"] = ranks.get(cell, (math.nan, math.nan))
                if measure == "score":
                    row["score_task_low"], row["score_task_high"] = field.task_interval(i)
                paired = grid.estimate(cell, measure, minus=best) if best else NOTHING
                row[f"best_other{suffix}"] = best[0] if best else ""
                row |= {f"{PAIRED[measure]}_{part}": value for part, value in paired._asdict().items()}
    return found


def is_ranked(rows: pd.DataFrame) -> bool:
    """Whether some cell of a table has a rank."""
    return bool(rows["rank_low"].notna().any())
