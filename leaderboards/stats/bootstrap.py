"""Means of task means with percentile bootstrap intervals, over clusters of samples that share a context.

How often each cluster is drawn depends on the task and on how many clusters there are. So many columns of values are
redrawn in one product, and the draws of a task are made once for all of them.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.uint8]
Weights = Mapping[str, float]

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MIN_PAIRS = 6
"""Clusters below which there is no interval."""
FEW = 10
"""Clusters in a task below which its interval is too narrow."""
BLOCK = 2**22
"""Counts that are held as floats at once, and values of columns that are redrawn together."""
KEPT = 2**28
"""Bytes of draws that are remembered."""


@dataclass(frozen=True)
class Estimate:
    """A weighted mean of task means over `n` samples with its interval; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def draw_counts(generator: np.random.Generator, n: int, times: int) -> Counts:
    """[times, n]: how often each of n clusters is drawn in n draws; above 255 in no realistic number of redraws."""
    counts = np.empty((times, n), dtype=np.uint8)
    for rows in blocks(times, n):
        counts[rows] = generator.multinomial(n, np.full(n, 1 / n), size=len(counts[rows]))
    return counts


def drawn_sums(counts: Counts, sums: Array) -> Array:
    """[R, K] of counts [R, G] and sums [G, K]: the sums over the clusters of each redraw."""
    return np.vstack([counts[rows].astype(np.float64) @ sums for rows in blocks(*counts.shape)])


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of so many rows of that width as fit into `BLOCK`."""
    step = max(1, BLOCK // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Kept:
    """Draws that are made once; the last ones, up to `KEPT` bytes."""

    def __init__(self) -> None:
        self._memo: OrderedDict[Hashable, list[Counts]] = OrderedDict()

    def of(self, key: Hashable, make: Callable[[], list[Counts]]) -> list[Counts]:
        """What is kept under the key, else what `make` makes."""
        if key not in self._memo:
            self._memo[key] = make()
            while len(self._memo) > 1 and sum(part.nbytes for parts in self._memo.values() for part in parts) > KEPT:
                self._memo.popitem(last=False)
        self._memo.move_to_end(key)
        return self._memo[key]


class Bootstrap:
    """Stratified percentile bootstrap over the samples of one table, by task.

    Samples of one task and group are one cluster: they are drawn together or not at all, and a redrawn task mean is the
    sum of the drawn clusters over the number of samples in them. A sample without a group is its own cluster.

    Draws depend on the seed, the task and its number of clusters alone, so cells with the same samples see the same
    ones.
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
        self._alone = np.bincount(self._cluster)[self._cluster] == 1 if codes else np.empty(0, dtype=bool)  # [S]
        self._seed = seed
        self._resamples = resamples
        self._kept = Kept()

    def estimate(self, values: Array, *, weights: Weights | None = None) -> Estimate:
        """The weighted mean of task means of values [S], NaN where a sample has none, with its interval.

        weights: of tasks, in any unit; without them all tasks weigh the same.

        Tasks without a value or a weight are left out.
        """
        return self.estimates([values], weights=[weights])[0]

    def estimates(self, columns: Iterable[Array], *, weights: Iterable[Weights | None] | None = None) -> list[Estimate]:
        """`estimate` of each of many columns, each [S], with its own weights; faster than one after the other."""
        shares = repeat(None) if weights is None else weights
        step, found = max(1, BLOCK // max(1, len(self._cluster))), list[Estimate]()
        left = zip(columns, shares, strict=weights is not None)
        while parts := [_Column.of(self, values, share) for values, share in islice(left, step)]:
            self._redraw([part for part in parts if part.sure])
            found += [part.estimate() for part in parts]
        return found

    def mean(self, values: Array) -> float:
        """The mean of `estimate` alone."""
        return _Column.of(self, values, None).mean

    def few(self, values: Array) -> bool:
        """Whether some task has values [S], but in fewer than `FEW` clusters."""
        kept = (rows[~np.isnan(values[rows])] for rows in self.rows.values())
        return any(rows.size and self.cluster_sums(values, rows)[0].size < FEW for rows in kept)

    def cluster_sums(self, values: Array, rows: npt.NDArray[np.intp]) -> tuple[Array, Array]:
        """([G], [G]): sum and number of the values in each cluster, in the order of the samples."""
        cluster = self.clusters(rows)
        if cluster is None:
            return np.asarray(values[rows] + 0.0, dtype=np.float64), np.ones(rows.size)
        sums = np.bincount(cluster, weights=values[rows]).astype(np.float64)
        return sums, np.bincount(cluster).astype(np.float64)

    def clusters(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp] | None:
        """[len(rows)]: the cluster of each, counted in the order of the samples; None where each is its own."""
        if self._alone[rows].all():
            return None
        return np.unique(self._cluster[rows], return_inverse=True)[1]

    def _redraw(self, columns: Sequence[_Column]) -> None:
        """Add every task's means in each draw of its clusters to the draws of each column."""
        for column in columns:
            column.draws = np.zeros(self._resamples)
        for task in self.rows:
            alike: dict[int, list[_Column]] = defaultdict(list)
            for column in columns:
                if task in column.clusters:
                    alike[column.clusters[task][0].size].append(column)
            for n, some in alike.items():
                self._add(task, n, some)

    def _add(self, task: str, n: int, columns: Sequence[_Column]) -> None:
        """Columns with n clusters in the task."""
        counts = self._counts(task, n)
        sums, sizes = (np.stack([column.clusters[task][i] for column in columns], axis=1) for i in (0, 1))  # [n, K]
        drawn = drawn_sums(counts, sums)
        totals = drawn_sums(counts, sizes) if sizes.max() > 1 else np.full_like(drawn, n)
        for k, column in enumerate(columns):
            column.draws += drawn[:, k] / totals[:, k] * column.share[task]

    def _counts(self, task: str, n: int) -> Counts:
        """[resamples, n]: how often each of n clusters is drawn."""
        seed = [self._seed, zlib.crc32(task.encode()), n]
        return self._kept.of((task, n), lambda: [draw_counts(np.random.default_rng(seed), n, self._resamples)])[0]


@dataclass
class _Column:
    """A column of values by task: weights, means, and of each cluster the sum and the number of its values.

    sure: whether it has an interval. draws: [resamples], sums over the tasks of weighted means.
    """

    share: dict[str, float]
    means: list[float]
    clusters: dict[str, tuple[Array, Array]]
    n: int
    sure: bool
    draws: Array

    @classmethod
    def of(cls, bootstrap: Bootstrap, values: Array, weights: Weights | None) -> _Column:
        kept = {task: rows[~np.isnan(values[rows])] for task, rows in bootstrap.rows.items()}
        kept = {task: rows for task, rows in kept.items() if rows.size and (weights is None or task in weights)}
        clusters = {task: bootstrap.cluster_sums(values, rows) for task, rows in kept.items()}
        counts = [sums.size for sums, _ in clusters.values()]
        return cls(
            {task: 1.0 if weights is None else weights[task] for task in kept},
            [float(values[rows].mean()) for rows in kept.values()],
            clusters,
            sum(rows.size for rows in kept.values()),
            sum(counts) >= MIN_PAIRS and min(counts) >= 2,
            np.empty(0),
        )

    def estimate(self) -> Estimate:
        if not self.sure:
            return Estimate(self.mean, math.nan, math.nan, self.n) if self.n else NOTHING
        draws = np.round(self.draws / sum(self.share.values()), 9)  # rounded: a sum that is 0 must compare as 0
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2])
        return Estimate(self.mean, float(low), float(high), self.n)

    @property
    def mean(self) -> float:
        """NaN without a value."""
        return float(np.average(self.means, weights=list(self.share.values()))) if self.n else math.nan
