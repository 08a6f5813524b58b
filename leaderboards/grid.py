"""The records of one table as arrays over its samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError
from harness.records import Record
from leaderboards.axes import FULL, STATUSES
from leaderboards.bootstrap import Array, Bootstrap, Estimate

Cell = tuple[str, str]
"""(method, budget)."""
Mask = npt.NDArray[np.bool_]

MEASURED = ("ttft_s", "tpot_s", "tokens_per_s", "peak_bytes")
"""What `Record.measured` adds; of seconds the median."""

SKIPPED = STATUSES.index("skipped")


@dataclass
class Grid:
    """One row of arrays per cell, [S] over the samples, which are sorted by (task, id).

    metas: [S], the sample's own fields, of an ok record where there is one.
    """

    samples: list[tuple[str, str]]
    metas: list[dict[str, Any]]
    cells: dict[Cell, dict[tuple[str, str], Record]]
    bootstrap: Bootstrap
    _values: dict[tuple[Cell, str], Array] = field(default_factory=dict)
    _states: dict[Cell, npt.NDArray[np.int8]] = field(default_factory=dict)
    _expected: dict[str, Mask] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record], *, seed: int, resamples: int) -> Grid:
        """records: one per key (`axes.one_per_key`), of one table."""
        cells: dict[Cell, dict[tuple[str, str], Record]] = defaultdict(dict)
        metas: dict[tuple[str, str], Record] = {}
        for r in records:
            sample = (r.task, r.sample_id)
            cells[r.method, r.budget][sample] = r
            known = metas.setdefault(sample, r)
            if (bool(r.meta), r.status == "ok") > (bool(known.meta), known.status == "ok"):
                metas[sample] = r
        samples = sorted(metas)
        groups = [metas[s].meta.get("group") for s in samples]
        bootstrap = Bootstrap(
            [task for task, _ in samples],
            groups=[None if g is None else str(g) for g in groups],
            seed=seed,
            resamples=resamples,
        )
        return cls(samples, [metas[s].meta for s in samples], dict(cells), bootstrap)

    def values(self, cell: Cell, what: str) -> Array:
        """[S]: `score` (0-100), `needle` (% still cached), one of `MEASURED` or a numeric field.

        NaN where the cell is not ok.
        """
        if (cell, what) not in self._values:
            records = (self.cells[cell].get(sample) for sample in self.samples)
            column = [_value(r, what) if r is not None and r.status == "ok" else math.nan for r in records]
            self._values[cell, what] = np.array(column, dtype=np.float64)
        return self._values[cell, what]

    def estimate(self, cell: Cell, what: str, *, minus: Cell | None = None) -> Estimate:
        """Unweighted mean of task means; of the paired difference when there is a cell to subtract."""
        values = self.values(cell, what)
        return self.bootstrap.estimate(values if minus is None else values - self.values(minus, what))

    def counts(self, cell: Cell, where: Mask | None = None) -> Counter[str]:
        """Records by status, of the samples in `where` [S]."""
        states = self._states_of(cell)
        present = states[states >= 0] if where is None else states[where & (states >= 0)]
        return Counter(
            {STATUSES[int(code)]: int(n) for code, n in zip(*np.unique(present, return_counts=True), strict=True)}
        )

    def expected(self, budget: str) -> Mask:
        """[S]: samples that some cell of this budget did not skip; of any budget for cells without one."""
        if budget not in self._expected:
            states = [self._states_of(c) for c in self.cells if budget in (c[1], FULL)]
            self._expected[budget] = np.any([(s >= 0) & (s != SKIPPED) for s in states], axis=0)
        return self._expected[budget]

    def complete(self, cell: Cell) -> bool:
        """Whether the cell has every sample that is expected, and one at least."""
        ok = self._states_of(cell) == 0
        return bool(ok.any() and ok[self.expected(cell[1])].all())

    def over_budget(self, cell: Cell) -> int:
        """Scored samples that took more bytes than asked."""
        return int(np.nansum(self.values(cell, "over_budget")))

    def few(self, cell: Cell) -> bool:
        """Whether some task of the cell has too few clusters for its interval."""
        return self.bootstrap.few(self.values(cell, "score"))

    def told_apart(self, best: Cell, other: Cell) -> bool:
        """Whether `best` has the higher score, by the interval of the paired difference and of enough clusters."""
        few = self.few(best) or self.few(other)
        return not few and self.estimate(best, "score", minus=other).low > 0

    def measured(self) -> bool:
        """Whether some cell was also measured by itself."""
        return any(r.measured is not None for cell in self.cells.values() for r in cell.values())

    def _states_of(self, cell: Cell) -> npt.NDArray[np.int8]:
        """[S]: index into STATUSES, -1 where the cell has no record."""
        if cell not in self._states:
            records = (self.cells[cell].get(sample) for sample in self.samples)
            codes = [-1 if r is None else STATUSES.index(r.status) for r in records]
            self._states[cell] = np.array(codes, dtype=np.int8)
        return self._states[cell]


def _value(record: Record, what: str) -> float:
    if what == "needle":
        return needle_percent(record)
    if what in MEASURED:
        value = None if record.measured is None else getattr(record.measured, what)
        return math.nan if value is None else float(getattr(value, "median", value))
    if what != "score":
        value = getattr(record, what)
        return math.nan if value is None else float(value)
    score = record.metrics.get("score")
    if score is None:
        where = f"{record.task} sample {record.sample_id} {record.method} at {record.budget}"
        raise HarnessError(f"run {record.run_id}: {where} is ok but has no score; run that task again")
    return 100 * score


def needle_percent(record: Record) -> float:
    """Share of the needle tokens still cached, mean over layers and KV heads; NaN for a sample without needles."""
    kept = [count for layer in record.needle_kept for count in layer]
    if not record.needle_tokens or not kept:
        return math.nan
    return 100 * sum(kept) / (len(kept) * record.needle_tokens)
