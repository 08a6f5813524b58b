"""The whole benchmark on one machine: every sample is prefilled once and decoded under every cell, then recorded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Outcome
from harness.machine import git_commit, machine, versions
from harness.models.load import LoadedModel, load_model
from harness.models.prompt import TaskTokenizer
from harness.plan.sweep import (
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
from harness.records.log_folder import now
from harness.records.record import PROMPT_TAIL, Record, RunManifest
from harness.records.run_folder import RunStore
from harness.records.spec import RunSpec, Sweep
from harness.run.timing import check_measure, measured_on, measuring
from methods.base import KVPolicy

log = logging.getLogger("harness")


@dataclass
class SampleRunner:
    """Turns samples into records with one loaded model; holds no files, so any process can have one."""

    spec: RunSpec
    """The resolved run."""
    loaded: LoadedModel
    """Its model."""

    def __post_init__(self) -> None:
        model = AttachedModel(self.loaded.model)
        self.engine = Engine(model, query=self.spec.query, first_token=self.spec.first_token)
        self.tokenizer = TaskTokenizer(self.loaded.tokenizer)
        here = machine()
        self.accelerator = ", ".join(here["accelerators"][:1]) or str(here["processor"])

    def records(self, group: Group) -> list[Record]:
        """Run samples of one context, each under the cells wanted of it; return one record per pair, in order."""
        prompts = [planned.prompt(self.tokenizer, self.loaded, self.spec.max_new_tokens) for planned, _ in group]
        outcomes = self.engine.run_group(prompts, [[cell.cell for cell in cells] for _, cells in group])
        found = [
            record_of(self.spec, planned, cell, outcome, text=self.tokenizer.decode(outcome.token_ids))
            for (planned, cells), own in zip(group, outcomes, strict=True)
            for cell, outcome in zip(cells, own, strict=True)
        ]
        return [record.model_copy(update={"accelerator": self.accelerator}) for record in found]


def record_of(spec: RunSpec, planned: PlannedSample, cell: PlannedCell, outcome: Outcome, *, text: str = "") -> Record:
    """What is stored of a cell. text: of its tokens."""
    sample, nll = planned.sample, outcome.nll_per_token
    prediction, metrics = "", {}
    if outcome.status == "ok":
        prediction = text
        for stop in sample.stop:
            prediction = prediction.split(stop)[0]
        metrics = dict(planned.task.score(sample, prediction))
    return Record(
        run_id=spec.run_id,
        model=spec.model.name,
        dtype=spec.model.dtype,
        task=planned.task.name,
        sample_id=sample.id,
        method=cell.method,
        budget=cell.budget,
        query=spec.query,
        first_token=spec.first_token,
        seed=spec.seed,
        status=outcome.status,
        error=outcome.error,
        memory=cell.cell.policy.memory,
        over_budget=outcome.over_budget,
        notes=(*planned.notes, *outcome.notes),
        prompt_tokens=len(planned.ids),
        compressed_tokens=outcome.compressed_tokens,
        prompt_sha256=planned.sha256,
        prompt_tail=f"{sample.context[-PROMPT_TAIL:]}{sample.question}{sample.answer_prefix}"[-PROMPT_TAIL:],
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


@dataclass(frozen=True)
class Prepared:
    """A sweep that can be run: everything that could be refused has been looked at but the model's attention."""

    manifest: RunManifest
    samples: Sequence[PlannedSample]
    cells: Sequence[PlannedCell]

    @property
    def policies(self) -> list[KVPolicy]:
        return list(dict.fromkeys(cell.cell.policy for cell in self.cells))

    def missing(self, done: Set[tuple[str, str, str, str]]) -> list[Group]:
        """List groups of samples of one context, with the cells that `done` lacks of each."""
        work: list[Group] = []
        for group in contexts(self.samples, self.manifest.spec.query):
            wanted = [(planned, [cell for cell in self.cells if _key(planned, cell) not in done]) for planned in group]
            if lacking := [(planned, cells) for planned, cells in wanted if cells]:
                work.append(lacking)
        return work


def prepare(sweep: Sweep, load: Callable[[Sweep], LoadedModel], *, command: Sequence[str]) -> Prepared:
    """Plan a sweep. load: the model, or what is known of it without its weights; called once names are checked.

    Raises HarnessError for bad input.
    """
    check_measure(sweep)
    named, tasks = plan_methods(sweep), plan_tasks(sweep)
    plan_cells(named, sweep.budgets)  # refuses a bad budget before the model loads
    loaded = load(sweep)
    methods = fit_methods(named, loaded)
    cells = plan_cells(methods, sweep.budgets)
    samples, task_specs, max_tokens = plan_samples(sweep, tasks, loaded)
    check_unseen(samples, methods)
    check_budgets(samples, cells, sweep.query)
    method_specs, here = tuple(spec for spec, _ in methods), machine()
    place = measured_on(here, loaded.spec) if sweep.measure else None
    spec = run_spec(sweep, loaded, methods=method_specs, tasks=task_specs, max_tokens=max_tokens, measured_on=place)
    manifest = RunManifest(
        run_id=spec.run_id,
        status="started",
        command=tuple(command),
        spec=spec,
        started=now(),
        samples=len(samples),
        cells=len(cells),
        git_commit=git_commit(),
        versions=versions(),
        machine=here,
    )
    return Prepared(manifest, samples, cells)


def load(sweep: Sweep) -> LoadedModel:
    """The model of a sweep."""
    print(f"loading {sweep.model}", file=sys.stderr, flush=True)
    return load_model(sweep.model, dtype=sweep.dtype, device=sweep.device, trust_remote_code=sweep.trust_remote_code)


def run_sweep(sweep: Sweep, *, root: Path, command: Sequence[str]) -> Path:
    """Run what is not yet recorded of a sweep and return its run folder.

    Names are checked before the model loads, prompts before the first prefill. An interrupt leaves the run resumable.

    Raises:
        HarnessError: bad input, or a folder that cannot be written.
        KeyboardInterrupt: after the manifest says so.
    """
    models: list[LoadedModel] = []

    def loaded(sweep: Sweep) -> LoadedModel:
        models.append(load(sweep))
        return models[0]

    prepared = prepare(sweep, loaded, command=command)
    runner = SampleRunner(
        prepared.manifest.spec, models[0]
    )  # before the folder is made: it refuses models it cannot run
    runner.engine.check(prepared.policies, prepared.samples[0].ids)
    with RunStore.open(root, prepared.manifest) as store, measuring(sweep, models[0].spec) as finish:
        work = prepared.missing(store.done)
        todo = sum(map(len, work))
        print(
            f"run {store.folder}: {todo} of {len(prepared.samples)} samples to do, {len(prepared.cells)} cells each",
            file=sys.stderr,
        )
        slow = 0.5 if sys.stderr.isatty() else 30.0
        with (
            store.ending(),
            tqdm(total=todo, unit="sample", desc="samples", mininterval=slow, dynamic_ncols=True) as bar,
        ):
            for group in work:
                store.append(finish(runner.records(group), group))
                bar.update(len(group))
        return store.folder


def _key(planned: PlannedSample, cell: PlannedCell) -> tuple[str, str, str, str]:
    return (planned.task.name, planned.sample.id, cell.method, cell.budget)
