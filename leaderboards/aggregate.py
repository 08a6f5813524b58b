"""From records to one table per comparable setting: the one place where scores are averaged and intervals computed.

Only records with equal axes share a table (`leaderboards.axes`).

Averages. A score is 0-100. A task's score is the mean over its samples; a cell's score is the unweighted mean of its
task means, as LongBench averages. NLL (nats per token) is averaged in the same way over the samples that have one.
Bytes are means over samples. Only `ok` records count; what is missing is counted beside the mean, never scored 0.

Intervals. Percentile bootstrap, 95 %: samples are redrawn within each task, task means averaged, 2,000 times, with a
seed kept in the table. A difference is paired: it is taken per sample, on the samples that both cells have, and the
differences are redrawn. There is no interval where it would mean nothing: below 6 pairs (no two-sided sign test can
reach 5 % with fewer) or with a task of one sample. With few samples per task the interval is too narrow, by about
sqrt(1 - 1/n); cells with fewer than 10 in some task are flagged.

Marks. At each budget the best cell is the one with the highest mean among those that are complete and within their
bytes. Every other cell within its bytes is compared with it, paired. Where the interval of that difference includes 0,
there is none, or it rests on fewer than 10 samples in some task, the two are not told apart: they are `=`. The best
cell is `*` only when it is told apart from every other one. This is 95 % per comparison, without a correction for the
number of methods, and `=` is no proof of equality.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.errors import HarnessError
from harness.records import Record, RunManifest
from leaderboards.axes import FULL, STATUSES, Axes, budget_order, one_per_key, split_by_axes

Array = npt.NDArray[np.float64]
Cell = tuple[str, str]
"""(method, budget)."""

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MIN_PAIRS = 6
FEW = 10


@dataclass(frozen=True)
class Estimate:
    """A mean of task means over `n` samples with its interval; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Note:
    """A footnote: what (a note of the method, or a status), where, in how many records, and the first error."""

    method: str
    budgets: tuple[str, ...]
    what: str
    count: int
    error: str = ""


@dataclass(frozen=True)
class Table:
    """One board. `rows`: one per (budget, method), columns as `_row` writes them; `tasks`: one per cell and task.

    baselines: wanted label to the label used, or None. duplicates: cells measured in several runs; one of each is used.
    """

    axes: Axes
    rows: pd.DataFrame
    tasks: pd.DataFrame
    run_ids: tuple[str, ...]
    samples: int
    baselines: dict[str, str | None]
    notes: tuple[Note, ...]
    duplicates: int


class Bootstrap:
    """Stratified percentile bootstrap over the samples of one table.

    Draws depend on the seed, the task and its number of samples alone, so cells with the same samples
    see the same ones.
    """

    def __init__(self, tasks: Sequence[str], *, seed: int = SEED, resamples: int = RESAMPLES) -> None:
        """tasks: [S], the task of each sample."""
        names = np.asarray(tasks, dtype=object)
        self._rows = {task: np.flatnonzero(names == task) for task in sorted(set(tasks))}
        self._seed = seed
        self._resamples = resamples
        self._memo: dict[tuple[str, int], npt.NDArray[np.uint16]] = {}

    def estimate(self, values: Array) -> Estimate:
        """values: [S], NaN where a sample has none."""
        strata = {task: values[rows][~np.isnan(values[rows])] for task, rows in self._rows.items()}
        strata = {task: v for task, v in strata.items() if v.size}
        n = sum(v.size for v in strata.values())
        if not n:
            return Estimate(math.nan, math.nan, math.nan, 0)
        mean = float(np.mean([v.mean() for v in strata.values()]))
        if n < MIN_PAIRS or min(v.size for v in strata.values()) < 2:
            return Estimate(mean, math.nan, math.nan, n)
        draws = np.mean([self._counts(task, v.size) @ v / v.size for task, v in strata.items()], axis=0)
        edge = (1 - LEVEL) / 2
        low, high = np.quantile(np.round(draws, 9), [edge, 1 - edge])  # rounded: a sum that is 0 must compare as 0
        return Estimate(mean, float(low), float(high), n)

    def _counts(self, task: str, n: int) -> npt.NDArray[np.uint16]:
        """[resamples, n]: how often each of n samples is drawn."""
        if (task, n) not in self._memo:
            generator = np.random.default_rng([self._seed, zlib.crc32(task.encode()), n])
            counts = generator.multinomial(n, np.full(n, 1 / n), size=self._resamples)
            self._memo[task, n] = counts.astype(np.uint16)
        return self._memo[task, n]


@dataclass
class _Grid:
    """Records of one table as arrays over its samples: [S] per cell, NaN where the cell is not ok there."""

    samples: list[tuple[str, str]]  # (task, sample id)
    cells: dict[Cell, dict[tuple[str, str], Record]]
    bootstrap: Bootstrap
    _memo: dict[tuple[Cell, str], Array] = field(default_factory=dict)

    def values(self, cell: Cell, what: str) -> Array:
        """[S]: `score` (0-100) or a numeric field of the record."""
        if (cell, what) not in self._memo:
            records = (self.cells[cell].get(sample) for sample in self.samples)
            column = [_value(r, what) if r is not None and r.status == "ok" else math.nan for r in records]
            self._memo[cell, what] = np.array(column, dtype=np.float64)
        return self._memo[cell, what]

    def estimate(self, cell: Cell, what: str, *, minus: Cell | None = None) -> Estimate:
        values = self.values(cell, what)
        return self.bootstrap.estimate(values if minus is None else values - self.values(minus, what))

    def counts(self, cell: Cell) -> Counter[str]:
        return Counter(record.status for record in self.cells[cell].values())

    def expected(self, budget: str) -> set[tuple[str, str]]:
        """Samples that some cell of this budget did not skip; of any budget for cells without one."""
        cells = (records for (_, b), records in self.cells.items() if budget in (b, FULL))
        return {sample for records in cells for sample, r in records.items() if r.status != "skipped"}

    def complete(self, cell: Cell) -> bool:
        ok = {sample for sample, record in self.cells[cell].items() if record.status == "ok"}
        return bool(ok) and ok >= self.expected(cell[1])


def aggregate(
    records: Iterable[Record],
    *,
    manifests: Sequence[RunManifest] = (),
    baselines: Sequence[str] = ("fullkv", "snapkv"),
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> list[Table]:
    """Tables in the order of their axes. The order of `records` does not matter.

    manifests: of the runs the records come from; without them only the axes that are in the records are told apart.

    Raises HarnessError when there is no record, an ok record has no score, or one sample id stands for two prompts.
    """
    groups = split_by_axes(records, manifests=manifests)
    if not groups:
        raise HarnessError("no records to make a board of; run a benchmark first")
    return [_table(a, group, baselines=baselines, seed=seed, resamples=resamples) for a, group in groups.items()]


def _table(axes: Axes, records: list[Record], *, baselines: Sequence[str], seed: int, resamples: int) -> Table:
    chosen, duplicates = one_per_key(records)
    cells: dict[Cell, dict[tuple[str, str], Record]] = defaultdict(dict)
    for r in chosen:
        cells[r.method, r.budget][r.task, r.sample_id] = r
    samples = sorted({(r.task, r.sample_id) for r in chosen})
    grid = _Grid(samples, dict(cells), Bootstrap([task for task, _ in samples], seed=seed, resamples=resamples))
    used = {wanted: _baseline(wanted, cells) for wanted in baselines}
    marks = _marks(grid)
    order = sorted(
        cells, key=lambda c: (budget_order(c[1]), -np.nan_to_num(grid.estimate(c, "score").mean, nan=-1), c[0])
    )
    rows = pd.DataFrame([{**asdict(axes), **_row(grid, c, used), "mark": marks.get(c, "")} for c in order])
    rows.attrs = {"seed": seed, "resamples": resamples, "level": LEVEL}
    tasks = pd.DataFrame([row for c in order for row in _task_rows(grid, c)])
    runs = tuple(sorted({r.run_id for r in records}))
    return Table(axes, rows, tasks, runs, len(samples), used, _notes(chosen), duplicates)


def _baseline(wanted: str, cells: Iterable[Cell]) -> str | None:
    """The label itself, else the only preset of that method, else None."""
    labels = {method for method, _ in cells if method.partition("@")[0] == wanted}
    if wanted in labels or not labels:
        return wanted if labels else None
    return labels.pop() if len(labels) == 1 else None


def _row(grid: _Grid, cell: Cell, baselines: dict[str, str | None]) -> dict[str, Any]:
    """One row of the table.

    Columns: `score_points` (0-100) and `nll_nats` (per token), each with `_mean _low _high _n` and the same behind
    `_vs_<baseline>`; mean bytes; counts by status; and flags in words.
    """
    row: dict[str, Any] = {"budget": cell[1], "method": cell[0]}
    for name, what in (("score_points", "score"), ("nll_nats", "nll")):
        row |= _columns(name, grid.estimate(cell, what))
        for wanted, label in baselines.items():
            candidates = [(label, budget) for budget in (cell[1], FULL) if label is not None and label != cell[0]]
            base = next((c for c in candidates if c in grid.cells), None)
            paired = grid.estimate(cell, what, minus=base) if base else Estimate(math.nan, math.nan, math.nan, 0)
            row |= _columns(f"{name}_vs_{wanted}", paired)
    counts = grid.counts(cell)
    sizes = {what: np.nansum(grid.values(cell, what)) for what in ("kv_bytes", "asked_bytes", "full_bytes")}
    row |= {f"{what}_mean": size / counts["ok"] if counts["ok"] else math.nan for what, size in sizes.items()}
    full = sizes["full_bytes"]
    row |= {
        "kv_percent_of_full": 100 * sizes["kv_bytes"] / full if full else math.nan,
        **{f"n_{status}": counts[status] for status in STATUSES},
        "n_over_budget": _over_budget(grid, cell),
        "n_expected": len(grid.expected(cell[1])),
    }
    present = {"incomplete": not grid.complete(cell), **{s: counts[s] for s in STATUSES[1:]}}
    present |= {"over_budget": row["n_over_budget"], "few": _few(grid, cell)}
    return {**row, "flags": " ".join(name for name, here in present.items() if here)}


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {f"{name}_{part}": value for part, value in asdict(estimate).items()}


def _over_budget(grid: _Grid, cell: Cell) -> int:
    return sum(r.over_budget for r in grid.cells[cell].values() if r.status == "ok")


def _few(grid: _Grid, cell: Cell) -> bool:
    per_task = Counter(task for (task, _), record in grid.cells[cell].items() if record.status == "ok")
    return any(n < FEW for n in per_task.values())


def _marks(grid: _Grid) -> dict[Cell, str]:
    """`*` or `=` for the cells that have one; the rule is in the module's header."""
    marks: dict[Cell, str] = {}
    for budget in {budget for _, budget in grid.cells} - {FULL}:
        rivals = [c for c in grid.cells if c[1] == budget and grid.counts(c)["ok"] and not _over_budget(grid, c)]
        fair = [c for c in rivals if grid.complete(c)]
        if len(rivals) < 2 or not fair:
            continue
        best = max(fair, key=lambda c: (grid.estimate(c, "score").mean, c[0]))
        others = [c for c in rivals if c != best]
        tied = [c for c in others if not _told_apart(grid, best, c)]
        marks.update(dict.fromkeys([best, *tied], "=" if tied else "*"))
    return marks


def _told_apart(grid: _Grid, best: Cell, other: Cell) -> bool:
    few = _few(grid, best) or _few(grid, other)
    return not few and grid.estimate(best, "score", minus=other).low > 0


def _task_rows(grid: _Grid, cell: Cell) -> list[dict[str, Any]]:
    expected = Counter(task for task, _ in grid.expected(cell[1]))
    rows = []
    for task in sorted({task for task, _ in grid.samples}):
        here = np.array([name == task for name, _ in grid.samples])
        scores, nll = grid.values(cell, "score")[here], grid.values(cell, "nll")[here]
        n, n_nll = int((~np.isnan(scores)).sum()), int((~np.isnan(nll)).sum())
        row = {"budget": cell[1], "method": cell[0], "task": task, "n_ok": n, "n_expected": expected[task]}
        row["score_points_mean"] = np.nansum(scores) / n if n else math.nan
        row["nll_nats_mean"] = np.nansum(nll) / n_nll if n_nll else math.nan
        rows.append(row)
    return rows


def _notes(records: Sequence[Record]) -> tuple[Note, ...]:
    """One per method and note, and one per method and status that is not ok, with the first error in key order."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in records:
        states = {r.status if r.status != "ok" else "", "over budget" if r.over_budget else ""}
        for what in {*r.notes, *states} - {""}:
            found[r.method, what].append(r)
    notes = []
    for (method, what), where in sorted(found.items()):
        budgets = tuple(sorted({r.budget for r in where}, key=budget_order))
        error = next((r.error for r in where if r.error), "") if what in STATUSES else ""
        notes.append(Note(method, budgets, what, len(where), error))
    return tuple(notes)


def _value(record: Record, what: str) -> float:
    if what != "score":
        value = getattr(record, what)
        return math.nan if value is None else float(value)
    score = record.metrics.get("score")
    if score is None:
        where = f"{record.task} sample {record.sample_id} {record.method} at {record.budget}"
        raise HarnessError(f"run {record.run_id}: {where} is ok but has no score; run that task again")
    return 100 * score
