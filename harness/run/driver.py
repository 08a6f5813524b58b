"""`harness run --ray`: the same run on many workers. A worker has a model; the driver alone plans and writes records.

A piece of work is what `harness run` does at once: a sample (or the questions of one context) under all its cells, so
the prefill they share is not done twice. The driver plans everything from tokenizer and config, so it needs no GPU and
no worker reads a data set; weights come from each node's own cache. A worker whose packages or model differ from the
driver's is refused: they decide the numbers.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.engine.decode import CPU_ROWS_AT_ONCE
from harness.errors import HarnessError
from harness.machine import machine, versions
from harness.models.load import describe_model, load_model
from harness.plan.receivers import plan_receiver
from harness.plan.sweep import Group, plan_names
from harness.records.atomic_files import check_place, open_plain, write_error
from harness.records.log_folder import Resume, now
from harness.records.record import Record
from harness.records.run_folder import RunStore
from harness.records.spec import ModelSpec, RunSpec, Sweep
from harness.run.fan import FanOut
from harness.run.observing import Observed
from harness.run.progress import Progress
from harness.run.ray_pool import Handler, RayPool, WorkerShape, connected
from harness.run.schedule import STORE_S, GivenUp, Schedule
from harness.run.sequential import Prepared, SampleRunner, failed, prepare
from methods.base import KVPolicy

SKEW_S = 30.0
DEVICES = ("auto", "cpu", "cuda")  # a worker sees its own GPUs alone
DECIDING = ("torch", "transformers", "tokenizers", "kv-policy-harness", "flash-attn")  # versions that must be equal


@dataclass(frozen=True)
class MakeRunner:
    """Makes what a worker works with, on the worker."""

    sweep: Sweep
    spec: RunSpec
    policies: Sequence[KVPolicy]  # checked against the model there, with `ids`
    ids: Sequence[int]  # of a prompt
    shape: WorkerShape
    observed: Observed = field(default_factory=dict)

    def __call__(self) -> tuple[Handler[Group, list[Record]], Mapping[str, Any]]:
        """Load the model. Raises HarnessError when it is not here, or cannot run the policies."""
        import torch

        torch.set_num_threads(max(1, int(self.shape.cpus)))
        wanted = self.spec.model
        loaded = load_model(
            self.sweep.model,  # as it was typed: the spec has no path
            dtype=wanted.dtype,
            device=wanted.device,
            trust_remote_code=wanted.trust_remote_code,
            device_map="auto" if self.shape.gpus > 1 and wanted.device == "cuda" else None,
        )
        runner = SampleRunner(self.spec, loaded, self.observed, plan_receiver(self.sweep, loaded))
        runner.engine.check(self.policies, self.ids)

        def handle(groups: Sequence[Group], carefully: bool) -> list[list[Record]]:
            runner.engine.rows = 1 if carefully else CPU_ROWS_AT_ONCE
            return [runner.records(group, observe=not carefully) for group in groups]

        return handle, {"model": loaded.spec, "versions": versions(), "machine": machine()}


def run_fanout(sweep: Sweep, fan: FanOut, *, root: Path, command: Sequence[str], resume_anyway: bool = False) -> Path:
    """Run what is not yet recorded of a sweep on a Ray cluster and return its run folder.

    resume_anyway: as in `run_sweep`; but what processor a worker has is told by its records, and may differ. Raises
    HarnessError for bad input, a cluster that cannot be had, or a folder that cannot be written.
    """
    if sweep.measure:
        raise HarnessError("--measure times one cell alone on a machine, --ray fills it; leave one of the two out")
    if sweep.device not in DEVICES:
        raise HarnessError(f"--device {sweep.device!r} is of this machine; give {', '.join(DEVICES)} with --ray")
    check_place(root)
    named = plan_names(sweep)  # names and budgets are refused before a cluster is asked
    with connected(fan.address) as (resources, dashboard):
        shape, size = _shape(sweep, fan, resources)
        device = sweep.device if sweep.device != "auto" else ("cuda" if shape.gpus else "cpu")
        described = describe_model(
            sweep.model, dtype=sweep.dtype, device=device, trust_remote_code=sweep.trust_remote_code
        )
        prepared = prepare(named, described, command=command)
        spec, threads = prepared.manifest.spec, {"torch_threads": fan.threads}
        manifest = prepared.manifest.model_copy(update={"machine": prepared.manifest.machine | threads})
        make = MakeRunner(sweep, spec, prepared.policies, prepared.samples[0].ids, shape, prepared.observed)
        left = partial(_left, prepared)
        with RunStore(root, manifest, Resume(resume_anyway, elsewhere=True, left=left)) as store, store.ending():
            work = prepared.missing(store.done)
            work.sort(key=_cost, reverse=True)  # the longest first: none of them is left to the end
            logs = store.folder / "logs"
            accept, size = _accept(spec.model, logs), min(size, max(1, len(work)))
            pool = RayPool[Group, list[Record]](make, size=size, shape=shape, accept=accept, tell=partial(tell, logs))
            try:
                schedule = Schedule(work, pool, timeout_s=fan.timeout_s, tries=fan.tries, start_s=fan.start_s)
                with _progress(store, work, schedule) as progress:
                    if dashboard:
                        print(f"Ray dashboard: {dashboard}", file=sys.stderr)
                    store_all(store, schedule, progress)
            finally:
                pool.stop()
            return store.folder


def _left(prepared: Prepared, store: RunStore) -> bool:
    return bool(prepared.missing(store.done))


def tell(folder: Path, worker: int, line: str) -> None:
    """Add a line to a worker's file in `folder`: what it is, what it logged, how it ended. Raises HarnessError."""
    path = folder / f"worker-{worker}.log"
    try:
        folder.mkdir(exist_ok=True)
        with os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8") as file:
            file.write(f"{now()} {' '.join(line.split())}\n")
    except OSError as error:
        raise write_error(path, error) from None


def _shape(sweep: Sweep, fan: FanOut, resources: Mapping[str, float]) -> tuple[WorkerShape, int]:
    """What a worker takes, and how many there are to be. Raises HarnessError when the cluster has less."""
    gpus = fan.gpus
    if gpus is None:
        some = resources.get("GPU") and sweep.device == "auto"
        gpus = 1.0 if some or sweep.device == "cuda" else 0.0  # with --autoscale there may be none yet
    shape = WorkerShape(fan.cpus, gpus)
    fit = min((int(resources.get(name, 0) // own) for name, own in shape.resources.items()), default=1)
    wanted = fan.workers or fit
    if (wanted > fit and not fan.autoscale) or not wanted:
        have = ", ".join(f"{resources.get(name, 0):g} {name}" for name in shape.resources)
        asked = ", ".join(f"{own:g} {name}" for name, own in shape.resources.items())
        raise HarnessError(
            f"{wanted or 1} workers of {asked} do not fit into the cluster, which has {have}; lower --workers or "
            "--gpus-per-worker, or pass --autoscale where nodes will be added"
        )
    return shape, wanted


def _accept(wanted: ModelSpec, logs: Path) -> Callable[[int, Mapping[str, Any]], None]:
    """Refuses a worker that would bring other numbers: another model, other packages."""
    ours = versions()

    def accept(worker: int, about: Mapping[str, Any]) -> None:
        host, theirs, what = about["host"], about["versions"], about["machine"]
        tell(logs, worker, f"on {host}, node {about['node']}: {what['accelerators'] or what['processor']}, {theirs}")
        for package in DECIDING:
            if theirs.get(package) != ours.get(package):
                raise HarnessError(
                    f"worker on {host} has {package} {theirs.get(package)}, the driver {ours.get(package)}; "
                    "install the same versions on every node"
                )
        if about["model"].revision != wanted.revision:
            raise HarnessError(
                f"model {wanted.name} on {host} is {about['model'].revision[:12]}, on the driver "
                f"{wanted.revision[:12]}; give every node the same files"
            )
        skew = about["time"] - time.time()
        if abs(skew) > SKEW_S:  # nothing here depends on it, but logs will not line up
            print(f"note: the clock of {host} is off by {skew:.0f} s", file=sys.stderr)

    return accept


def _cost(group: Group) -> int:
    """Tokens to be prefilled and, for every cell, decoded: an order, no seconds."""
    return sum(len(planned.ids) + len(cells) * planned.longest(None) for planned, cells in group)


def _progress(store: RunStore, work: Sequence[Group], schedule: Schedule[Group, list[Record]]) -> Progress:
    manifest = store.manifest
    return Progress(
        store.folder,
        samples=sum(map(len, work)),
        total=manifest.samples * manifest.cells,
        done=len(store.done),
        workers=lambda: schedule.workers,
        spent=lambda: (schedule.worker_s, schedule.busy_s),
    )


def store_all(store: RunStore, schedule: Schedule[Group, list[Record]], progress: Progress) -> None:
    """Write records as they come in, at most once in `STORE_S`, so that the disk is no bottleneck."""
    held: list[Record] = []
    last = time.monotonic()
    try:
        for ended in schedule.run():
            for item, outcome in ended:
                if isinstance(outcome, GivenUp):
                    outcome = failed(store.manifest.spec, item.work, outcome.why, outcome.status)
                records = outcome
                held += records
                progress.add(records)
            progress.add(())  # how it stands is told also while nothing comes
            if held and time.monotonic() - last >= STORE_S:
                store.append(held)
                held, last = [], time.monotonic()
    finally:
        store.append(held)
