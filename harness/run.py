"""The whole benchmark on one machine: every sample is prefilled once and decoded under every cell, then recorded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from harness.attach import AttachedModel
from harness.cells import Outcome
from harness.engine import Engine
from harness.machine import git_commit, machine, versions
from harness.measure import Finish, check_measure, measured_on, measuring
from harness.models import LoadedModel, load_model
from harness.plan import (
    Group,
    PlannedCell,
    PlannedSample,
    check_budgets,
    check_unseen,
    contexts,
    fit_methods,
    plan_cells,
    plan_methods,
    plan_samples,
    plan_tasks,
    run_spec,
)
from harness.prompt import TaskTokenizer
from harness.records import Record, RunManifest
from harness.spec import RunSpec, Sweep
from harness.store import RunStore

log = logging.getLogger("harness")


@dataclass
class Runner:
    """Turns samples into records with one loaded model; holds no files, so any process can be one.

    Args:
        spec: the resolved run. loaded: its model. max_new_tokens: cap on the tasks' generation lengths.
    """

    spec: RunSpec
    loaded: LoadedModel

    def __post_init__(self) -> None:
        model = AttachedModel(self.loaded.model)
        self.engine = Engine(model, query=self.spec.query, first_token=self.spec.first_token)
        self.tokenizer = TaskTokenizer(self.loaded.tokenizer)

    def records(self, group: Group) -> list[Record]:
        """One record per sample and cell, in order. group: samples of one context, with the cells wanted of each."""
        prompts = [planned.prompt(self.tokenizer, self.loaded, self.spec.max_new_tokens) for planned, _ in group]
        outcomes = self.engine.run_group(prompts, [[cell.cell for cell in cells] for _, cells in group])
        return [
            self._record(planned, cell, outcome)
            for (planned, cells), found in zip(group, outcomes, strict=True)
            for cell, outcome in zip(cells, found, strict=True)
        ]

    def _record(self, planned: PlannedSample, cell: PlannedCell, outcome: Outcome) -> Record:
        sample, nll = planned.sample, outcome.nll_per_token
        prediction, metrics = "", {}
        if outcome.status == "ok":
            prediction = self.tokenizer.decode(outcome.token_ids)
            for stop in sample.stop:
                prediction = prediction.split(stop)[0]
            metrics = dict(planned.task.score(sample, prediction))
        return Record(
            run_id=self.spec.run_id,
            model=self.spec.model.name,
            dtype=self.spec.model.dtype,
            task=planned.task.name,
            sample_id=sample.id,
            method=cell.method,
            budget=cell.budget,
            query=self.spec.query,
            first_token=self.spec.first_token,
            seed=self.spec.seed,
            status=outcome.status,
            error=outcome.error,
            over_budget=outcome.over_budget,
            notes=(*planned.notes, *outcome.notes),
            prompt_tokens=len(planned.ids),
            compressed_tokens=outcome.compressed_tokens,
            prompt_sha256=planned.sha256,
            budget_tokens=outcome.budget_tokens,
            kept_slots=outcome.kept_slots,
            kv_bytes=outcome.kv_bytes,
            kv_bytes_end=outcome.kv_bytes_end,
            asked_bytes=outcome.asked_bytes,
            full_bytes=outcome.full_bytes,
            needle_tokens=len(planned.needle),
            needle_kept=outcome.needle_kept,
            answers=sample.answers,
            prediction=prediction,
            token_ids=outcome.token_ids,
            metrics=metrics,
            nll=sum(nll) / len(nll) if nll else None,
            nll_tokens=len(nll),
            nll_first=nll[0] if nll else None,
            meta=dict(sample.meta),
            prefill_s=outcome.prefill_s,
            compress_s=outcome.compress_s,
            decode_s=outcome.decode_s,
            decode_rows=outcome.decode_rows,
        )


def run_sweep(sweep: Sweep, *, root: Path, command: Sequence[str]) -> Path:
    """Run what is not yet recorded of a sweep and return its run folder.

    Names are checked before the model loads, prompts before the first prefill. An interrupt leaves the run resumable.

    Raises:
        HarnessError: bad input, or a folder that cannot be written.
        KeyboardInterrupt: after the manifest says so.
    """
    check_measure(sweep)
    named, tasks = plan_methods(sweep), plan_tasks(sweep)
    plan_cells(named, sweep.budgets)  # refuses a bad budget before the model loads
    print(f"loading {sweep.model}", file=sys.stderr, flush=True)
    loaded = load_model(sweep.model, dtype=sweep.dtype, device=sweep.device, trust_remote_code=sweep.trust_remote_code)
    methods = fit_methods(named, loaded)
    cells = plan_cells(methods, sweep.budgets)
    samples, task_specs, max_tokens = plan_samples(sweep, tasks, loaded)
    check_unseen(samples, methods)
    check_budgets(samples, cells, sweep.query)
    method_specs = tuple(spec for spec, _ in methods)
    here = machine()
    place = measured_on(here, loaded.spec) if sweep.measure else None
    spec = run_spec(sweep, loaded, methods=method_specs, tasks=task_specs, max_tokens=max_tokens, measured_on=place)
    manifest = RunManifest(
        run_id=spec.run_id,
        status="started",
        command=tuple(command),
        spec=spec,
        started=_now(),
        samples=len(samples),
        cells=len(cells),
        git_commit=git_commit(),
        versions=versions(),
        machine=here,
    )
    runner = Runner(spec, loaded)  # before the folder is made: it refuses models that it cannot run
    runner.engine.check([policy for _, policy in methods], samples[0].ids)
    with RunStore.open(root, manifest) as store, measuring(sweep, loaded.spec) as finish:
        _run_missing(store, runner, samples, cells, finish=finish)
        return store.folder


def _run_missing(
    store: RunStore,
    runner: Runner,
    samples: Sequence[PlannedSample],
    cells: Sequence[PlannedCell],
    *,
    finish: Finish,
) -> None:
    """Append what the store lacks, context by context. finish: what is done to the records of each first."""
    work = []
    for group in contexts(samples, runner.spec.query):
        wanted = [(planned, [cell for cell in cells if _key(planned, cell) not in store.done]) for planned in group]
        if missing := [(planned, lacking) for planned, lacking in wanted if lacking]:
            work.append(missing)
    todo = sum(map(len, work))
    print(f"run {store.folder}: {todo} of {len(samples)} samples to do, {len(cells)} cells each", file=sys.stderr)
    slow = 0.5 if sys.stderr.isatty() else 30.0
    try:
        with tqdm(total=todo, unit="sample", desc="samples", mininterval=slow, dynamic_ncols=True) as bar:
            for missing in work:
                store.append(finish(runner.records(missing), missing))
                bar.update(len(missing))
    except KeyboardInterrupt:
        store.finish("interrupted", finished=_now())
        raise
    except Exception as error:  # the manifest must say how the run ended, whatever ended it
        store.finish("failed", finished=_now(), error=" ".join(str(error).split())[:500])
        raise
    store.finish("finished", finished=_now())


def _key(planned: PlannedSample, cell: PlannedCell) -> tuple[str, str, str, str]:
    return (planned.task.name, planned.sample.id, cell.method, cell.budget)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
