"""Rows of a speed table from the records of `harness bench` and `harness serve-bench`: merged and compared; no torch.

Passes over one cell are merged: the median of the passes' medians, the least of their lows, the most of their highs;
the highest peak. A cell is `ok` only when every pass is. Rows that differ in machine, model, dtype, device, kernel,
threads, shape or limit never share a table: speed is compared only within one. Passes of two benches are two rows.
"""

from collections.abc import Sequence
from itertools import groupby
from math import nan
from statistics import median
from typing import Any, NamedTuple

from harness.errors import HarnessError
from harness.records.bench_folder import BenchRecord
from harness.records.measured import Measured, Spread

ALARM = 0.05  # a peak further than this from its prediction is marked
BASELINE = "fullkv"
AXES = (
    *("kind", "machine", "model", "model_revision", "dtype", "device", "kernel", "threads"),
    *("tokens", "batch", "distinct", "new_tokens", "chunk", "warm_up", "limit_bytes"),
)
SPREADS = ("prefill_s", "observe_s", "compress_s", "ttft_s", "tpot_s")
NUMBERS = (
    *("kv_bytes", "kv_total_bytes", "compress_percent", "tokens_per_s", "all_tokens_per_s"),
    *("peak_bytes", "predicted_bytes", "tpot_ratio", "peak_ratio", "tokens_per_s_ratio"),
)


class SpeedRow(NamedTuple):
    """A cell, merged over its passes. first: its first pass that is not ok, or its first. found: None without one."""

    first: BenchRecord
    passes: int
    found: Measured | None

    @property
    def alarm(self) -> bool:
        """Whether measured and predicted peak differ by more than 5 %."""
        found = self.found
        return found is not None and abs(found.peak_bytes - found.predicted_bytes) > ALARM * found.predicted_bytes


class SpeedTable(NamedTuple):
    """Rows that may be compared. axes: what they share, in the order of `AXES`."""

    axes: dict[str, Any]
    rows: list[SpeedRow]

    @property
    def baseline(self) -> Measured | None:
        """The full cache's, where it ran."""
        return next((row.found for row in self.rows if row.first.method == BASELINE), None)


def merge(passes: Sequence[Measured]) -> Measured:
    """The passes over one cell as one measurement. Raises HarnessError when they measured different shapes."""
    shapes = {(m.tokens, m.batch, m.new_tokens, m.memory) for m in passes}
    if len(shapes) != 1:
        raise HarnessError(f"passes of one cell measured different things: {sorted(shapes)}; remove their records")
    spreads = {name: _pooled([getattr(m, name) for m in passes]) for name in SPREADS}
    most, step = max(passes, key=lambda m: sum(m.kv_bytes)), spreads["tpot_s"].median
    changed = {
        **spreads,
        **{name: max(getattr(m, name) for m in passes) for name in ("model_bytes", "peak_bytes", "predicted_bytes")},
        "rounds": sum(m.rounds for m in passes),
        "tokens_per_s": most.batch / step if step else 0.0,
    }
    return most.model_copy(update=changed)


def tables(records: Sequence[BenchRecord]) -> list[SpeedTable]:
    """Every set of comparable rows, longer prompts later. Raises HarnessError when there are no records."""
    if not records:
        raise HarnessError("no records of a bench; run `harness bench` first")
    made = []
    for _, group in groupby(sorted(records, key=_axes_key), key=_axes_key):
        own = sorted(group, key=_pass_key)
        rows = [_row(list(passes)) for _, passes in groupby(own, key=lambda record: _pass_key(record)[:-1])]
        made.append(SpeedTable({name: getattr(own[0], name) for name in AXES}, rows))
    return made


def numbers(row: SpeedRow, base: Measured | None) -> dict[str, float]:
    """Values of `NUMBERS` of a row, ratios to the full cache's `base`; NaN where it did not finish.

    tokens_per_s counts decoding alone, all_tokens_per_s the prefills of all prompts too.
    """
    found = row.found
    if found is None:
        return dict.fromkeys(NUMBERS, nan)
    whole = found.batch * found.ttft_s.median + (found.new_tokens - 1) * found.tpot_s.median
    values = (
        sum(found.kv_bytes),
        sum(found.kv_bytes) * found.batch,
        100 * _over(found.compress_s.median, found.prefill_s.median),
        found.tokens_per_s,
        _over(found.batch * found.new_tokens, whole),
        found.peak_bytes,
        found.predicted_bytes,
        nan if base is None else _over(found.tpot_s.median, base.tpot_s.median),
        nan if base is None else _over(found.peak_bytes, base.peak_bytes),
        nan if base is None else _over(found.tokens_per_s, base.tokens_per_s),
    )
    return dict(zip(NUMBERS, map(float, values), strict=True))


def _over(value: float, by: float) -> float:
    return value / by if by else nan


def _axes_key(record: BenchRecord) -> tuple[tuple[bool, Any], ...]:
    found = [getattr(record, name) for name in AXES]
    return tuple((value is not None, 0 if value is None else value) for value in found)  # None sorts first


def _pass_key(record: BenchRecord) -> tuple[bool, int, str, str, str, int]:
    """The full cache first, then by slots; the passes of a cell together."""
    slots = record.budget_tokens
    return slots is not None, slots or 0, record.method, record.bench_id, record.budget, record.round


def _row(passes: Sequence[BenchRecord]) -> SpeedRow:
    measured = [record.measured for record in passes if record.status == "ok" and record.measured is not None]
    bad = next((record for record in passes if record.status != "ok"), None)
    return SpeedRow(bad or passes[0], len(passes), merge(measured) if measured and bad is None else None)


def _pooled(spreads: Sequence[Spread]) -> Spread:
    return Spread(
        median=median(s.median for s in spreads), low=min(s.low for s in spreads), high=max(s.high for s in spreads)
    )
