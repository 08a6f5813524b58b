"""The model's own figures, by the code of `harness bench` and `harness boundary`, in this process.

One model is held and answers all probes. What it measures is stored as their records, which `harness board` reads; a
rehearsal's are read back and dropped, so that no board can be made of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

from harness.machine import git_commit, machine, versions
from harness.plan.sources import sources
from harness.plan.sweep import PlannedCell
from harness.records.bench_folder import load_bench
from harness.records.boundary_folder import BoundaryManifest, BoundaryRecord, BoundaryStore, load_boundaries
from harness.records.log_folder import now
from harness.records.measured import ProbeResult, ProbeSpec
from harness.speed.asked import BenchAsk, BoundaryAsk
from harness.speed.bench import run_bench
from harness.speed.boundary import Search, run_search
from harness.speed.client import Job
from harness.speed.gpu import describe
from harness.speed.memory_limit import Limit
from harness.speed.server import ServerReady
from harness.speed.target import Restarting, Target, probe_spec
from tests.gpu_check.step import Check

PROMPT_METHODS = ("fullkv", "snapkv", "h2o", "compilerkv", "compilerkv@window", "adakv")
"""They observe nothing, a window, or the whole prompt; the last one leaves every head its own number of slots."""
BATCH_METHODS = ("fullkv", "snapkv", "adakv")
DISTINCT = 2
"""Prompts of a batch that are prefilled; the others are copies of their caches."""
PAPER_BYTES = 85_500_000_000
"""What a card of 80 GB offers, those of the papers' claims; a larger card is held below it."""


@lru_cache(maxsize=1)
def held(model: str, dtype: str, device: str) -> ServerReady:
    """The model of this process. Forget the last one (`held.cache_clear`) before another is asked for."""
    return ServerReady.load(model, dtype=dtype, device=device)


class Here:
    """To whoever asks for probes what `harness.speed.client.Prober` is, in this process."""

    limit: Limit | None = None

    def __init__(self, *, model: str, dtype: str, device: str, threads: int | None = None) -> None:
        self._named = (model, dtype, device)

    def __enter__(self) -> Self:
        self._ready = held(*self._named)
        self.model_bytes = self._ready.held_bytes()
        self._before = self._ready.allocated()
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, timeout_s: float = 0.0) -> ProbeResult:
        """Run a probe. A limit holds on a card alone: on a CPU it would be this whole process's, for good."""
        on_card = self._ready.model.device.type == "cuda"
        reply = self._ready.answer(Job(spec=spec, limit_bytes=limit_bytes if on_card else None))
        self._ready.tidied(self._before)  # or not: the step's end finds out whether the card still works
        self.limit = reply.limit
        assert reply.result is not None
        return reply.result


def prompts(check: Check) -> None:
    """One prompt at a time at both lengths: prefill, observation, compression, peak, and eager steps."""
    _bench(check, check.size.model, PROMPT_METHODS, check.size.lengths)


def batches(check: Check) -> None:
    """Batches of the longer prompt, as they are served."""
    for batch in check.size.batches[1:]:
        _bench(check, check.size.model, BATCH_METHODS, check.size.lengths[1:], batch=batch)


def second_model(check: Check) -> None:
    """The first of these for another model."""
    held.cache_clear()
    check.card.free()
    _bench(check, check.size.second, BATCH_METHODS, check.size.lengths[:1])


def _asked(check: Check, model: str, methods: Sequence[str]) -> dict[str, Any]:
    size = check.size
    shared = {"model": model, "dtype": size.dtype, "device": str(check.card.device), "methods": tuple(methods)}
    return {**shared, "budgets": (str(size.budget),)}


def _bench(check: Check, model: str, methods: Sequence[str], lengths: tuple[int, ...], *, batch: int = 1) -> None:
    more: dict[str, Any] = {"kind": "serve-bench", "batch": batch, "distinct": DISTINCT} if batch > 1 else {}
    ask = BenchAsk(**_asked(check, model, methods), lengths=lengths, new_tokens=check.size.steps, rounds=1, **more)
    with _records(check) as root:
        folder = run_bench(ask, root=root, command=("make", "gpu-check"), prober=Here)
        _, records = load_bench(folder)
    for record in records:
        told = {"status": record.status, "error": record.error, "folder": folder.name}
        check.found[f"{record.method} {record.budget}, {record.tokens} x {batch}"] = told
    check.save()


def boundary(check: Check) -> None:
    """Where the full cache runs out of memory, and whether others do: the largest batch of the longer prompt."""
    total = check.card.facts().get("memory_bytes", PAPER_BYTES)
    limit = min(total, PAPER_BYTES)
    shape = {"limit_bytes": limit, "context": check.size.lengths[1], "distinct": DISTINCT}
    ask = BoundaryAsk(**_asked(check, check.size.model, BATCH_METHODS), **shape)
    target = Target.load(ask, None)
    with _records(check) as root, target.prober(Here) as asker:
        manifest = _manifest(check, ask, target, asker.prober.model_bytes)
        with BoundaryStore(root / "boundary", manifest) as store:
            for cell in target.cells:
                search = _search(check, ask, target, cell)
                check.measure(f"{cell.method} {cell.budget}", partial(_searched, search, asker, store))
        load_boundaries(root / "boundary")


def _searched(search: Search, asker: Restarting, store: BoundaryStore) -> dict[str, Any] | None:
    found = run_search(search, asker, store).found
    return None if found is None else found.model_dump()


def _manifest(check: Check, ask: BoundaryAsk, target: Target, model_bytes: int) -> BoundaryManifest:
    return BoundaryManifest(
        command=("make", "gpu-check"),
        created=now(),
        model=target.model,
        context=target.context,
        **ask.model_dump(include={"limit_bytes", "chunk", "timeout_s", "distinct"}),
        limit_kind="allocator fraction",
        model_bytes=model_bytes,
        threads=target.threads,
        new_tokens=check.size.steps,
        git_commit=git_commit(),
        versions=versions(),
        machine=machine() | describe(check.card.device),
        sources=sources(target.cells),
    )


def _search(check: Check, ask: BoundaryAsk, target: Target, cell: PlannedCell) -> Search:
    tokens = check.size.lengths[1]
    record = BoundaryRecord(
        model_revision=target.model.revision,
        method=cell.method,
        params=target.methods[cell.method].params,
        budget=cell.budget,
        kind="batch",
        at_context=tokens,
        limit_bytes=ask.limit_bytes,
        least=1,
        most=check.size.most,
        step=1,
    )
    shape = {"tokens": tokens, "new_tokens": check.size.steps, "warm_up": False, "distinct": ask.distinct}
    return Search(record, probe_spec(cell.method, cell.budget, {}, **shape), partial(target.predict, cell))


@contextmanager
def _records(check: Check) -> Iterator[Path]:
    """Where records are kept."""
    if not check.card.rehearsal:
        yield check.records
        return
    with tempfile.TemporaryDirectory() as dropped:
        yield Path(dropped)
