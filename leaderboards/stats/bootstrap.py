"""Means of task means with percentile bootstrap intervals, over clusters of samples that share a context.

`Bootstrap` draws anew for another number of clusters, so two of its means with different samples are no joint draw.
`Bootstrap.joint` is one: every cluster of a task is drawn, and a mean is over those of its samples that were, so that
maxima over many differences can be taken within a draw.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.uint8]
"""[R, n]: how often each of n clusters is drawn; above 255 in no realistic number of redraws."""
Indexes = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
Weights = Mapping[str, float]

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MIN_PAIRS = 6
"""Clusters below which there is no interval."""
FEW = 10
"""Clusters in a task below which its interval is too narrow."""
BLOCK = 2**22
"""Values of columns that are redrawn together."""


class Estimate(NamedTuple):
    """A weighted mean of task means over `n` samples with its interval; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


class Request(NamedTuple):
    """Joint means wanted. where: [S], over which samples; members: the K cells, all with those; values: [S, K]."""

    where: Mask
    members: tuple[int, ...]
    values: Array


@dataclass(frozen=True)
class Drawn:
    """T tasks, R redraws, K members. observed: [T, K]; redrawn: [T, R, K]; clusters: [T], those with a sample."""

    tasks: tuple[str, ...]
    members: tuple[int, ...]
    observed: Array
    redrawn: Array
    clusters: Array

    def spread(self) -> tuple[Array, Array]:
        """[R, K], mean over tasks of redrawn less observed, widened by sqrt(g/(g-1)) in a task of g >= 2 clusters.

        And [K, K], the degrees of freedom of the mean difference of two members, by Welch and Satterthwaite; infinite
        for two that do not differ in spread.
        """
        widen = np.sqrt(self.clusters / (self.clusters - 1))[:, None, None]
        deviations = (self.redrawn - self.observed[:, None]) * widen
        centred = deviations - deviations.mean(axis=1, keepdims=True)
        covariance = centred.transpose(0, 2, 1) @ centred / max(1, centred.shape[1] - 1)  # [T, K, K]
        own = np.diagonal(covariance, axis1=1, axis2=2)
        variance = np.maximum(own[:, :, None] + own[:, None] - 2 * covariance, 0.0).round(12)
        parts = (variance**2 / (self.clusters - 1)[:, None, None]).sum(axis=0)
        whole = variance.sum(axis=0) ** 2
        freedom = np.divide(whole, parts, out=np.full_like(whole, np.inf), where=parts > 0)
        return deviations.mean(axis=0), freedom

    def of(self, tasks: Collection[str]) -> Drawn:
        """Of some of the tasks."""
        here = [i for i, task in enumerate(self.tasks) if task in tasks]
        if len(here) == len(self.tasks):
            return self
        named = tuple(self.tasks[i] for i in here)
        return Drawn(named, self.members, self.observed[here], self.redrawn[here], self.clusters[here])


def seeded(seed: int, name: str, *more: int) -> np.random.Generator:
    """The generator of a task or family."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *more])


def draw_counts(generator: np.random.Generator, n: int, times: int) -> Counts:
    """[times, n] of n draws each."""
    return generator.multinomial(n, np.full(n, 1 / n), size=times).astype(np.uint8)


@lru_cache(maxsize=256)
def task_counts(seed: int, task: str, n: int, resamples: int) -> Counts:
    """[resamples, n]: the redraws of a task in which n clusters count."""
    return draw_counts(seeded(seed, task, n), n, resamples)


@lru_cache(maxsize=256)
def joint_counts(seed: int, task: str, n: int, resamples: int) -> Counts:
    """[resamples, n]: the redraws of all n clusters of a task."""
    generator, counts = seeded(seed, task, n, 1), np.empty((resamples, n), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(generator.integers(n, size=n), minlength=n)
    return counts


def drawn_sums(counts: Counts, sums: Array) -> Array:
    """[R, K] of counts [R, G] and sums [G, K]: the sums over the clusters of each redraw."""
    return np.asarray(counts.astype(np.float64) @ sums)


class Bootstrap:
    """Stratified percentile bootstrap over the samples of one table, by task.

    Samples of one task and group are one cluster: they are drawn together or not at all, and a redrawn task mean is the
    sum of the drawn clusters over the number of samples in them. A sample without a group is its own cluster.

    Draws depend on the seed, the task and its number of clusters alone: cells with the same samples see the same ones.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        groups: Sequence[str | None] | None = None,
        seed: int = SEED,
        resamples: int = RESAMPLES,
    ) -> None:
        """tasks: [S], the task of each sample. groups: [S], its group within the task, if it has one."""
        codes: dict[tuple[str, str | None, int], int] = {}
        places: dict[str, list[int]] = defaultdict(list)
        self._cluster = np.empty(len(tasks), dtype=np.int64)  # [S], in the order of first appearance
        for i, (task, group) in enumerate(zip(tasks, groups or [None] * len(tasks), strict=True)):
            places[task].append(i)
            self._cluster[i] = codes.setdefault((task, group, -1 if group is not None else i), len(codes))
        self.rows = {task: np.array(places[task], dtype=np.intp) for task in sorted(places)}
        """Task to the indexes of its samples."""
        self.seed = seed
        self.resamples = resamples

    def estimate(self, values: Array, *, weights: Weights | None = None) -> Estimate:
        """The weighted mean of task means of values [S], NaN where a sample has none, with its interval.

        weights: of tasks, in any unit; tasks without one are left out, as are those without a value.
        """
        return self.estimates([values], weights=[weights])[0]

    def estimates(self, columns: Iterable[Array], *, weights: Iterable[Weights | None] | None = None) -> list[Estimate]:
        """`estimate` of each of many columns, each [S], with its own weights; faster than one after the other."""
        step, found = max(1, BLOCK // max(1, len(self._cluster))), list[Estimate]()
        left = zip(columns, repeat(None) if weights is None else weights, strict=False)
        while parts := [self._column(values, share) for values, share in islice(left, step)]:
            self._redraw([part for part in parts if part.sure])
            found += [part.estimate() for part in parts]
        return found

    def mean(self, values: Array, tasks: Iterable[str] | None = None) -> float:
        """Mean of task means of values [S], of some tasks or of all; NaN where there is none."""
        means = [values[rows].mean() for rows in self.present(values, tasks).values()]
        return float(np.mean(means)) if means else math.nan

    def present(self, values: Array, tasks: Iterable[str] | None = None) -> dict[str, Indexes]:
        """The tasks, of some or of all, that have values [S], with the indexes of those."""
        kept = {
            task: self.rows[task][~np.isnan(values[self.rows[task]])]
            for task in (self.rows if tasks is None else tasks)
        }
        return {task: rows for task, rows in kept.items() if rows.size}

    def few(self, values: Array) -> bool:
        """Whether some task has values [S], but in fewer than `FEW` clusters."""
        return any(np.unique(self._cluster[rows]).size < FEW for rows in self.present(values).values())

    def noise(self, values: Array, rows: Indexes) -> float:
        """Standard error of the mean of the values [S] in rows, over clusters; NaN with fewer than two of those."""
        parts = self.noise_parts(values, rows)
        return float(np.sqrt((parts**2).sum())) if len(parts) > 1 else math.nan

    def noise_parts(self, values: Array, rows: Indexes) -> Array:
        """[G, K]: of the mean of the values [S, K] or [S] in rows, what each cluster adds to its standard error.

        Their squares add up to its square; those of a difference of two columns are the columns' differences.
        """
        sizes, sums = np.split(self.cluster_sums(values, rows), [1], axis=1)
        whole, wider = sizes.sum(), math.sqrt(len(sizes) / max(1, len(sizes) - 1))
        return np.asarray(wider * (sums - sizes * sums.sum(axis=0) / whole) / whole)

    def clusters(self, rows: Indexes) -> Indexes:
        """[len(rows)]: which cluster of the rows' own each of them is in, counted from 0."""
        return np.asarray(np.unique(self._cluster[rows], return_inverse=True)[1])

    def cluster_sums(self, values: Array, rows: Indexes) -> Array:
        """[G, 1 + K]: number and sums of the values [S, K] or [S] in each cluster of rows, in the order of rows."""
        cluster = self.clusters(rows)
        own = values[rows].reshape(len(rows), -1).T
        return np.stack([np.bincount(cluster), *(np.bincount(cluster, weights=column) for column in own)], axis=1)

    def _column(self, values: Array, weights: Weights | None) -> _Column:
        kept = self.present(values, self.rows if weights is None else [task for task in self.rows if task in weights])
        return _Column(
            {task: 1.0 if weights is None else weights[task] for task in kept},
            [float(values[rows].mean()) for rows in kept.values()],
            {task: self.cluster_sums(values, rows) for task, rows in kept.items()},
            sum(rows.size for rows in kept.values()),
        )

    def _redraw(self, columns: Sequence[_Column]) -> None:
        """Add every task's means in each draw of its clusters to the draws of each column."""
        for column in columns:
            column.draws = np.zeros(self.resamples)
        for task in self.rows:
            alike: dict[int, list[_Column]] = defaultdict(list)
            for column in columns:
                if task in column.clusters:
                    alike[len(column.clusters[task])].append(column)
            for n, some in alike.items():
                counts = task_counts(self.seed, task, n, self.resamples)
                sizes, sums = (np.stack([one.clusters[task][:, i] for one in some], axis=1) for i in (0, 1))  # [n, K]
                drawn = drawn_sums(counts, sums)
                totals = drawn_sums(counts, sizes) if sizes.max() > 1 else np.full_like(drawn, n)
                for column, own, total in zip(some, drawn.T, totals.T, strict=True):
                    column.draws += own / total * column.share[task]

    def joint(self, requests: Sequence[Request]) -> list[Drawn]:
        """Task means of each request, observed and redrawn. A redraw without any of its samples counts as observed.

        Every column and every set of samples sees the same redraws.
        """
        parts: list[list[tuple[str, Array, Array, int]]] = [[] for _ in requests]
        for task, rows in self.rows.items():
            here = [i for i, r in enumerate(requests) if r.where[rows].any()]
            if not here:
                continue
            sums = [self._joint_sums(requests[i], rows) for i in here]
            edges = np.cumsum([s.shape[1] for s in sums])[:-1]
            totals = drawn_sums(joint_counts(self.seed, task, len(sums[0]), self.resamples), np.hstack(sums))
            for i, own, drawn in zip(here, sums, np.split(totals, edges, axis=1), strict=True):
                whole, sizes = own.sum(axis=0), drawn[:, :1]
                observed = whole[1:] / whole[0]
                means = np.where(sizes > 0, drawn[:, 1:] / np.maximum(sizes, 1), observed)
                parts[i].append((task, observed, means, int((own[:, 0] > 0).sum())))
        made = list[Drawn]()
        for request, found in zip(requests, parts, strict=True):
            tasks, *arrays = zip(*found, strict=True)
            made.append(Drawn(tasks, request.members, *(np.array(part, dtype=np.float64) for part in arrays)))
        return made

    def _joint_sums(self, request: Request, rows: Indexes) -> Array:
        """[G, 1 + K]: per cluster the number of the request's samples and the sums of the members' values."""
        where = request.where[:, None]
        return self.cluster_sums(np.hstack([where, np.where(where, request.values, 0.0)]), rows)[:, 1:]


@dataclass
class _Column:
    """A column of values by task: weights, means, and [G, 2], of each cluster the number and the sum of its values.

    draws: [resamples], sums over the tasks of weighted means.
    """

    share: dict[str, float]
    means: list[float]
    clusters: dict[str, Array]
    n: int
    draws: Array = field(default_factory=lambda: np.empty(0))

    @property
    def sure(self) -> bool:
        """Whether it has an interval."""
        counts = [len(own) for own in self.clusters.values()]
        return sum(counts) >= MIN_PAIRS and min(counts) >= 2

    def estimate(self) -> Estimate:
        if not self.sure:
            return NOTHING._replace(mean=self.mean, n=self.n)
        low, high = percentiles(self.draws / sum(self.share.values()))
        return Estimate(self.mean, low, high, self.n)

    @property
    def mean(self) -> float:
        """NaN without a value."""
        return float(np.average(self.means, weights=list(self.share.values()))) if self.n else math.nan


def percentiles(draws: Array) -> tuple[float, float]:
    """The ends of the interval; rounded, as a sum that is 0 must compare as 0."""
    low, high = np.quantile(np.round(draws, 9), [(1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2])
    return float(low), float(high)
