"""Is tonight worse than the last published night? Same prompts, paired, tested, corrected.

What is compared. Cells (method, budget, task) and their means over tasks, as `leaderboards.stats.paired` says, and the
mean over all methods and budgets, by task and over tasks, which sees what a change of the engine does to all of them;
on the samples of both nights that have the same prompt (its hash, not only its id) and are ok in both. A task with a
sample whose prompt changed is retired: other prompts are no regression, and no evidence.

A regression is significant after correction and worse by more than the floor of its measure. The tests raise a false
alarm in at most `alpha` of the nights. Without a test: a cell that scored clearly above 0, by more than two standard
errors, and now is 0 on every prompt; a sample that was ok and has no score any more; kept bytes that grew; and seconds
where a floor asks for it, on the very machine. `tests/night_power.py` simulates what is found.

Each night is compared with the one before: losses below the floors can add up over many nights unseen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field, Strict

from harness.records.options import PathText
from harness.records.spec import Frozen
from leaderboards.nights.files import Night
from leaderboards.stats.bootstrap import Bootstrap
from leaderboards.stats.paired import ALL, EVERY, Change, changes, holm, joined

Floor = Annotated[float, Strict(), Field(ge=0, le=1e6)]


class NightlyOptions(Frozen):
    """The `[nightly]` table of a TOML file. A change of the version retires every stored night.

    baseline: folder of published nights. alpha: chance of any false alarm by the tests of a night. Floors, above which
    a change counts: score_points (0-100), nll_nats (per token), bytes_percent, speed_percent (None: never).
    """

    version: Annotated[int, Strict(), Field(ge=0, lt=1 << 31)]
    baseline: PathText
    alpha: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.05
    score_points: Floor = 1.0
    nll_nats: Floor = 0.05
    bytes_percent: Floor = 0.1
    speed_percent: Floor | None = None

    def floor(self, measure: str) -> float:
        return self.score_points if measure == "score" else self.nll_nats


@dataclass(frozen=True)
class NightComparison:
    """Two nights. facts: regressions without a test. retired: what could not be compared, one line each.

    fallen: of the facts, the cells that fell to 0.

    cells: (method, budget, task) compared. counted: comparisons that the correction for worse ones counts.
    """

    changes: tuple[Change, ...]
    regressed: tuple[Change, ...]
    improved: tuple[Change, ...]
    fallen: tuple[str, ...]
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
    found, fallen = list(changes(both, every=True)), tuple(_fallen(both))
    least = np.array([c.least for c in found])
    worse, counted = holm(np.array([c.worse for c in found]), least, options.alpha)
    better, _ = holm(np.array([c.better for c in found]), least, options.alpha)
    corrected = zip(found, worse.tolist(), better.tolist(), strict=True)
    told = tuple(replace(c, corrected_worse=w, corrected_better=b) for c, w, b in corrected)
    big = [c for c in told if abs(c.loss) > options.floor(c.measure)]
    return NightComparison(
        changes=told,
        regressed=tuple(c for c in big if c.corrected_worse <= options.alpha and c.loss > 0),
        improved=tuple(c for c in big if c.corrected_better <= options.alpha and c.loss < 0),
        fallen=fallen,
        facts=(*fallen, *_lost(both), *_grown(both, options), *_slower(before, now, options)),
        retired=retired,
        cells=both.groupby(["method", "budget", "task"]).ngroups,
        counted=counted,
    )


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
    both = joined(before[before.task.isin(kept)], now)
    cells = [set(zip(table.method, table.budget, strict=True)) for table in (before, now)]
    retired += [f"{c[0]} at {c[1]}: {_absent(c in cells[0])}" for c in sorted(cells[0] ^ cells[1])]
    return both, tuple(retired)


def _absent(gone: bool) -> str:
    return "not run tonight" if gone else "new tonight"


def _by_cell(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each cell's rows, and how it is called."""
    for (budget, method, task), own in rows.groupby(["budget", "method", "task"]):
        yield f"{method} at {budget}, {task}", own


def _fallen(both: pd.DataFrame) -> Iterator[str]:
    """Cells that scored clearly above 0 and are 0 on all of the samples that are scored in both nights."""
    for cell, rows in _by_cell(both[both.score_before.notna() & both.score.notna()]):
        bootstrap = Bootstrap(rows.task.tolist(), groups=[group or None for group in rows.group])
        before = rows.score_before.to_numpy(np.float64)
        clear = before.mean() > 2 * bootstrap.noise(before, np.arange(len(before)))  # never where there is no error
        if clear and not rows.score.any():
            yield f"{cell}: fell to 0 from {before.mean():.1f}, n {len(rows)}"


def _lost(both: pd.DataFrame) -> Iterator[str]:
    """Cells with samples that were ok and are not any more."""
    for cell, rows in _by_cell(both[(both.status_before == "ok") & (both.status != "ok")]):
        counts = ", ".join(f"{n} {status}" for status, n in sorted(rows.status.value_counts().items()))
        yield f"{cell}: were ok: {counts}"


def _grown(both: pd.DataFrame, options: NightlyOptions) -> Iterator[str]:
    """Cells that keep more bytes on the samples that are ok in both nights."""
    for cell, rows in _by_cell(both[(both.status_before == "ok") & (both.status == "ok")]):
        before, now = sum(rows.kv_bytes_before.tolist()), sum(rows.kv_bytes.tolist())
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
            yield f"{EVERY[1]} at {EVERY[0]}, {ALL}: {grown}"
