"""Where a method runs out of memory: the largest context at batch 1, the largest batch at a context.

Every probe runs by itself under the limit. A size fits when its probe ends `ok`; `oom`, `timeout` and `failed`
do not fit, and the record says which it was. Memory is taken to grow with the size. A model of bytes gives the first
size; every probe is recorded.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from harness.errors import HarnessError
from harness.machine import git_commit, machine, versions
from harness.plan.sources import sources
from harness.plan.sweep import PlannedCell
from harness.records.atomic_files import check_place
from harness.records.boundary_folder import BoundaryManifest, BoundaryRecord, BoundaryStore, Found, SizeKind, Tried
from harness.records.log_folder import Resume, now
from harness.records.measured import ProbeResult, ProbeSpec, ProbeStatus
from harness.speed.asked import BoundaryAsk
from harness.speed.gpu import describe
from harness.speed.target import Restarting, Target, limit_in_force, probe_spec, say

if TYPE_CHECKING:
    from harness.speed.client import Prober

NEW_TOKENS = 32
STEP = 256
"""Contexts are multiples of it."""
CONTEXT = 8192
"""Tokens of each prompt of the batch search, or the most there can be where that is less."""
MIB = 2**20


def run_boundary(
    ask: BoundaryAsk, *, out: Path, command: Sequence[str], prober: type[Prober], resume_anyway: bool = False
) -> tuple[BoundaryManifest, list[BoundaryRecord]]:
    """Search what is not yet recorded in `out`; the manifest, and the context and the batch of every cell.

    resume_anyway: see `Resume`.

    Raises:
        HarnessError: bad input, before a probe is spent on it; a limit that leaves nothing beside the model; a folder
            that cannot be written, or that holds other searches.
    """
    check_place(out)
    target = Target.load(ask, ask.threads)
    sizes = _sizes(ask, target.context)
    least = [_least(cell, sizes) for cell in target.cells]  # refuses a budget before the first probe
    with target.prober(prober) as asker:
        kind, notes = limit_in_force(asker, ask.limit_bytes)
        notes += target.lacking()
        manifest = BoundaryManifest(
            command=tuple(command),
            created=now(),
            model=target.model,
            context=target.context,
            **ask.model_dump(include={"limit_bytes", "chunk", "timeout_s", "distinct"}),
            limit_kind=kind,
            model_bytes=asker.prober.model_bytes,
            threads=target.threads,
            new_tokens=NEW_TOKENS,
            notes=tuple(notes),
            git_commit=git_commit(),
            versions=versions(),
            machine=machine() | describe(torch.device(target.model.device)),
            sources=sources(target.cells),
        )
        searches = [
            search
            for cell, shortest in zip(target.cells, least, strict=True)
            for search in _searches(ask, target, cell, sizes._replace(least=shortest))
        ]

        def left(store: BoundaryStore) -> bool:
            return any(_ended(search, store) is None for search in searches)

        with BoundaryStore(out, manifest, Resume(resume_anyway, left=left)) as store:
            records = [run_search(search, asker, store) for search in searches]
    return manifest, records


class _Sizes(NamedTuple):
    """Tokens of prompts. longest, least: of the context search, multiples of `STEP`. context: of the batch search."""

    longest: int
    context: int
    least: int = STEP


def _sizes(ask: BoundaryAsk, model_context: int) -> _Sizes:
    """None is beyond the model's context. Raises HarnessError."""
    most = ask.max_tokens or model_context
    if most > model_context:
        raise HarnessError(f"--max-tokens {most} exceeds the model's context of {model_context}; lower it")
    longest = most // STEP * STEP
    if longest < STEP:
        raise HarnessError(f"a longest context of {most} is below {STEP}; raise it")
    context = ask.context or min(CONTEXT, longest)
    if context > most:
        raise HarnessError(f"--context {context} exceeds {most}, the model's context or --max-tokens; lower it")
    return _Sizes(longest, context)


def _least(cell: PlannedCell, sizes: _Sizes) -> int:
    """The shortest context that is above the cell's budget. Raises HarnessError without one."""
    budget, (longest, context, _) = cell.cell.budget, sizes
    if budget is None:
        return STEP
    if budget.resolve(context) >= context:
        raise HarnessError(f"budget {cell.budget} is not below the --context of {context} tokens; lower --budgets")
    for tokens in range(STEP, longest + 1, STEP):
        if budget.resolve(tokens) < tokens:
            return tokens
    raise HarnessError(f"budget {cell.budget} is not below the longest context, {longest} tokens; lower --budgets")


@dataclass(frozen=True)
class Search:
    """What is searched."""

    record: BoundaryRecord
    """As it is before the first probe."""
    spec: ProbeSpec
    """A probe with the method and its budget; its tokens and batch are replaced."""
    predict: Callable[[ProbeSpec], int | None]
    """Bytes above the model's own: for the first guess, and for the record of a probe that brings none back."""

    def probe(self, size: int) -> ProbeSpec:
        """Make the probe of that size."""
        context = self.record.at_context
        tokens, batch = (size, 1) if context is None else (context, size)
        return self.spec.model_copy(update={"tokens": tokens, "batch": batch})


def _searches(ask: BoundaryAsk, target: Target, cell: PlannedCell, sizes: _Sizes) -> Iterator[Search]:
    """The context and the batch of one method at one budget."""
    shape: dict[str, Any] = {"tokens": sizes.context, "new_tokens": NEW_TOKENS, "warm_up": False}
    shape |= {"chunk": ask.chunk, "distinct": ask.distinct}
    kinds: list[tuple[SizeKind, int | None, range]] = [
        ("context", None, range(sizes.least, sizes.longest + 1, STEP)),
        ("batch", sizes.context, range(1, ask.max_batch + 1)),
    ]
    for kind, at_context, grid in kinds:
        record = BoundaryRecord(
            model_revision=target.model.revision,
            method=cell.method,
            params=target.methods[cell.method].params,
            budget=cell.budget,
            kind=kind,
            at_context=at_context,
            limit_bytes=ask.limit_bytes,
            least=grid[0],
            most=grid[-1],
            step=grid.step,
        )
        yield Search(record, probe_spec(cell.method, cell.budget, ask.set, **shape), partial(target.predict, cell))


def first_guess(predict: Callable[[int], int], room: int, sizes: range) -> int:
    """Find the largest size that `predict`, bytes by size, puts within `room`; the least where there is none."""
    return sizes[max(0, bisect_right(sizes, room, key=predict) - 1)]


def largest(fits: Callable[[int], ProbeStatus], sizes: range, *, first: int) -> Found:
    """Find the largest of the sizes that fits: gallop away from `first`, then halve.

    Asks about 2 log2(d) sizes for an answer d steps from `first`, none twice.
    """
    low, high, status = -1, len(sizes), None  # the last that fits, the first that does not; both may lie outside
    at, pace = min(max((first - sizes[0]) // sizes.step, 0), high - 1), 1
    while high - low > 1:
        found = fits(sizes[at])
        if found == "ok":
            low = at
        else:
            high, status = at, found
        if low < 0:
            at = max(high - pace, 0)
        elif high == len(sizes):
            at = min(low + pace, high - 1)
        else:
            at = (low + high) // 2
        pace *= 2
    answer = sizes[low] if low >= 0 else 0
    if high == len(sizes):
        return Found(answer=answer, whole=True)
    return Found(answer=answer, next_size=sizes[high], next_status=status)


def run_search(search: Search, asker: Restarting, store: BoundaryStore) -> BoundaryRecord:
    """Finish a search; one that is stored as finished is returned as it is. A probe that fails never ends it.

    Raises HarnessError where nothing can be probed.
    """
    if (ended := _ended(search, store)) is not None:
        return ended
    record = _as_stored(search.record)
    stored = store.records.get(record.key)
    if stored is not None and stored.params == record.params:
        record = record.model_copy(update={"probes": stored.probes})

    def fits(size: int) -> ProbeStatus:
        nonlocal record
        spec = search.probe(size)
        tried = _known(store, record, spec) or _try(search, spec, asker, store.manifest)
        if tried not in record.probes:
            record = record.model_copy(update={"probes": (*record.probes, tried)})
            store.put(record)
        return tried.status

    sizes = range(record.least, record.most + 1, record.step)
    room = record.limit_bytes - store.manifest.model_bytes
    first = first_guess(lambda size: search.predict(search.probe(size)) or sys.maxsize, room, sizes)
    found = largest(fits, sizes, first=first)
    record = record.model_copy(update={"found": found})
    store.put(record)
    return record


def _ended(search: Search, store: BoundaryStore) -> BoundaryRecord | None:
    """The record of a search that is stored as finished, None for another."""
    stored = store.records.get(search.record.key)
    if stored is None or stored.found is None:
        return None
    kept = {"probes": stored.probes, "found": stored.found, "environment_changes": stored.environment_changes}
    return stored if stored == _as_stored(search.record).model_copy(update=kept) else None


def _as_stored(record: BoundaryRecord) -> BoundaryRecord:
    """A record as a file gives it back."""
    return BoundaryRecord.model_validate_json(record.model_dump_json())


def _known(store: BoundaryStore, record: BoundaryRecord, spec: ProbeSpec) -> Tried | None:
    """The same probe, in this search or in another of the same method."""
    same = [r for r in store.records.values() if (r.method, r.budget) == (record.method, record.budget)]
    probes = (tried for r in (record, *same) if r.params == record.params for tried in r.probes)
    return next((tried for tried in probes if (tried.tokens, tried.batch) == (spec.tokens, spec.batch)), None)


def _try(search: Search, spec: ProbeSpec, asker: Restarting, manifest: BoundaryManifest) -> Tried:
    start, predicted = time.perf_counter(), search.predict(spec)
    try:
        result = asker.ask(spec, limit_bytes=manifest.limit_bytes, timeout_s=manifest.timeout_s)
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
        reserved_bytes=None if measured is None else measured.reserved_bytes,
        error=line,
    )
    told = f"{tried.status} in {seconds:.1f} s"
    if tried.peak_bytes is not None:
        told += f", peak {tried.peak_bytes / MIB:.1f} MiB"
    if tried.status == "oom" and predicted is not None:
        told += f", {predicted / MIB:.1f} MiB were predicted"
    if tried.status == "failed" and line:
        told += f": {line}"
    say([f"{search.record.method} {search.record.budget}: {spec.tokens} tokens x {spec.batch}: {told}"])
    return tried
