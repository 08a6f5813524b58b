"""Speed and memory of methods by themselves: every method, budget and length probed in a process of its own.

The passes go over all methods in turn, every second one backwards, so that a machine that slows down slows all alike.
The same for one prompt at a time (`harness bench`) and for a batch that is decoded together (`harness serve-bench`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from pydantic import Field

from harness.bench_store import BenchManifest, BenchRecord, BenchSpec, BenchStore, Kind, machine_id
from harness.errors import HarnessError
from harness.kernels import prefill_kernel
from harness.machine import git_commit, machine, versions
from harness.measured import ProbeResult, ProbeSpec
from harness.models import resolve_device, resolve_dtype, resolve_model
from harness.plan import PlannedCell, plan_cells, plan_methods
from harness.spec import Frozen, MethodSpec, Sweep


class BenchAsk(Frozen):
    """What a person asked for, by command line.

    set: parameters of methods, `method.parameter` to value. limit_bytes: of a probe, the model's own included.
    """

    kind: Kind = "bench"
    model: str = "smollm2-135m"
    methods: tuple[str, ...]
    budgets: tuple[str, ...] = ("128", "512")
    lengths: tuple[int, ...] = (2048, 8192)
    batch: int = Field(default=1, ge=1)
    new_tokens: int = Field(default=32, ge=2)
    chunk: int | None = Field(default=None, ge=1)
    rounds: int = Field(default=3, ge=1)
    warm_up: bool = True
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=1800, gt=0)
    limit_bytes: int | None = Field(default=None, ge=1)
    set: dict[str, Any] = Field(default_factory=dict)


class Asker(Protocol):
    """What is used of `harness.probe.Prober`."""

    model_bytes: int
    """Of the loaded model."""

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, timeout_s: float = ...) -> ProbeResult:
        """Run one probe in a process of its own."""


MakeAsker = Callable[..., AbstractContextManager[Asker]]
"""Called with model, dtype, device and threads; `Prober` itself."""


def run_bench(ask: BenchAsk, *, root: Path, command: Sequence[str], prober: MakeAsker) -> Path:
    """Run what is not yet recorded of a bench and return its folder.

    Raises:
        HarnessError: bad input, before a model is loaded; or a folder that cannot be written.
        KeyboardInterrupt: after the manifest says so.
    """
    methods, cells = _plan(ask)
    spec = resolve(ask, methods)
    found = machine() | ({"clocks_mhz": clocks} if (clocks := clocks_mhz()) else {})
    with prober(model=spec.model, dtype=spec.dtype, device=spec.device, threads=spec.threads) as asker:
        if spec.limit_bytes is not None and spec.limit_bytes <= asker.model_bytes:
            raise HarnessError(
                f"--memory-limit {spec.limit_bytes} is not above the model's own {asker.model_bytes} bytes; raise it"
            )
        manifest = BenchManifest(
            bench_id=spec.bench_id(found),
            status="started",
            command=tuple(command),
            spec=spec,
            started=_now(),
            model_bytes=asker.model_bytes,
            git_commit=git_commit(),
            versions=versions(),
            machine=found,
        )
        with BenchStore(root, manifest) as store:
            try:
                _run_missing(store, cells, asker, ask)
            except BaseException as error:  # the manifest must say how the bench ended, whatever ended it
                store.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", finished=_now())
                raise
            store.finish("finished", finished=_now())
            return store.folder


def resolve(ask: BenchAsk, methods: Sequence[MethodSpec]) -> BenchSpec:
    """With dtype, device, threads and kernel as they will be. Raises HarnessError for those that are not there."""
    resolve_model(ask.model)
    device = resolve_device(ask.device)
    dtype = resolve_dtype(ask.dtype, device)
    return BenchSpec(
        **ask.model_dump(include={"kind", "model", "lengths", "batch", "new_tokens", "chunk", "rounds", "warm_up"}),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        kernel=prefill_kernel(device, dtype),
        threads=ask.threads or torch.get_num_threads(),
        methods=tuple(methods),
        budgets=ask.budgets,
        limit_bytes=ask.limit_bytes,
    )


def clocks_mhz() -> dict[str, float]:
    """Least, median and most of the cores' clocks now; empty where the system does not tell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return {}
    return {"low": min(found), "median": median(found), "high": max(found)} if found else {}


def _plan(ask: BenchAsk) -> tuple[list[MethodSpec], list[PlannedCell]]:
    """Methods and cells; names, parameters and budgets are checked here."""
    for length in ask.lengths:
        if length < 2:
            raise HarnessError(f"--lengths {length} is too short for a prompt; give at least 2")
    if not ask.lengths:
        raise HarnessError("no length asked for; name some with --lengths 2048,8192")
    planned = plan_methods(Sweep(model=ask.model, methods=ask.methods, tasks=(), budgets=ask.budgets, set=ask.set))
    return [spec for spec, _ in planned], plan_cells(planned, ask.budgets)


def _run_missing(store: BenchStore, cells: Sequence[PlannedCell], asker: Asker, ask: BenchAsk) -> None:
    """Append what the store lacks, pass after pass; a cell that came to grief in one pass is left out of the next."""
    spec = store.manifest.spec
    places = [(cell, tokens) for tokens in spec.lengths for cell in cells]
    lost: set[tuple[str, str, int]] = set()
    for cell, tokens, round_ in _passes(places, spec.rounds):
        place = (cell.method, cell.budget, tokens)
        key = (*place, round_)
        if not store.done(key) and place not in lost:
            blank = _blank(store.manifest, cell, tokens, round_)
            print(f"{cell.method} at {cell.budget}, {tokens} tokens, pass {round_ + 1}", file=sys.stderr, flush=True)
            store.append(_probed(blank, cell, asker, ask))
        if place not in lost and store.stored[key].status != "ok":
            lost.add(place)


def _passes(places: Sequence[tuple[PlannedCell, int]], rounds: int) -> Iterator[tuple[PlannedCell, int, int]]:
    for round_ in range(rounds):
        for cell, tokens in places[::-1] if round_ % 2 else places:
            yield cell, tokens, round_


def _probed(blank: BenchRecord, cell: PlannedCell, asker: Asker, ask: BenchAsk) -> BenchRecord:
    """The record of one probe, or of one that cannot be run as asked."""
    if blank.budget_tokens is not None and blank.budget_tokens >= blank.tokens:
        why = f"the budget of {blank.budget_tokens} is not below the {blank.tokens} tokens of the prompt"
        return blank.model_copy(update={"status": "skipped", "error": why})
    name = cell.method.partition("[")[0].partition("@")[0]
    spec = ProbeSpec(
        method=cell.method.partition("[")[0],
        set={key.partition(".")[2]: value for key, value in ask.set.items() if key.partition(".")[0] == name},
        budget=None if cell.cell.budget is None else str(cell.cell.budget),
        tokens=blank.tokens,
        batch=blank.batch,
        new_tokens=blank.new_tokens,
        chunk=blank.chunk,
        rounds=1,
        warm_up=blank.warm_up,
    )
    result = asker.ask(spec, limit_bytes=blank.limit_bytes, timeout_s=ask.timeout_s)
    found = {"status": result.status, "error": result.error, "measured": result.measured}
    if result.status == "ok" and result.measured is None:
        raise ValueError(f"a probe of {cell.method} ended well and measured nothing")
    return blank.model_copy(update=found)


def _blank(manifest: BenchManifest, cell: PlannedCell, tokens: int, round_: int) -> BenchRecord:
    spec, budget = manifest.spec, cell.cell.budget
    shared = ("kind", "model", "dtype", "device", "kernel", "threads", "batch", "new_tokens", "chunk", "warm_up")
    return BenchRecord(
        **spec.model_dump(include={*shared, "limit_bytes"}),
        bench_id=manifest.bench_id,
        machine=machine_id(manifest.machine),
        method=cell.method,
        budget=cell.budget,
        budget_tokens=None if budget is None else budget.resolve(tokens),
        tokens=tokens,
        round=round_,
        status="failed",
        clock_mhz=clocks_mhz().get("median"),
        at=_now(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
