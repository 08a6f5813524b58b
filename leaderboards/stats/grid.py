"""The records of one table as arrays over its samples."""

from collections import Counter
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import numpy as np

from harness.errors import HarnessError
from harness.records.board_record import BoardRecord, Decoded, Sent, board_records
from harness.records.board_record import needle_percent as needle_percent
from harness.records.record import CellKey, Memory, Record
from leaderboards.stats.bootstrap import Array, Bootstrap, Estimate, Mask
from leaderboards.stats.comparable import NOT_GIVEN, STATUSES

MEASURED = ("ttft_s", "tpot_s", "tokens_per_s", "peak_bytes")
"""What `Record.measured` adds; of seconds the median."""
DECODED = Decoded._fields
"""What is known of long answers."""
SENT = Sent._fields
"""What is known of caches that were sent."""
PARTS = {"timed": MEASURED, "decoded": DECODED, "relayed": SENT}
Wanted = tuple[CellKey, str, CellKey | None]
"""An estimate: of a cell, of what, and which cell is subtracted."""


class Grid:
    """The cells of one table as arrays, [S] over the samples, which are sorted by (task, id).

    metas: [S], the sample's own fields, of an ok record where there is one. groups: [S], the text that it was drawn
    from, None where it names none. cells: each [S], None where it has none.
    """

    def __init__(self, records: Iterable[Record | BoardRecord], *, seed: int, resamples: int) -> None:
        """records: one per key (`comparable.one_per_key`)."""
        found = list(board_records(records))
        metas: dict[tuple[str, str], BoardRecord] = {}
        for r in found:
            known = metas.setdefault((r.task, r.sample_id), r)
            if known is not r and (r.known, r.status == "ok") > (known.known, known.status == "ok"):
                metas[r.task, r.sample_id] = r
        self.samples = sorted(metas)
        self.metas = [metas[s].meta for s in self.samples]
        places = {sample: i for i, sample in enumerate(self.samples)}
        self.cells: dict[CellKey, list[BoardRecord | None]] = {}
        for r in found:
            cell = (r.method, r.budget)
            if cell not in self.cells:
                self.cells[cell] = [None] * len(self.samples)
            self.cells[cell][places[r.task, r.sample_id]] = r
        named = [meta.get("group") for meta in self.metas]
        self.groups = [None if group is None else str(group) for group in named]  # [S]
        self.bootstrap = Bootstrap(
            [task for task, _ in self.samples],
            groups=self.groups,
            seed=seed,
            resamples=resamples,
        )
        self._states = {
            cell: np.array([-1 if r is None else STATUSES.index(r.status) for r in column], dtype=np.int8)
            for cell, column in self.cells.items()
        }  # [S], -1 where the cell has no record
        self._expected: dict[str, Mask] = {}
        self._timed: Mask | None = None
        self._values: dict[tuple[CellKey, str], Array] = {}
        self._estimates: dict[Wanted, Estimate] = {}

    def values(self, cell: CellKey, what: str) -> Array:
        """[S]: `score` or `metrics.NAME` (0-100), `needle` (% still cached), a number, or one of `PARTS`.

        NaN where the cell is not ok. Raises HarnessError when an ok record has no score.
        """
        if (cell, what) not in self._values:
            read: Callable[[Any], float | None] = _reader(what)
            own = [r if r is not None and r.status == "ok" else None for r in self.cells[cell]]
            part = next((part for part, names in PARTS.items() if what in names), None)
            rows = own if part is None else [None if r is None else getattr(r, part) for r in own]
            self._values[cell, what] = np.array([None if r is None else read(r) for r in rows], dtype=np.float64)
        return self._values[cell, what]

    def estimate(self, cell: CellKey, what: str, *, minus: CellKey | None = None) -> Estimate:
        """Unweighted mean of task means; of the paired difference when there is a cell to subtract."""
        self.prepare([(cell, what, minus)])
        return self._estimates[cell, what, minus]

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
        states = self._states[cell] if where is None else self._states[cell][where]
        return Counter({status: np.count_nonzero(states == code) for code, status in enumerate(STATUSES)})

    def expected(self, budget: str) -> Mask:
        """[S]: samples that some cell of this budget did not skip; of any budget for cells that are given none."""
        if budget not in self._expected:
            states = [own for cell, own in self._states.items() if budget == cell[1] or budget in NOT_GIVEN]
            skipped = STATUSES.index("skipped")
            self._expected[budget] = np.any([(own >= 0) & (own != skipped) for own in states], axis=0)
        return self._expected[budget]

    def complete(self, cell: CellKey) -> bool:
        """Whether the cell has every sample that is expected, and one at least."""
        ok = self._states[cell] == 0
        return bool(ok.any() and ok[self.expected(cell[1])].all())

    def over_budget(self, cell: CellKey) -> int:
        """Scored samples that took more bytes than asked."""
        return int(np.nansum(self.values(cell, "over_budget")))

    def few(self, cell: CellKey) -> bool:
        """Whether some task of the cell has too few clusters for its interval."""
        return self.bootstrap.few(self.values(cell, "score"))

    def unnamed(self, values: Array) -> bool:
        """Whether some sample with a value [S] does not name the text that it was drawn from."""
        return any(self.groups[i] is None for i in np.flatnonzero(~np.isnan(values)))

    def measured(self) -> bool:
        """Whether some cell was also measured by itself."""
        return any(r is not None and r.timed is not None for cell in self.cells.values() for r in cell)

    def timed_on_fewer(self, cell: CellKey) -> bool:
        """Whether other cells were timed on samples that this one was not, though it was on some."""
        if self._timed is None:
            self._timed = np.any([~np.isnan(self.values(one, "tpot_s")) for one in self.cells], axis=0)
        own = ~np.isnan(self.values(cell, "tpot_s"))
        return bool(own.any() and (self._timed & ~own).any())

    def memory(self, cell: CellKey) -> Memory:
        """`simulated` where it is in some record of the cell."""
        simulated = any(r is not None and r.memory == "simulated" for r in self.cells[cell])
        return "simulated" if simulated else "physical"


def _reader(what: str) -> Callable[[Any], float | None]:
    _, dot, metric = what.partition("metrics.")
    if dot:
        return lambda r: 100 * r.beside[metric] if metric in r.beside else None
    return _score if what == "score" else attrgetter(what)


def _score(r: BoardRecord) -> float:
    if r.score is None:
        where = f"{r.task} sample {r.sample_id} {r.method} at {r.budget}"
        raise HarnessError(f"run {r.run_id}: {where} is ok but has no score; run that task again")
    return 100 * r.score
