"""Is tonight worse than the last published night? Same prompts, paired, tested, corrected.

What is compared. Cells (method, budget, task), and of each (method, budget) the mean of its task means, `all tasks`; by
score and by answer NLL; on the samples of both nights that have the same prompt (its hash, not only its id) and are ok
in both. A task with a sample whose prompt changed is retired: other prompts are no regression, and no evidence.

Test. Under the hypothesis that nothing changed, the two nights of a prompt could be swapped, so each difference is as
likely with the other sign (Fisher, The Design of Experiments, 1935). p is the share of sign patterns whose mean is at
least as bad: exact up to 16 differences that are not 0, else of 65,536 drawn ones. Samples that share a context
(`meta.group`) flip together. The bootstrap interval beside it is shown, not tested with: of eight samples that all got
a little worse it excludes 0 at any level, though chance does that once in 256 times.

Correction. Holm (Scandinavian Journal of Statistics 6, 1979) over scores and NLLs of all cells. Comparisons that cannot
be significant however their signs fall are not counted (Tarone, Biometrics 46, 1990): with k differences that are not 0
no p is below 2^-k. So a change that touches few cells is found with few samples, and one that touches everything needs
more than 8 per task or shows in `all tasks`. The tests raise a false alarm in at most `alpha` of the nights.

A regression is significant after correction and worse by more than the floor of its measure. Without a test: a sample
that was ok and has no score any more, kept bytes that grew, and seconds where a floor asks for it, on the very machine.

Each night is compared with the one before: losses below the floors can add up over many nights unseen.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from pydantic import Field, FiniteFloat

from harness.records.spec import Frozen
from leaderboards.nights.files import KEY, Night
from leaderboards.stats.bootstrap import Array, Bootstrap, Estimate, Indexes
from leaderboards.stats.comparable import budget_order

ALL = "all tasks"
SIGNS: Mapping[str, float] = {"score": -1.0, "nll": 1.0}
"""Measure to the sign of a change that is worse."""
EXACT = 16
DRAWS = 2**16
CHUNK = 2**22  # signs drawn at once
SEED = 0


class NightlyOptions(Frozen):
    """The `[nightly]` table of a TOML file. A change of the version retires every stored night.

    baseline: folder of published nights. alpha: chance of any false alarm by the tests of a night. Floors, above which
    a change counts: score_points (0-100), nll_nats (per token), bytes_percent, speed_percent (None: never).
    """

    version: int
    baseline: str
    alpha: FiniteFloat = Field(default=0.05, gt=0, lt=1)
    score_points: FiniteFloat = Field(default=5.0, ge=0)
    nll_nats: FiniteFloat = Field(default=0.05, ge=0)
    bytes_percent: FiniteFloat = Field(default=0.1, ge=0)
    speed_percent: FiniteFloat | None = Field(default=None, ge=0)

    def floor(self, measure: str) -> float:
        return self.score_points if measure == "score" else self.nll_nats


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


@dataclass(frozen=True)
class NightComparison:
    """Two nights. facts: regressions without a test. retired: what could not be compared, one line each.

    cells: (method, budget, task) compared. counted: comparisons that the correction for worse ones counts.
    """

    changes: tuple[Change, ...]
    regressed: tuple[Change, ...]
    improved: tuple[Change, ...]
    facts: tuple[str, ...]
    retired: tuple[str, ...]
    cells: int
    counted: int

    @property
    def regressions(self) -> int:
        return len(self.regressed) + len(self.facts)


def compare(before: Night, now: Night, options: NightlyOptions) -> NightComparison:
    """`now` against `before`, whatever machines they ran on; the order of their lines does not matter."""
    both, retired = _paired(before.table, now.table)
    found = list(_changes(both))
    least = np.array([c.least for c in found])
    worse, counted = holm(np.array([c.worse for c in found]), least, options.alpha)
    better, _ = holm(np.array([c.better for c in found]), least, options.alpha)
    corrected = zip(found, worse.tolist(), better.tolist(), strict=True)
    changes = tuple(replace(c, corrected_worse=w, corrected_better=b) for c, w, b in corrected)
    big = [c for c in changes if abs(c.loss) > options.floor(c.measure)]
    return NightComparison(
        changes=changes,
        regressed=tuple(c for c in big if c.corrected_worse <= options.alpha and c.loss > 0),
        improved=tuple(c for c in big if c.corrected_better <= options.alpha and c.loss < 0),
        facts=(*_lost(both), *_grown(both, options), *_slower(before, now, options)),
        retired=retired,
        cells=both.groupby(["method", "budget", "task"]).ngroups,
        counted=counted,
    )


def flip_p(parts: Array, *, seed: int = SEED) -> tuple[float, float, float]:
    """How probable a sum as high as that of `parts` [G] is, and one as low, if coins gave the signs; and the least p.

    Exact, or drawn with the sum itself counted as one draw (Phipson and Smyth 2010), so p is never 0; or the bound of
    Hoeffding (1963), exp(-sum^2 / 2 sum of squares), where that is below what draws can tell.
    """
    parts = parts[np.abs(parts) > 0]
    if not parts.size:
        return 1.0, 1.0, 1.0
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


def _paired(before: pd.DataFrame, now: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Lines of both nights with equal prompts, sorted, the earlier columns behind `_before`; and what is left out."""
    retired, kept = [], []
    prompts = [table.groupby(["task", "sample_id"]).prompt.max() for table in (before, now)]
    tasks = [set(table.task) for table in (before, now)]
    for task in sorted(tasks[0] | tasks[1]):
        if task not in tasks[0] & tasks[1]:
            retired.append(f"{task}: {_absent(task in tasks[0])}")
            continue
        old, new = (of[task] for of in prompts)
        old, new = old.align(new, join="inner")
        changed = int(((old != new) | (new == "")).sum())
        if changed or not len(new):
            retired.append(f"{task}: {changed} of {len(new)} prompts changed" if len(new) else f"{task}: other samples")
        else:
            kept.append(task)
    both = now.merge(before, on=KEY, suffixes=("", "_before"))
    both = both[both.task.isin(kept)].sort_values(KEY, ignore_index=True)
    cells = [set(zip(table.method, table.budget, strict=True)) for table in (before, now)]
    retired += [f"{c[0]} at {c[1]}: {_absent(c in cells[0])}" for c in sorted(cells[0] ^ cells[1])]
    return both, tuple(retired)


def _absent(gone: bool) -> str:
    return "not run tonight" if gone else "new tonight"


def _changes(both: pd.DataFrame) -> Iterator[Change]:
    """Every comparison, by budget, method and task, each task before all tasks."""
    cells = {(str(budget), str(method)): rows for (budget, method), rows in both.groupby(["budget", "method"])}
    for budget, method in sorted(cells, key=lambda cell: (budget_order(cell[0]), cell[1])):
        rows = cells[budget, method]
        bootstrap = Bootstrap(rows.task.tolist(), groups=[group or None for group in rows.group])
        for measure in SIGNS:
            pair = (rows[f"{measure}_before"].to_numpy(np.float64), rows[measure].to_numpy(np.float64))
            tasks = bootstrap.present(pair[0] - pair[1])
            parts = {task: {task: here} for task, here in tasks.items()}
            for task, of in {**parts, **({ALL: tasks} if len(tasks) > 1 else {})}.items():
                yield _change(bootstrap, pair, of, names=(budget, method, task, measure))


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


def _by_cell(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each cell's rows, and how it is called."""
    for (budget, method, task), own in rows.groupby(["budget", "method", "task"]):
        yield f"{method} at {budget}, {task}", own


def _lost(both: pd.DataFrame) -> Iterator[str]:
    """Cells with samples that were ok and are not any more."""
    for cell, rows in _by_cell(both[(both.status_before == "ok") & (both.status != "ok")]):
        counts = ", ".join(f"{n} {status}" for status, n in sorted(rows.status.value_counts().items()))
        yield f"{cell}: were ok: {counts}"


def _grown(both: pd.DataFrame, options: NightlyOptions) -> Iterator[str]:
    """Cells that keep more bytes on the samples that are ok in both nights."""
    for cell, rows in _by_cell(both[(both.status_before == "ok") & (both.status == "ok")]):
        before, now = int(rows.kv_bytes_before.sum()), int(rows.kv_bytes.sum())
        if now > before * (1 + options.bytes_percent / 100):
            grown = f"+{100 * (now / before - 1):.2f} %" if before else "from none"
            yield f"{cell}: kept bytes {grown}: {before:,} to {now:,}"


def _slower(before: Night, now: Night, options: NightlyOptions) -> Iterator[str]:
    """Phases that take longer than the floor allows, on the very machine for as many samples and cells."""
    same = before.about.machine_id == now.about.machine_id != "" and len(before.table) == len(now.table)
    if options.speed_percent is None or not same:
        return
    for phase, seconds in now.about.seconds:
        old = getattr(before.about.seconds, phase)
        if seconds > old * (1 + options.speed_percent / 100) and old:
            grown = f"{phase} +{100 * (seconds / old - 1):.1f} %: {old:.4g} to {seconds:.4g} s a sample"
            yield f"all methods at -, {ALL}: {grown}"
