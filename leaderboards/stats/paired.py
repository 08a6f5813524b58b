"""The same prompts at two times: paired differences of every cell, tested by sign flips, corrected for their number.

What is compared. Cells (method, budget, task), and of each (method, budget) the mean of its task means, `all tasks`; by
score and by answer NLL.

Test. Under the hypothesis that nothing changed, the two times of a prompt could be swapped, so each difference is as
likely with the other sign (Fisher, The Design of Experiments, 1935). p is the share of sign patterns whose mean is at
least as bad: exact up to 16 differences that are not 0, and where all are of one size (binomial); else of 65,536 drawn
ones. Samples that share a context (`meta.group`) flip together. The bootstrap interval beside it is shown, not tested
with: of eight samples that all got a little worse it excludes 0 at any level, though chance does that once in 256
times.

Correction. Holm (Scandinavian Journal of Statistics 6, 1979) over scores and NLLs of all cells. Comparisons that cannot
be significant however their signs fall are not counted (Tarone, Biometrics 46, 1990): with k differences that are not 0
no p is below 2^-k. So a change that touches few cells is found with few samples.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from harness.records.record import Record
from leaderboards.stats.bootstrap import Array, Bootstrap, Estimate, Indexes
from leaderboards.stats.comparable import budget_order

KEY = ["task", "sample_id", "method", "budget"]
COLUMNS = ["task", "sample_id", "prompt", "group", "method", "budget", "status", "score", "nll", "kv_bytes"]
"""score: 0-100; nll: nats a token; both empty where there is none. prompt: 16 hex digits of its sha256."""
PROMPT_DIGITS = 16
ALL = "all tasks"
EVERY = ("all", "all methods")
"""Budget and method under which the mean over the cells of every prompt stands."""
SIGNS: Mapping[str, float] = {"score": -1.0, "nll": 1.0}
"""Measure to the sign of a change that is worse."""
EXACT = 16
DRAWS = 2**16
CHUNK = 2**22  # signs drawn at once
SEED = 0


@dataclass(frozen=True)
class Change:
    """One comparison. change: now minus before, over `n` samples, of which `moved` clusters differ.

    worse, better: one-sided p, as tested and after correction. least: the smallest that the differences allow.
    """

    budget: str
    method: str
    task: str
    measure: str
    before: float
    now: float
    change: Estimate
    moved: int
    least: float
    worse: float
    better: float
    corrected_worse: float = 1.0
    corrected_better: float = 1.0

    @property
    def loss(self) -> float:
        """Positive where tonight is worse."""
        return SIGNS[self.measure] * self.change.mean


def table_of(records: Sequence[Record]) -> pd.DataFrame:
    """A line of `COLUMNS` for each record. Records: one per key."""
    return pd.DataFrame([_line(r) for r in records], columns=COLUMNS)


def joined(before: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """Lines of both tables with equal keys, sorted, the earlier columns behind `_before`."""
    return now.merge(before, on=KEY, suffixes=("", "_before")).sort_values(KEY, ignore_index=True)


def changes(both: pd.DataFrame, *, every: bool = False) -> Iterator[Change]:
    """Every comparison of a `joined` table, by budget, method and task, each task before all tasks.

    every: also of the means over all cells.
    """
    cells = {(str(budget), str(method)): rows for (budget, method), rows in both.groupby(["budget", "method"])}
    order = sorted(cells, key=lambda cell: (budget_order(cell[0]), cell[1]))
    if every and len(cells) > 1:
        cells[EVERY] = _over_cells(both)
        order.append(EVERY)
    for budget, method in order:
        rows = cells[budget, method]
        bootstrap = Bootstrap(rows.task.tolist(), groups=[group or None for group in rows.group])
        for measure in SIGNS:
            pair = (rows[f"{measure}_before"].to_numpy(np.float64), rows[measure].to_numpy(np.float64))
            tasks = bootstrap.present(pair[0] - pair[1])
            parts = {task: {task: here} for task, here in tasks.items()}
            for task, of in {**parts, **({ALL: tasks} if len(tasks) > 1 else {})}.items():
                yield _change(bootstrap, pair, of, names=(budget, method, task, measure))


def _over_cells(both: pd.DataFrame) -> pd.DataFrame:
    """A line for each prompt: means over the cells that have a value both times."""
    pairs = both[["task", "sample_id", "group"]].copy()
    for measure in SIGNS:
        names = [f"{measure}_before", measure]
        there = both[names].notna().all(axis=1).to_numpy()
        pairs[names] = np.where(there[:, None], both[names].to_numpy(np.float64), math.nan)
    return pairs.groupby(["task", "sample_id"], as_index=False).agg(
        {"group": "first"} | {name: "mean" for measure in SIGNS for name in (f"{measure}_before", measure)}
    )


def _change(
    bootstrap: Bootstrap, pair: tuple[Array, Array], tasks: Mapping[str, Indexes], *, names: tuple[str, str, str, str]
) -> Change:
    """One comparison. pair: values before and now, [S]; tasks: task to the indexes of its samples that have both."""
    before, now = (float(np.mean([values[here].mean() for here in tasks.values()])) for values in pair)
    difference = np.round(pair[1] - pair[0], 9)  # what both nights have in common leaves exactly 0
    sums = [bootstrap.cluster_sums(difference, here)[:, 1] / here.size for here in tasks.values()]
    parts = SIGNS[names[-1]] * np.concatenate(sums) / len(tasks)  # [G], each cluster's part of the mean
    worse, better, least = flip_p(parts, seed=zlib.crc32(" ".join(names).encode()))
    change = bootstrap.estimate(difference, weights=dict.fromkeys(tasks, 1.0))
    return Change(*names, before, now, change, int(np.count_nonzero(parts)), least, worse, better)


def flip_p(parts: Array, *, seed: int = SEED) -> tuple[float, float, float]:
    """How probable a sum as high as that of `parts` [G] is, and one as low, if coins gave the signs; and the least p.

    Exact up to `EXACT` parts, and where all are of one size, by the binomial distribution. Else drawn, with the sum
    itself counted as one draw (Phipson and Smyth 2010), so p is never 0; or the bound of Hoeffding (1963),
    exp(-sum^2 / 2 sum of squares), where that is below what draws can tell.
    """
    parts = parts[np.abs(parts) > 0]
    if not parts.size:
        return 1.0, 1.0, 1.0
    sizes = np.abs(parts)
    if np.ptp(sizes) <= 1e-9 * sizes.max():
        n, up = parts.size, np.count_nonzero(parts > 0)
        return float(special.bdtrc(up - 1, n, 0.5)) if up else 1.0, float(special.bdtr(up, n, 0.5)), 2.0**-n
    if parts.size <= EXACT:
        sums, extra = np.zeros(1), 0
        for part in parts:
            sums = np.concatenate([sums + part, sums - part])
        bounds = [1.0, 1.0, 1.0]
    else:
        sums, extra = _drawn(parts, seed), 1
        exponent = [max(0.0, float(end)) ** 2 for end in (parts.sum(), -parts.sum(), np.abs(parts).sum())]
        bounds = [math.exp(-square / 2 / float(parts @ parts)) for square in exponent]
    total, near = parts.sum(), 1e-9 * np.abs(parts).sum()  # patterns that tie but for rounding are ties
    high, low = np.count_nonzero(sums >= total - near), np.count_nonzero(sums <= total + near)
    n = sums.size + extra
    found = ((int(high) + extra) / n, (int(low) + extra) / n, max(2.0**-parts.size, extra / n))
    worse, better, least = map(min, found, bounds)
    return worse, better, least


def holm(p: Array, least: Array, alpha: float) -> tuple[Array, int]:
    """Tarone's and Holm's correction of p [M], and how many are counted; what is not has 1.

    least: [M], the smallest that each p can be.
    """
    corrected = np.ones_like(p)
    bounds = (k for k in range(1, p.size + 1) if np.count_nonzero(least <= alpha / k) <= k)
    counted = np.flatnonzero(least <= alpha / next(bounds, 1))
    order = counted[np.argsort(p[counted], kind="stable")]
    steps = p[order] * (order.size - np.arange(order.size))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected, int(order.size)


def _drawn(parts: Array, seed: int) -> Array:
    """[DRAWS]: sums of `parts` [G] with random signs."""
    generator, rows = np.random.default_rng([SEED, seed]), max(1, CHUNK // parts.size)
    sizes = [(min(rows, DRAWS - first), parts.size) for first in range(0, DRAWS, rows)]
    chunks = [generator.integers(0, 2, size=size, dtype=np.int8) @ parts for size in sizes]
    return np.asarray(2 * np.concatenate(chunks) - parts.sum())


def _line(r: Record) -> tuple[object, ...]:
    score, nll = (r.metrics.get("score"), r.nll) if r.status == "ok" else (None, None)
    group = r.meta.get("group")
    return (
        r.task,
        r.sample_id,
        r.prompt_sha256[:PROMPT_DIGITS],
        "" if group is None else str(group),
        r.method,
        r.budget,
        r.status,
        math.nan if score is None else round(100 * score, 6),
        math.nan if nll is None else round(nll, 9),
        r.kv_bytes,
    )
