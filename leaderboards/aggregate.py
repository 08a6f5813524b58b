"""From records to one table per comparable setting: the one place where scores are averaged and intervals computed.

Axes. Records that differ in model, dtype, query mode, first_token, seed, or in any setting of their runs that decides
numbers (model revision, token limits, a task's protocol) never share a table: each combination is its own.

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
or there is none, the two are not told apart: they are `=`. The best cell is `*` only when it is told apart from every
other one. This is 95 % per comparison, without a correction for the number of methods, and `=` is no proof of equality.
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

Array = npt.NDArray[np.float64]
Cell = tuple[str, str]
"""(method, budget)."""

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MIN_PAIRS = 6
FEW = 10
FULL = "full"
STATUSES = ("ok", "skipped", "failed", "oom")


@dataclass(frozen=True, order=True)
class Axes:
    """What all records of a table share. settings: run settings that differ between the runs given, else empty."""

    model: str
    dtype: str
    query: str
    first_token: str
    seed: int
    settings: str = ""


@dataclass(frozen=True)
class Estimate:
    """A mean of task means over `n` samples with its interval; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Note:
    """A footnote: what (a note of the method, or a status), where, how often, and the first error."""

    method: str
    budget: str
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

    Draws depend on the seed, the task and its number of samples alone, so cells with the same samples see the same ones.
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
    settings = _settings(manifests)
    groups: dict[Axes, list[Record]] = defaultdict(list)
    for r in records:
        axes = Axes(r.model, r.dtype, r.query, r.first_token, r.seed, settings.get(r.run_id, ""))
        groups[axes].append(r)
    if not groups:
        raise HarnessError("no records to make a board of; run a benchmark first")
    return [_table(a, groups[a], baselines=baselines, seed=seed, resamples=resamples) for a in sorted(groups)]


def budget_order(budget: str) -> tuple[int, float, str]:
    """Sort key: without a budget first, then tokens, then fractions."""
    try:
        return (2 if "." in budget else 1, float(budget), budget)
    except ValueError:
        return (0 if budget == FULL else 3, 0.0, budget)


def _settings(manifests: Sequence[RunManifest]) -> dict[str, str]:
    """Run id to the number-deciding settings in which the runs differ; a setting all runs agree on is no axis."""
    runs: dict[str, dict[str, str]] = {}
    for m in manifests:
        fixed = {name: str(getattr(m.spec, name)) for name in ("max_tokens", "max_new_tokens", "nll_tokens")}
        protocols = {f"{task.name} protocol": task.protocol for task in m.spec.tasks}
        runs[m.run_id] = {"model revision": m.spec.model.revision, **fixed, **protocols}
    seen: dict[str, set[str]] = defaultdict(set)
    for values in runs.values():
        for name, value in values.items():
            seen[name].add(value)
    differ = sorted(name for name, values in seen.items() if len(values) > 1)
    return {run: ", ".join(f"{name} {v[name]}" for name in differ if name in v) for run, v in runs.items()}


def _table(axes: Axes, records: list[Record], *, baselines: Sequence[str], seed: int, resamples: int) -> Table:
    chosen, duplicates = _one_per_key(records)
    _check_prompts(chosen)
    cells: dict[Cell, dict[tuple[str, str], Record]] = defaultdict(dict)
    for r in chosen:
        cells[r.method, r.budget][r.task, r.sample_id] = r
    samples = sorted({(r.task, r.sample_id) for r in chosen})
    grid = _Grid(samples, cells, Bootstrap([task for task, _ in samples], seed=seed, resamples=resamples))
    used = {wanted: _baseline(wanted, cells) for wanted in baselines}
    marks = _marks(grid)
    rows = pd.DataFrame([{**asdict(axes), **_row(grid, cell, used), "mark": marks.get(cell, "")} for cell in cells])
    keys = {cell: (budget_order(cell[1]), _descending(grid.estimate(cell, "score").mean), cell[0]) for cell in cells}
    order = sorted(range(len(rows)), key=lambda i: keys[rows.method[i], rows.budget[i]])
    rows = rows.iloc[order].reset_index(drop=True)
    rows.attrs = {"seed": seed, "resamples": resamples, "level": LEVEL}
    tasks = pd.DataFrame([row for i in order for row in _task_rows(grid, list(cells)[i])])
    runs = tuple(sorted({r.run_id for r in records}))
    return Table(axes, rows, tasks, runs, len(samples), used, _notes(chosen), duplicates)


def _one_per_key(records: Iterable[Record]) -> tuple[list[Record], int]:
    """One record per key, sorted: ok before other statuses, then the smallest run id. And how many keys had several."""
    by_key: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for r in records:
        by_key[r.key].append(r)
    chosen = [
        min(by_key[key], key=lambda r: (STATUSES.index(r.status), r.run_id, r.model_dump_json())) for key in sorted(by_key)
    ]
    return chosen, sum(len(several) > 1 for several in by_key.values())


def _check_prompts(records: Iterable[Record]) -> None:
    prompts: dict[tuple[str, str], Record] = {}
    for r in records:
        if not r.prompt_sha256:
            continue
        first = prompts.setdefault((r.task, r.sample_id), r)
        if first.prompt_sha256 != r.prompt_sha256:
            raise HarnessError(
                f"{r.task} sample {r.sample_id} is not the same prompt in runs {first.run_id} and {r.run_id} "
                "(other data or another truncation); make one board for each"
            )


def _baseline(wanted: str, cells: Iterable[Cell]) -> str | None:
    """The label itself, else the only preset of that method, else None."""
    labels = {method for method, _ in cells if method.partition("@")[0] == wanted}
    if wanted in labels or not labels:
        return wanted if labels else None
    return labels.pop() if len(labels) == 1 else None
