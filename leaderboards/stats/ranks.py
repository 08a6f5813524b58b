"""How sure a place in the ranking is: rank intervals, the strongest other method, and intervals over tasks.

Ranks. Per budget and measure, `low` is 1 plus the number of methods that are surely better, `high` the number of
methods less those that are surely worse (Mogstad, Romano, Shaikh and Wilhelm, "Inference for Ranks with Applications to
Mobility across Neighbourhoods and Academic Achievement across Countries", Review of Economic Studies 91(1), 2024).

Surely. All ordered pairs of methods, of all budgets and both measures of a table, are tested at once, by the paired
difference. The step-down max-t bootstrap (Romano and Wolf, "Exact and Approximate Stepdown Methods for Multiple
Hypothesis Testing", JASA 100, 2005) holds the chance of any wrong claim on the table, direction included, at 5 %, and
so that of an interval that misses its method's true rank. All pairs see the same redraws of contexts, within tasks; the
spread of a difference is that of its redraws, times sqrt(g/(g-1)) in a task of g contexts. A difference in units of it
is read as Student's t, with the degrees of freedom of Welch and Satterthwaite, and turned into the normal deviate of
the same probability before it is compared with the redraws. `tests/null.py` simulates equal methods.

Who counts. Cells with a budget that are scored and within their bytes, on the tasks that rank
(`leaderboards.stats.eligible`). A pair needs `CONTEXTS` contexts in every one of them. A cell that lacks samples is
surely better than nobody: what it lacks may be what it fails.

Power. `least` is the difference that is found with 80 %, for the pair in the middle of a measure's pairs by spread: the
limit of the first step, read as Student's t, and what the noncentral t asks above it, times the spread (Johnson and
Welch, Biometrika 31, 1940).

Best other. The method of another name (before `@`), complete and within its bytes, with the best mean at that budget
on the samples that the cell has, over all tasks, which favours it. Over tasks. A cell's mean with tasks and their
clusters redrawn as in `leaderboards.stats.subject`, from `MIN_TASKS` tasks on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import LEVEL, MIN_PAIRS, NOTHING, Array, Drawn, Indexes, Mask, Request, percentiles
from leaderboards.stats.comparable import NOT_GIVEN
from leaderboards.stats.eligible import CONTEXTS, Eligible, eligible
from leaderboards.stats.grid import Grid
from leaderboards.stats.subject import SIGNS, bare_name

POWER = 0.8
"""The chance with which a difference of the least size is found."""
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
        rejected = left & (statistics > first_limit(draws[:, left] if not left.all() else draws, level=level))
        if not rejected.any():
            break
        left &= ~rejected
    return ~left


def first_limit(draws: Array, *, level: float = LEVEL) -> float:
    """What the largest of the redrawn statistics [R, P] exceeds with a chance of 1 - level at most."""
    return float(np.quantile(draws.max(axis=1), level, method="higher"))


class Contrasts(NamedTuple):
    """P differences of two members. statistics: [P], normal deviates; draws: [R, P], the same redrawn and centred.

    errors: [P], the spread of each, in the unit of the values; freedom: [P], its degrees of freedom.
    """

    statistics: Array
    draws: Array
    errors: Array
    freedom: Array


def contrasts(drawn: Drawn, first: Indexes, second: Indexes, *, sign: float = 1.0) -> Contrasts:
    """The differences of members, `first` less `second`, each [P]; sign: -1 where a lower value is better."""
    spread, freedom = drawn.spread()
    own = freedom[first, second]
    means = drawn.observed.mean(axis=0)
    gaps = (sign * (means[first] - means[second])).round(9)
    draws = sign * (spread[:, first] - spread[:, second])
    errors = draws.std(axis=0).round(9)
    draws /= np.where(errors > 0, errors, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        tails = special.stdtr(own, -np.abs(gaps) / errors)  # without an error 0, or NaN without a gap
    statistics = np.where(gaps == 0, 0.0, np.copysign(-special.ndtri(tails), gaps)).round(9)
    return Contrasts(statistics, draws.astype(np.float32), errors, own)


def least_seen(errors: Array, freedom: Array, limit: float) -> float:
    """The difference that is found with `POWER` for the pair in the middle; NaN where no pair has a spread.

    errors, freedom: [P], of its pairs; limit: of the first step, a normal deviate.
    """
    there = errors > 0
    if not there.any():
        return math.nan
    return float(np.median(deviates(freedom[there], limit) * errors[there]))


def deviates(freedom: Array, limit: float) -> Array:
    """The difference that is found with `POWER`, in units of its spread; the noncentral t as by Johnson and Welch.

    freedom: degrees of freedom of the spread. limit: a normal deviate, which Student's t of that probability exceeds.
    """
    own = np.minimum(freedom, 1e9)
    limits = -special.stdtrit(own, special.ndtr(-limit))
    return np.asarray(limits + special.ndtri(POWER) * np.sqrt(1 + limits**2 / (2 * own)))


class _Field:
    """The cells of one budget by one measure. whole: cells that lack no sample that another one has.

    pairs: those that are tested, in the order of their contrasts; better: [K, K], whether the first surely is.
    """

    def __init__(self, grid: Grid, cells: Sequence[CellKey], measure: str) -> None:
        self.cells, self.measure, self.seed = cells, measure, grid.bootstrap.seed
        self.sign, self.pairs = SIGNS[measure], list[tuple[int, int]]()
        self.better = np.zeros((len(cells), len(cells)), dtype=bool)
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

    def contrasts(self, tasks: Sequence[str]) -> list[Contrasts]:
        """Of all pairs that can be told apart on these tasks, in the order in which `pairs` then has them."""
        of_key: dict[frozenset[bytes], list[tuple[int, int]]] = {}
        for i, j in product(self.whole, self.inside):
            if i != j and self._key(i, j) in self._drawn:
                of_key.setdefault(self._key(i, j), []).append((i, j))
        found = []
        for key, pairs in of_key.items():
            drawn = self._drawn[key].of(tasks)
            if len(drawn.tasks) < len(tasks) or drawn.clusters.min() < CONTEXTS:
                continue
            first, second = (np.array([drawn.members.index(k) for k in own]) for own in zip(*pairs, strict=True))
            found.append(contrasts(drawn, first, second, sign=self.sign))
            self.pairs += pairs
        return found

    def forget(self) -> None:
        """Let go of the redraws; pairs and who is surely better stay."""
        self._drawn.clear()

    def ranks(self) -> dict[CellKey, tuple[int, int]]:
        """(low, high) of the cells that count; none where there are fewer than two."""
        here, better = self.inside, self.better
        if len(here) < 2:
            return {}
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


@dataclass(frozen=True)
class Ranking:
    """What ranks in a table. eligible: measure to its tasks; least: measure to the difference found with `POWER`.

    limit: the normal deviate that a difference must exceed to be told on this table; NaN where nothing is tested.
    """

    eligible: Mapping[str, Eligible]
    least: Mapping[str, float]
    limit: float = math.nan


def rank_columns(grid: Grid) -> tuple[dict[CellKey, dict[str, Any]], Ranking]:
    """Columns of every cell's row, and what ranked.

    `rank_low _high`, `rank_nll_low _high`; `score_task_low _high`, 0-100; `best_other` and `best_other_nll`, labels;
    `score_points_vs_best` and `nll_nats_vs_best`, each with `_mean _low _high _n`. NaN or empty where there is none.
    """
    of = {measure: eligible(grid, measure) for measure in SUFFIXES}
    found: dict[CellKey, dict[str, Any]] = {cell: {} for cell in grid.cells}
    tested = list[tuple[_Field, list[Contrasts]]]()
    for budget, measure in product(sorted({budget for _, budget in grid.cells}), SUFFIXES):
        field = _Field(grid, sorted(c for c in grid.cells if c[1] == budget), measure)
        for cell, row in _other_columns(grid, field).items():
            found[cell] |= row
        if budget not in NOT_GIVEN and not of[measure].why:
            tested.append((field, field.contrasts(of[measure].tasks)))
        field.forget()
    limit, least = _tell_apart(tested)
    for field, _ in tested:
        for cell, ends in field.ranks().items():
            found[cell] |= dict(zip(_rank_names(field.measure), ends, strict=True))
    return found, Ranking(of, least, limit)


def _rank_names(measure: str) -> tuple[str, str]:
    return f"rank{SUFFIXES[measure]}_low", f"rank{SUFFIXES[measure]}_high"


def _tell_apart(tested: Sequence[tuple[_Field, Sequence[Contrasts]]]) -> tuple[float, dict[str, float]]:
    """Say in the fields who is surely better, all at once; return the limit, and of each measure the least seen."""
    every = [one for _, some in tested for one in some]
    if not every:
        return math.nan, {}
    draws = np.concatenate([one.draws for one in every], axis=1)
    told = step_down(np.concatenate([one.statistics for one in every]), draws)
    for field, _ in tested:
        own, told = np.split(told, [len(field.pairs)])
        field.better[tuple(np.array(field.pairs, dtype=np.intp).reshape(-1, 2).T)] = own
    limit, least = first_limit(draws), dict[str, float]()
    for measure in SUFFIXES:
        some = [one for field, own in tested if field.measure == measure for one in own]
        if some:
            errors, freedom = (np.concatenate([getattr(one, name) for one in some]) for name in ("errors", "freedom"))
            least[measure] = least_seen(errors, freedom, limit)
    return limit, least


def _other_columns(grid: Grid, field: _Field) -> dict[CellKey, dict[str, Any]]:
    """Of every cell of a field what its measure adds to the row; ranks are still unknown."""
    suffix, paired, limited = SUFFIXES[field.measure], PAIRED[field.measure], field.cells[0][1] not in NOT_GIVEN
    others = [field.best_other(i) if limited else None for i in range(len(field.cells))]
    grid.prepare((cell, field.measure, best) for cell, best in zip(field.cells, others, strict=True) if best)
    found = {}
    for i, (cell, best) in enumerate(zip(field.cells, others, strict=True)):
        row: dict[str, Any] = dict.fromkeys(_rank_names(field.measure), math.nan)
        if field.measure == "score":
            row["score_task_low"], row["score_task_high"] = field.task_interval(i)
        row[f"best_other{suffix}"] = best[0] if best else ""
        estimate = grid.estimate(cell, field.measure, minus=best) if best else NOTHING
        found[cell] = row | {f"{paired}_{part}": value for part, value in estimate._asdict().items()}
    return found


def is_ranked(rows: pd.DataFrame) -> bool:
    """Whether some cell of a table has a rank."""
    return bool(rows["rank_low"].notna().any() or rows["rank_nll_low"].notna().any())
