"""Joint redraws: means of many columns over the same bootstrap draws, whatever samples each of them has.

`leaderboards.stats.bootstrap` draws anew for another number of clusters, so two of its means with different samples are
no joint draw. Here every cluster of a task (samples with one `meta.group`) is drawn, and a mean is over those of its
samples that were, so that maxima over many differences can be taken within a draw.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leaderboards.stats.bootstrap import Array, Counts, drawn_sums
from leaderboards.stats.grid import Grid, Mask


@dataclass(frozen=True)
class Request:
    """Means wanted. where: [S], over which samples; members: the K cells, which all have those; values: [S, K]."""

    where: Mask
    members: tuple[int, ...]
    values: Array


@dataclass(frozen=True)
class Drawn:
    """T tasks, R redraws, K members. observed: [T, K]; redrawn: [T, R, K]; clusters: [T], those with a sample."""

    members: tuple[int, ...]
    observed: Array
    redrawn: Array
    clusters: Array

    def deviations(self) -> Array:
        """[T, R, K]: redrawn less observed, each task's widened by its sqrt(g/(g-1)). Needs g >= 2."""
        widen = np.sqrt(self.clusters / (self.clusters - 1))[:, None, None]
        return np.asarray((self.redrawn - self.observed[:, None]) * widen, dtype=np.float64)

    def freedom(self, deviations: Array) -> Array:
        """[K, K]: degrees of freedom of the mean difference of two members, by Welch and Satterthwaite.

        deviations: [T, R, K]. Infinite for two members that do not differ in spread.
        """
        covariance = np.stack([np.atleast_2d(np.cov(part, rowvar=False)) for part in deviations])  # [T, K, K]
        own = np.diagonal(covariance, axis1=1, axis2=2)
        variance = np.maximum(own[:, :, None] + own[:, None] - 2 * covariance, 0.0).round(12)
        parts = (variance**2 / (self.clusters - 1)[:, None, None]).sum(axis=0)
        whole = variance.sum(axis=0) ** 2
        freedom: Array = np.divide(whole, parts, out=np.full_like(whole, np.inf), where=parts > 0)
        return freedom


class Redraws:
    """Joint redraws of the clusters of each task: every column and every set of samples sees the same ones."""

    def __init__(self, grid: Grid, *, seed: int, resamples: int) -> None:
        self._bootstrap = grid.bootstrap
        self._seed = seed
        self._resamples = resamples
        self._memo: dict[str, Counts] = {}

    def means(self, requests: Sequence[Request]) -> list[Drawn]:
        """Task means of each request, observed and redrawn. A redraw without any of its samples counts as observed."""
        parts: list[list[tuple[Array, Array, int]]] = [[] for _ in requests]
        for task, rows in self._bootstrap.rows.items():
            here = [i for i, r in enumerate(requests) if r.where[rows].any()]
            if not here:
                continue
            cluster = self._bootstrap.clusters(rows)
            sums = [self._sums(rows, cluster, requests[i]) for i in here]  # each [G, 1 + K]
            edges = np.cumsum([0, *(s.shape[1] for s in sums)])
            totals = drawn_sums(self._counts(task, len(sums[0])), np.hstack(sums))
            for i, own, start, stop in zip(here, sums, edges[:-1], edges[1:], strict=True):
                whole = own.sum(axis=0)
                observed = whole[1:] / whole[0]
                sizes, drawn = totals[:, start, None], totals[:, start + 1 : stop]
                some = sizes.min() > 0
                means = drawn / sizes if some else np.where(sizes > 0, drawn / np.maximum(sizes, 1), observed)
                parts[i].append((observed, means, int((own[:, 0] > 0).sum())))
        return [
            Drawn(
                r.members,
                np.array([p[0] for p in found]),
                np.array([p[1] for p in found]),
                np.array([p[2] for p in found], dtype=np.float64),
            )
            for r, found in zip(requests, parts, strict=True)
        ]

    @staticmethod
    def _sums(rows: npt.NDArray[np.intp], cluster: npt.NDArray[np.intp] | None, request: Request) -> Array:
        """[G, 1 + K]: per cluster the number of samples and the sums of the members' values.

        cluster: of each of the rows; None where each is its own.
        """
        where = request.where[:, None]
        columns = np.hstack([where[rows], np.where(where[rows], request.values[rows], 0.0)])
        if cluster is None:
            return np.asarray(columns, dtype=np.float64)
        return np.stack([np.bincount(cluster, weights=column) for column in columns.T], axis=1)

    def _counts(self, task: str, n: int) -> Counts:
        """[R, n]: how often each of n clusters is drawn; above 255 in no realistic number of redraws."""
        if task not in self._memo:
            generator = np.random.default_rng([self._seed, zlib.crc32(task.encode()), n, 1])
            counts = np.empty((self._resamples, n), dtype=np.uint8)
            for r in range(self._resamples):
                counts[r] = np.bincount(generator.integers(n, size=n), minlength=n)
            self._memo[task] = counts
        return self._memo[task]
