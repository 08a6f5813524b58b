"""The records of one table as arrays over its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError
from harness.records.board_record import BoardRecord, board_records
from harness.records.board_record import needle_percent as needle_percent
from harness.records.record import CellKey, Memory, Record
from leaderboards.stats.bootstrap import Array, Bootstrap, Estimate
from leaderboards.stats.comparable import FULL, STATUSES

Mask = npt.NDArray[np.bool_]

MEASURED = ("ttft_s", "tpot_s", "tokens_per_s", "peak_bytes")
"""What `Record.measured` adds; of seconds the median."""
Wanted = tuple[CellKey, str, CellKey | None]
"""An estimate: of a cell, of what, and which cell is subtracted."""

SKIPPED = STATUSES.index("skipped")


@dataclass
class Grid:
    """One row of arrays per cell, [S] over the samples, which are sorted by (task, id).

    metas: [S], the sample's own fields, of an ok record where there is one. cells: each [S], None where it has none.
    """

    samples: list[tuple[str, str]]
    metas: list[Mapping[str, Any]]
    cells: dict[CellKey, list[BoardRecord | None]]
    bootstrap: Bootstrap
    _values: dict[tuple[CellKey, str], Array] = field(default_factory=dict)
    _estimates: dict[Wanted, Estimate] = field(default_factory=dict)
    _few: dict[CellKey, bool] = field(default_factory=dict)
    _states: dict[CellKey, npt.NDArray[np.int8]] = field(default_factory=dict)
    _expected: dict[str, Mask] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record | BoardRecord], *, seed: int, resamples: int) -> Grid:
        """The grid of the records of one table, one per key (`comparable.one_per_key`)."""
        found = list(board_records(records))
        metas: dict[tuple[str, str], BoardRecord] = {}
        for r in found:
            known = metas.setdefault((r.task, r.sample_id), r)
            if known is not r and (r.known, r.status == "ok") > (known.known, known.status == "ok"):
                metas[r.task, r.sample_id] = r
        samples = sorted(metas)
        places = {sample: i for i, sample in enumerate(samples)}
        cells: dict[CellKey, list[BoardRecord | None]] = {}
        for r in found:
            cell = (r.method, r.budget)
            if cell not in cells:
                cells[cell] = [None] * len(samples)
            cells[cell][places[r.task, r.sample_id]] = r
        groups = [metas[s].meta.get("group") for s in samples]
        bootstrap = Bootstrap(
            [task for task, _ in samples],
            groups=[None if g is None else str(g) for g in groups],
            seed=seed,
            resamples=resamples,
        )
        return cls(samples, [metas[s].meta for s in samples], cells, bootstrap)

    def values(self, cell: CellKey, what: str) -> Array:
        """[S]: `score` (0-100), `needle` (% still cached), one of `MEASURED` or a numeric field.

        NaN where the cell is not ok.
        """
        if (cell, what) not in self._values:
            value = _reader(what)
            column = [value(r) if r is not None and r.status == "ok" else None for r in self.cells[cell]]
            self._values[cell, what] = np.array(column, dtype=np.float64)  # None becomes NaN
        return self._values[cell, what]

    def estimate(self, cell: CellKey, what: str, *, minus: CellKey | None = None) -> Estimate:
        """Unweighted mean of task means; of the paired difference when there is a cell to subtract."""
        wanted = (cell, what, minus)
        self.prepare([wanted])
        return self._estimates[wanted]

    def prepare(self, wanted: Iterable[Wanted]) -> None:
        """Make many estimates in one pass; `estimate` then has them at hand."""
        lacking = [one for one in dict.fromkeys(wanted) if one not in self._estimates]
        columns = (
            self.values(cell, what) if minus is None else self.values(cell, what) - self.values(minus, what)
            for cell, what, minus in lacking
        )
        self._estimates |= zip(lacking, self.bootstrap.estimates(columns), strict=True)

    def counts(self, cell: CellKey, where: Mask | None = None) -> Counter[str]:
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

    def complete(self, cell: CellKey) -> bool:
        """Whether the cell has every sample that is expected, and one at least."""
        ok = self._states_of(cell) == 0
        return bool(ok.any() and ok[self.expected(cell[1])].all())

    def over_budget(self, cell: CellKey) -> int:
        """Scored samples that took more bytes than asked."""
        return int(np.nansum(self.values(cell, "over_budget")))

    def few(self, cell: CellKey) -> bool:
        """Whether some task of the cell has too few clusters for its interval."""
        if cell not in self._few:
            self._few[cell] = self.bootstrap.few(self.values(cell, "score"))
        return self._few[cell]

    def told_apart(self, best: CellKey, other: CellKey) -> bool:
        """Whether `best` has the higher score, by the interval of the paired difference and of enough clusters."""
        few = self.few(best) or self.few(other)
        return not few and self.estimate(best, "score", minus=other).low > 0

    def measured(self) -> bool:
        """Whether some cell was also measured by itself."""
        return any(r is not None and r.timed is not None for cell in self.cells.values() for r in cell)

    def memory(self, cell: CellKey) -> Memory:
        """`simulated` where it is in some record of the cell."""
        simulated = any(r is not None and r.memory == "simulated" for r in self.cells[cell])
        return "simulated" if simulated else "physical"

    def _states_of(self, cell: CellKey) -> npt.NDArray[np.int8]:
        """[S]: index into STATUSES, -1 where the cell has no record."""
        if cell not in self._states:
            codes = [-1 if r is None else STATUSES.index(r.status) for r in self.cells[cell]]
            self._states[cell] = np.array(codes, dtype=np.int8)
        return self._states[cell]


def _reader(what: str) -> Callable[[BoardRecord], float | None]:
    if what == "score":
        return _score
    field = attrgetter(what)
    return (lambda r: None if r.timed is None else field(r.timed)) if what in MEASURED else field


def _score(r: BoardRecord) -> float:
    if r.score is None:
        where = f"{r.task} sample {r.sample_id} {r.method} at {r.budget}"
        raise HarnessError(f"run {r.run_id}: {where} is ok but has no score; run that task again")
    return 100 * r.score
