"""Where a method runs out of memory: the largest context at batch 1, the largest batch at a context.

A size fits when its probe ends `ok`; `oom`, `timeout` and `failed` do not fit, and the record says which it was.
Memory is taken to grow with the size. A model of bytes gives the first size; every probe is recorded.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from harness.errors import HarnessError
from harness.records.boundary_folder import BoundaryRecord, BoundaryStore, Found, SizeKind, Tried
from harness.records.measured import ProbeResult, ProbeSpec


class Asks(Protocol):
    """What a search needs of a prober."""

    def ask(self, spec: ProbeSpec, *, limit_bytes: int | None = None, timeout_s: float = ...) -> ProbeResult:
        """Run one probe in a process of its own."""


def largest(fits: Callable[[int], ProbeResult], *, first: int, least: int, most: int, step: int) -> Found:
    """Find the largest of `least`, `least + step`, ... up to `most` that fits: gallop away from `first`, then halve.

    Asks about 2 log2(d) sizes for an answer d steps from `first`, none twice. Raises HarnessError without a size.
    """
    if least > most:
        raise HarnessError(f"the least size, {least}, is above the most, {most}; raise the most")
    count = (most - least) // step + 1
    low, high, status = -1, count, None  # the last that fits, the first that does not; both may lie outside
    at, pace = min(max((first - least) // step, 0), count - 1), 1
    while high - low > 1:
        result = fits(least + at * step)
        if result.status == "ok":
            low = at
        else:
            high, status = at, result.status
        if low < 0:
            at = max(high - pace, 0)
        elif high == count:
            at = min(low + pace, count - 1)
        else:
            at = (low + high) // 2
        pace *= 2
    answer = least + low * step if low >= 0 else 0
    if high == count:
        return Found(answer=answer, whole=True)
    return Found(answer=answer, next_size=least + high * step, next_status=status)


def first_guess(predict: Callable[[int], int], *, room: int, least: int, most: int, step: int) -> int:
    """Find the largest size that `predict`, bytes by size, puts within `room`; `least` where it puts none there."""
    low, high = 0, max((most - least) // step, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if predict(least + middle * step) <= room:
            low = middle
        else:
            high = middle - 1
    return least + low * step


@dataclass(frozen=True)
class Search:
    """What is searched."""

    spec: ProbeSpec
    """A probe with the method and its budget; its tokens and batch are replaced."""
    method: str
    """Label with the changed parameters, as it goes into the record."""
    kind: SizeKind
    first: int
    """A guess at the answer."""
    least: int
    most: int
    step: int
    at_context: int | None = None
    """Tokens of each prompt where the batch is searched."""
    params: dict[str, Any] = field(default_factory=dict)
    """All parameters of the method, as they go into the record."""
    model_revision: str = ""
    predict: Callable[[int], int | None] = lambda size: None
    """Bytes above the model by size, for the record of a probe that brings none back."""

    def probe(self, size: int) -> ProbeSpec:
        """Make the probe of that size."""
        tokens, batch = (size, 1) if self.at_context is None else (self.at_context, size)
        return self.spec.model_copy(update={"tokens": tokens, "batch": batch})

    def record(self, limit_bytes: int) -> BoundaryRecord:
        """Make the record as it is before the first probe."""
        return BoundaryRecord(
            model_revision=self.model_revision,
            method=self.method,
            params=json.loads(json.dumps(self.params, default=str)),  # as a file gives them back
            budget=self.spec.budget or "full",
            kind=self.kind,
            at_context=self.at_context,
            limit_bytes=limit_bytes,
            least=self.least,
            most=self.most,
            step=self.step,
        )


class BoundarySearches:
    """Runs searches one after another; `say` takes a line of progress for each probe."""

    def __init__(
        self, prober: Asks, store: BoundaryStore, *, limit_bytes: int, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        self.prober, self.store, self.say = prober, store, say
        self.limit_bytes, self.timeout_s = limit_bytes, timeout_s

    def run(self, search: Search) -> BoundaryRecord:
        """Finish a search; one that is stored as finished is returned as it is. A probe that fails never ends it."""
        record = search.record(self.limit_bytes)
        stored = self.store.records.get(record.key)
        if stored is not None and stored.params == record.params:
            record = record.model_copy(update={"probes": stored.probes})
            if stored.found and stored == record.model_copy(update={"found": stored.found}):
                return stored

        def fits(size: int) -> ProbeResult:
            nonlocal record
            spec = search.probe(size)
            tried = record.probe(size) or self._known(record, spec)
            if tried is None:
                tried = self._try(record, spec, search.predict(size))
            if tried not in record.probes:
                record = record.model_copy(update={"probes": (*record.probes, tried)})
                self.store.put(record)
            return ProbeResult(status=tried.status, error=tried.error)

        found = largest(fits, first=search.first, least=search.least, most=search.most, step=search.step)
        record = record.model_copy(update={"found": found})
        self.store.put(record)
        return record

    def _known(self, record: BoundaryRecord, spec: ProbeSpec) -> Tried | None:
        """The same probe in another search of the same method."""
        same = (r for r in self.store.records.values() if (r.method, r.budget) == (record.method, record.budget))
        probes = (tried for r in same if r.params == record.params for tried in r.probes)
        return next((p for p in probes if (p.tokens, p.batch) == (spec.tokens, spec.batch)), None)

    def _try(self, record: BoundaryRecord, spec: ProbeSpec, predicted: int | None) -> Tried:
        start = time.perf_counter()
        try:
            result = self.prober.ask(spec, limit_bytes=self.limit_bytes, timeout_s=self.timeout_s)
        except HarnessError:
            raise  # nothing can be probed here
        except Exception as error:  # a search outlives whatever a probe does
            result = ProbeResult(status="failed", error=f"{type(error).__name__}: {error}")
        seconds, measured = time.perf_counter() - start, result.measured
        line = None if result.error is None else " ".join(result.error.split())
        tried = Tried(
            tokens=spec.tokens,
            batch=spec.batch,
            status=result.status,
            seconds=round(seconds, 3),
            peak_bytes=None if measured is None else measured.peak_bytes,
            predicted_bytes=predicted if measured is None else measured.predicted_bytes,
            error=line,
        )
        peak = f", peak {tried.peak_bytes / 2**20:.1f} MiB" if tried.peak_bytes is not None else ""
        if tried.status == "oom" and predicted is not None:
            peak = f", {predicted / 2**20:.1f} MiB were predicted"
        why = f": {line}" if line and result.status == "failed" else ""
        size = f"{spec.tokens} tokens x {spec.batch}"
        self.say(f"{record.method} {record.budget}: {size}: {tried.status} in {seconds:.1f} s{peak}{why}")
        return tried
