"""Means of task means with percentile bootstrap intervals, over clusters of samples that share a context."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MIN_PAIRS = 6
"""Clusters below which there is no interval."""
FEW = 10
"""Clusters in a task below which its interval is too narrow."""


@dataclass(frozen=True)
class Estimate:
    """A weighted mean of task means over `n` samples with its interval; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


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
        names = np.asarray(tasks, dtype=object)
        self.rows = {task: np.flatnonzero(names == task) for task in sorted(set(tasks))}
        """Task to the indexes of its samples."""
        codes: dict[tuple[str, str | None, int], int] = {}
        keys = (
            (t, g, -1 if g is not None else i)
            for i, (t, g) in enumerate(zip(tasks, groups or [None] * len(tasks), strict=True))
        )
        self._cluster = np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int64)  # [S]
        self._seed = seed
        self._resamples = resamples
        self._memo: dict[tuple[str, int], npt.NDArray[np.uint16]] = {}

    def estimate(self, values: Array, *, weights: Mapping[str, float] | None = None) -> Estimate:
        """values: [S], NaN where a sample has none. weights: of tasks, in any unit; all tasks alike without them.

        Tasks without a value or a weight are left out.
        """
        kept = {task: rows[~np.isnan(values[rows])] for task, rows in self.rows.items()}
        kept = {task: rows for task, rows in kept.items() if rows.size and (weights is None or task in weights)}
        n = sum(rows.size for rows in kept.values())
        if not n:
            return NOTHING
        share = [1.0 if weights is None else weights[task] for task in kept]
        mean = float(np.average([values[rows].mean() for rows in kept.values()], weights=share))
        clusters = {task: self.cluster_sums(values, rows) for task, rows in kept.items()}
        counts = [sums.size for sums, _ in clusters.values()]
        if sum(counts) < MIN_PAIRS or min(counts) < 2:
            return Estimate(mean, math.nan, math.nan, n)
        means = [self._redrawn(task, sums, sizes) for task, (sums, sizes) in clusters.items()]
        draws = np.average(means, axis=0, weights=share)
        edge = (1 - LEVEL) / 2
        low, high = np.quantile(np.round(draws, 9), [edge, 1 - edge])  # rounded: a sum that is 0 must compare as 0
        return Estimate(mean, float(low), float(high), n)

    def few(self, values: Array) -> bool:
        """Whether some task has values [S], but in fewer than `FEW` clusters."""
        here = {task: self._cluster[rows[~np.isnan(values[rows])]] for task, rows in self.rows.items()}
        return any(0 < len(set(codes.tolist())) < FEW for codes in here.values())

    def cluster_sums(self, values: Array, rows: npt.NDArray[np.intp]) -> tuple[Array, Array]:
        """([G], [G]): sum and number of the values in each cluster, in the order of the samples."""
        _, cluster = np.unique(self._cluster[rows], return_inverse=True)
        sums = np.bincount(cluster, weights=values[rows]).astype(np.float64)
        return sums, np.bincount(cluster).astype(np.float64)

    def _redrawn(self, task: str, sums: Array, sizes: Array) -> Array:
        """[resamples]: the task's mean in each draw of clusters."""
        counts = self._counts(task, sums.size)
        total = counts @ sizes if sizes.max() > 1 else float(sums.size)
        return np.asarray(counts @ sums / total)

    def _counts(self, task: str, n: int) -> npt.NDArray[np.uint16]:
        """[resamples, n]: how often each of n clusters is drawn."""
        if (task, n) not in self._memo:
            generator = np.random.default_rng([self._seed, zlib.crc32(task.encode()), n])
            counts = generator.multinomial(n, np.full(n, 1 / n), size=self._resamples)
            self._memo[task, n] = counts.astype(np.uint16)
        return self._memo[task, n]
