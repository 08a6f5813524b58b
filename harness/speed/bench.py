"""Speed and memory of methods by themselves: every method, budget and length probed in a process of its own.

The passes go over all methods in turn, every second one backwards, so that a machine that slows down slows all alike.
The same for one prompt at a time (`harness bench`) and for a batch that is decoded together (`harness serve-bench`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field

from harness.engine.kernels import prefill_kernel
from harness.errors import HarnessError
from harness.machine import cpu_info, git_commit, machine, versions
from harness.models.load import DTYPES
from harness.plan.sweep import PlannedCell
from harness.records.bench_folder import BenchKind, BenchManifest, BenchRecord, BenchSpec, BenchStore, machine_id
from harness.records.log_folder import now
from harness.records.measured import ProbeResult
from harness.records.spec import Asked
from harness.speed.memory_limit import Size
from harness.speed.target import Restarting, Serves, Target, limit_in_force, probe_spec, say, swap_note

MIB = 2**20


class BenchAsk(Asked):
    """What a person asked for, by command line.

    limit_bytes: of a probe, the model's own included.
    """

    kind: BenchKind = "bench"
    budgets: tuple[str, ...] = ("128", "512")
    lengths: tuple[int, ...] = (2048, 8192)
    batch: int = Field(default=1, ge=1)
    new_tokens: int = Field(default=32, ge=2)
    chunk: int | None = Field(default=None, ge=1)
    rounds: int = Field(default=3, ge=1)
    warm_up: bool = True
    threads: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=1800, gt=0, le=1e6)
    limit_bytes: Size | None = None


MakeProber = Callable[..., AbstractContextManager[Serves]]
"""Called with model, dtype, device and threads; `Prober` itself."""


def run_bench(ask: BenchAsk, *, root: Path, command: Sequence[str], prober: MakeProber) -> Path:
    """Run what is not yet recorded of a bench and return its folder.

    Raises:
        HarnessError: bad input, before a probe is spent on it; or a folder that cannot be written.
        KeyboardInterrupt: after the manifest says so.
    """
    _check_lengths(ask)
    target = Target.load(ask, ask.threads)
    spec = resolve(ask, target)
    found = machine() | ({"clocks_mhz": clocks} if (clocks := clocks_mhz()) else {})
    start = partial(prober, model=spec.model, dtype=spec.dtype, device=spec.device, threads=spec.threads)
    with Restarting(start) as asker:
        held = _held(asker, spec.limit_bytes)
        manifest = BenchManifest(
            bench_id=spec.bench_id(found),
            status="started",
            command=tuple(command),
            spec=spec,
            started=now(),
            model_bytes=asker.model_bytes,
            git_commit=git_commit(),
            versions=versions(),
            machine=found | held,
        )
        with BenchStore(root, manifest) as store:
            with store.ending():
                _Bench(store, target, asker, ask).run()
            return store.folder


def resolve(ask: BenchAsk, target: Target) -> BenchSpec:
    """Resolve what was asked: the model's revision, dtype, device, threads, methods and kernel as they are."""
    model = target.model
    return BenchSpec(
        **ask.model_dump(include={"kind", "model", "lengths", "batch", "new_tokens", "chunk", "rounds", "warm_up"}),
        model_revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        kernel=prefill_kernel(torch.device(model.device), DTYPES[model.dtype]),
        threads=target.threads,
        methods=tuple(target.methods.values()),
        budgets=ask.budgets,
        limit_bytes=ask.limit_bytes,
    )


def clocks_mhz() -> dict[str, float]:
    """Read the least, median and most of the cores' clocks now; empty where the system does not tell them."""
    found = [float(clock) for clock in cpu_info("cpu MHz")]
    return {"low": min(found), "median": median(found), "high": max(found)} if found else {}


def _check_lengths(ask: BenchAsk) -> None:
    option = "--lengths" if ask.kind == "bench" else "--length"
    if not ask.lengths:
        raise HarnessError(f"no length asked for; name some with {option} 2048,8192")
    if min(ask.lengths) < 2:
        raise HarnessError(f"{option} {min(ask.lengths)} is too short for a prompt; give at least 2")


def _held(asker: Restarting, limit_bytes: int | None) -> dict[str, Any]:
    """What holds the probes, and what is to be known of this machine's memory; both said, for the manifest."""
    kind, notes = (None, []) if limit_bytes is None else limit_in_force(asker, limit_bytes)
    notes += [] if any("swap" in note for note in notes) else swap_note()
    say(f"note: {note}" for note in notes)
    return {name: value for name, value in (("limit_kind", kind), ("notes", notes)) if value}


@dataclass
class _Bench:
    """Asks for what a store lacks."""

    store: BenchStore
    target: Target
    asker: Restarting
    ask: BenchAsk

    def run(self) -> None:
        """Pass after pass; a cell that came to grief in one pass is left out of the next."""
        spec, stored = self.store.manifest.spec, self.store.stored
        places = [(cell, tokens) for tokens in spec.lengths for cell in self.target.cells]
        lost: set[tuple[str, str, int]] = set()
        for cell, tokens, round_ in _passes(places, spec.rounds):
            place = (cell.method, cell.budget, tokens)
            key = (*place, round_)
            if not self.store.done(key) and place not in lost:
                blank, name = self._blank(cell, tokens, round_), f"{cell.method} at {cell.budget}, {tokens} tokens"
                why = self.target.refusal(cell, tokens)
                if why is not None:
                    say([f"{name}: skipped: {why}"])
                    self.store.append([blank.model_copy(update={"status": "skipped", "error": why})])
                else:
                    say([f"{name}, pass {round_ + 1}"])
                    self.store.append([self._probed(blank, cell)])
            if place not in lost and stored[key].status != "ok":
                lost.add(place)

    def _probed(self, blank: BenchRecord, cell: PlannedCell) -> BenchRecord:
        shape = blank.model_dump(include={"tokens", "batch", "new_tokens", "chunk", "warm_up"})
        spec = probe_spec(cell.method, cell.budget, self.ask.set, **shape, rounds=1)
        result = self.asker.ask(spec, limit_bytes=blank.limit_bytes, timeout_s=self.ask.timeout_s)
        if result.status == "ok" and result.measured is None:
            raise ValueError(f"a probe of {cell.method} ended well and measured nothing")
        error = self._short_of(blank, cell, result) if result.status == "oom" else result.error
        return blank.model_copy(update={"status": result.status, "error": error, "measured": result.measured})

    def _short_of(self, blank: BenchRecord, cell: PlannedCell, result: ProbeResult) -> str:
        """Why memory ran out, with what was expected to be needed."""
        shape = blank.model_dump(include={"tokens", "batch", "new_tokens", "chunk"})
        wanted, own = self.target.predict(cell, **shape), self.store.manifest.model_bytes
        known = [] if wanted is None else [f"{wanted / MIB:.0f} MiB were predicted above the model's {own / MIB:.0f}"]
        known += [] if blank.limit_bytes is None else [f"the limit is {blank.limit_bytes / MIB:.0f} MiB"]
        return "; ".join([*known, result.error or "out of memory"])

    def _blank(self, cell: PlannedCell, tokens: int, round_: int) -> BenchRecord:
        manifest, budget = self.store.manifest, cell.cell.budget
        shared = {"kind", "model", "model_revision", "dtype", "device", "kernel", "threads", "batch", "new_tokens"}
        return BenchRecord(
            **manifest.spec.model_dump(include=shared | {"chunk", "warm_up", "limit_bytes"}),
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


def _passes(places: Sequence[tuple[PlannedCell, int]], rounds: int) -> Iterator[tuple[PlannedCell, int, int]]:
    for round_ in range(rounds):
        for cell, tokens in places[::-1] if round_ % 2 else places:
            yield cell, tokens, round_
