"""Joint redraws: means of many columns over the same bootstrap draws, whatever samples each of them has.

`leaderboards.bootstrap` draws anew for another number of clusters, so two of its means with different samples are no
joint draw. Here every cluster of a task (samples with one `meta.group`) is drawn, and a mean is over those of its
samples that were, so that maxima over many differences can be taken within a draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leaderboards.bootstrap import Array
from leaderboards.grid import Grid, Mask

BLOCK = 2**23
"""Counts that are held as floats at once."""


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
        self._memo: dict[str, npt.NDArray[np.uint8]] = {}

    def means(self, requests: Sequence[Request]) -> list[Drawn]:
        """Task means of each request, observed and redrawn. A redraw without any of its samples counts as observed."""
        parts: list[list[tuple[Array, Array, int]]] = [[] for _ in requests]
        for task, rows in self._bootstrap.rows.items():
            here = [i for i, r in enumerate(requests) if r.where[rows].any()]
            if not here:
                continue
            sums = [self._sums(rows, requests[i]) for i in here]  # each [G, 1 + K]
            edges = np.cumsum([0, *(s.shape[1] for s in sums)])
            totals = self._redrawn(task, np.hstack(sums))
            for i, own, start, stop in zip(here, sums, edges[:-1], edges[1:], strict=True):
                whole = own.sum(axis=0)
                observed = whole[1:] / whole[0]
                sizes, drawn = totals[:, start, None], totals[:, start + 1 : stop]
                means = np.where(sizes > 0, drawn / np.maximum(sizes, 1), observed)
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

    def _sums(self, rows: npt.NDArray[np.intp], request: Request) -> Array:
        """[G, 1 + K]: per cluster the number of samples and the sums of the members' values."""
        where = request.where[:, None]
        columns = np.hstack([where[rows], np.where(where[rows], request.values[rows], 0.0)])
        whole = np.empty(request.where.shape)
        _, sizes = self._bootstrap.cluster_sums(np.zeros_like(whole), rows)
        if sizes.max() == 1:  # clusters are in the order of the samples
            return np.asarray(columns, dtype=np.float64)
        sums = []
        for column in columns.T:
            whole[rows] = column
            sums.append(self._bootstrap.cluster_sums(whole, rows)[0])
        return np.stack(sums, axis=1)

    def _redrawn(self, task: str, sums: Array) -> Array:
        """[R, columns] of [G, columns]: the sums over the clusters of each redraw."""
        counts = self._counts(task, len(sums))
        step = max(1, BLOCK // len(sums))
        return np.vstack([counts[i : i + step].astype(np.float64) @ sums for i in range(0, len(counts), step)])

    def _counts(self, task: str, n: int) -> npt.NDArray[np.uint8]:
        """[R, n]: how often each of n clusters is drawn; above 255 in no realistic number of redraws."""
        if task not in self._memo:
            generator = np.random.default_rng([self._seed, zlib.crc32(task.encode()), n, 1])
            counts = np.empty((self._resamples, n), dtype=np.uint8)
            for r in range(self._resamples):
                counts[r] = np.bincount(generator.integers(n, size=n), minlength=n)
            self._memo[task] = counts
        return self._memo[task]
