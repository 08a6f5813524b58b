"""Speed and memory of methods by themselves: every method, budget and length is a probe of its own.

The passes go over all methods in turn, every second one backwards, so that a machine that slows down slows all alike.
The same for one prompt at a time (`harness bench`) and for a batch that is decoded together (`harness serve-bench`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from harness.engine.kernels import prefill_kernel
from harness.machine import cpu_info, git_commit, machine, versions
from harness.models.load import DTYPES
from harness.plan.sources import sources
from harness.plan.sweep import PlannedCell
from harness.records.atomic_files import check_place
from harness.records.bench_folder import BenchManifest, BenchRecord, BenchSpec, BenchStore, machine_id
from harness.records.log_folder import Resume, now
from harness.records.measured import ProbeResult, ProbeSpec
from harness.speed.asked import BenchAsk
from harness.speed.gpu import describe
from harness.speed.target import Restarting, Target, limit_in_force, probe_spec, say

if TYPE_CHECKING:
    from harness.speed.client import Prober

MIB = 2**20


def run_bench(
    ask: BenchAsk, *, root: Path, command: Sequence[str], prober: type[Prober], resume_anyway: bool = False
) -> Path:
    """Run what is not yet recorded of a bench and return its folder. resume_anyway: see `Resume`.

    Raises:
        HarnessError: bad input, before a probe is spent on it; or a folder that cannot be written.
        KeyboardInterrupt: after the manifest says so.
    """
    check_place(root)
    target = Target.load(ask, ask.threads)
    spec = _resolved(ask, target)
    found = machine() | ({"clocks_mhz": clocks} if (clocks := clocks_mhz()) else {})
    found |= describe(torch.device(spec.device))
    with target.prober(prober) as asker:
        kind, notes = limit_in_force(asker, spec.limit_bytes)
        notes += target.lacking()
        held = {name: value for name, value in (("limit_kind", kind), ("notes", notes)) if value}
        manifest = BenchManifest(
            bench_id=spec.bench_id(found),
            status="started",
            command=tuple(command),
            spec=spec,
            started=now(),
            model_bytes=asker.prober.model_bytes,
            git_commit=git_commit(),
            versions=versions(),
            machine=found | held,
            sources=sources(target.cells),
        )

        def left(store: BenchStore) -> bool:
            return next(_Bench(store, target, asker, ask).missing(), None) is not None

        with BenchStore(root, manifest, Resume(resume_anyway, left=left)) as store:
            with store.ending():
                _Bench(store, target, asker, ask).run()
            return store.folder


def _resolved(ask: BenchAsk, target: Target) -> BenchSpec:
    """What was asked, with the model's revision, dtype, device, threads, methods and kernel as they are."""
    model = target.model
    shared = {"kind", "model", "budgets", "lengths", "batch", "new_tokens", "chunk", "rounds", "warm_up", "limit_bytes"}
    copies = ask.distinct is not None and ask.distinct < ask.batch
    return BenchSpec(
        distinct=ask.distinct if copies else None,
        **ask.model_dump(include=shared),
        model_revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        kernel=prefill_kernel(torch.device(model.device), DTYPES[model.dtype]),
        threads=target.threads,
        methods=tuple(target.methods.values()),
    )


def clocks_mhz() -> dict[str, float]:
    """Read the least, median and most of the cores' clocks now; empty where the system does not tell them."""
    found = [float(clock) for clock in cpu_info("cpu MHz")]
    return {"low": min(found), "median": median(found), "high": max(found)} if found else {}


@dataclass
class _Bench:
    """Asks for what a store lacks."""

    store: BenchStore
    target: Target
    asker: Restarting
    ask: BenchAsk

    def run(self) -> None:
        for cell, tokens, round_ in self.missing():
            self.store.append([self._probed(self._blank(cell, tokens, round_), cell)])

    def missing(self) -> Iterator[tuple[PlannedCell, int, int]]:
        """Cell, length and pass of each probe to be made. One that came to grief in a pass is left out of the next."""
        spec, stored = self.store.manifest.spec, self.store.stored
        places = [(cell, tokens) for tokens in spec.lengths for cell in self.target.cells]
        lost: set[tuple[str, str, int]] = set()
        for round_ in range(spec.rounds):
            for cell, tokens in places[::-1] if round_ % 2 else places:
                place = (cell.method, cell.budget, tokens)
                if place in lost:
                    continue
                if not self.store.done((*place, round_)):
                    yield cell, tokens, round_
                if stored[*place, round_].status != "ok":
                    lost.add(place)

    def _probed(self, blank: BenchRecord, cell: PlannedCell) -> BenchRecord:
        name, why = f"{cell.method} at {cell.budget}, {blank.tokens} tokens", self.target.refusal(cell, blank.tokens)
        if why is not None:
            say([f"{name}: skipped: {why}"])
            return blank.model_copy(update={"status": "skipped", "error": why})
        say([f"{name}, pass {blank.round + 1}"])
        shape = blank.model_dump(include={"tokens", "batch", "distinct", "new_tokens", "chunk", "warm_up"})
        spec = probe_spec(cell.method, cell.budget, self.ask.set, **shape, rounds=1)
        result = self.asker.ask(spec, limit_bytes=self.ask.limit_bytes, timeout_s=self.ask.timeout_s)
        error = self._short_of(spec, cell, result) if result.status == "oom" else result.error
        return blank.model_copy(update={"status": result.status, "error": error, "measured": result.measured})

    def _short_of(self, spec: ProbeSpec, cell: PlannedCell, result: ProbeResult) -> str:
        """Why memory ran out, with what was expected to be needed."""
        wanted, own, limit = self.target.predict(cell, spec), self.store.manifest.model_bytes, self.ask.limit_bytes
        known = [] if wanted is None else [f"{wanted / MIB:.0f} MiB were predicted above the model's {own / MIB:.0f}"]
        known += [] if limit is None else [f"the limit is {limit / MIB:.0f} MiB"]
        return "; ".join([*known, result.error or "out of memory"])

    def _blank(self, cell: PlannedCell, tokens: int, round_: int) -> BenchRecord:
        manifest, budget = self.store.manifest, cell.cell.budget
        shared = {"kind", "model", "model_revision", "dtype", "device", "kernel", "threads", "batch", "new_tokens"}
        return BenchRecord(
            **manifest.spec.model_dump(include=shared | {"distinct", "chunk", "warm_up", "limit_bytes"}),
            bench_id=manifest.bench_id,
            machine=machine_id(manifest.machine),
            method=cell.method,
            budget=cell.budget,
            budget_tokens=None if budget is None else budget.resolve(tokens),
            tokens=tokens,
            round=round_,
            status="failed",
            clock_mhz=clocks_mhz().get("median"),
            at=now(),
        )
