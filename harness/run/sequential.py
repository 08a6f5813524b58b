"""The whole benchmark on one machine: every sample is prefilled once and decoded under every cell, then recorded."""

import logging
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Outcome, Prompt
from harness.machine import git_commit, machine, versions
from harness.models.load import LoadedModel, load_model
from harness.models.prompt import TaskTokenizer
from harness.plan.receivers import PlannedReceiver
from harness.plan.sources import sources
from harness.plan.sweep import Group, NamedSweep, PlannedCell, PlannedSample, contexts, plan_names, plan_sweep
from harness.records.atomic_files import check_place
from harness.records.log_folder import Resume, now
from harness.records.record import PROMPT_TAIL, Record, RunManifest, Status, by_turns
from harness.records.run_folder import RunStore
from harness.records.spec import RunSpec, Sweep
from harness.relay.send import Relay
from harness.run.observing import Observed, at_prefill, observe_ms, observed
from harness.run.timing import measured_on, measuring
from methods.base import KVPolicy
from tasks.base import TaskError

log = logging.getLogger("harness")


@dataclass
class SampleRunner:
    """Turns samples into records with one loaded model; holds no files, so any process can have one."""

    spec: RunSpec  # the resolved run
    loaded: LoadedModel  # its model
    observed: Observed = field(default_factory=dict)  # the samples on which the cost of observing is measured
    receiver: PlannedReceiver | None = None  # another model that answers relay tasks

    def __post_init__(self) -> None:
        model = AttachedModel(self.loaded.model, self.loaded.wording)
        self.engine = Engine(model, query=self.spec.query, first_token=self.spec.first_token)
        self.relay = Relay(
            self.engine, self.loaded, self.spec, self.receiver
        )  # starts no process before there is something to send
        self.tokenizer = TaskTokenizer(self.loaded.tokenizer)
        here, on_cpu = machine(), self.spec.model.device.startswith("cpu")
        self.accelerator = ", ".join(() if on_cpu else here["accelerators"][:1]) or str(here["processor"])

    def records(self, group: Group, *, observe: bool = True) -> list[Record]:
        """Run samples of one context, each under the cells wanted of it; return one record per pair, in order.

        observe: False where nothing is to be measured besides. Raises whatever ends them all.
        """
        prompts = [planned.prompt(self.tokenizer, self.loaded, self.spec.max_new_tokens) for planned, _ in group]
        if group[0][0].task.relayed:
            outcomes = self._relayed(group, prompts, observe=observe)
        else:
            outcomes = self.engine.run_group(prompts, [[cell.cell for cell in cells] for _, cells in group])
        if observe:
            self._observe(group, prompts[0], outcomes)
        return [
            record_of(self.spec, planned, cell, outcome, self._said(outcome), self.accelerator)
            for (planned, cells), own in zip(group, outcomes, strict=True)
            for cell, outcome in zip(cells, own, strict=True)
        ]

    def _relayed(self, group: Group, prompts: Sequence[Prompt], *, observe: bool) -> list[list[Outcome]]:
        """Have another process answer. The control is run where observing is measured, too."""
        first, texts = group[0][0], [planned.sample.context for planned, _ in group]
        control = observe and (first.task.name, first.sample.id) in self.observed
        return self.relay.run_group(prompts, [cells for _, cells in group], texts, control=control)

    def _said(self, outcome: Outcome) -> list[str]:
        return [self.tokenizer.decode(ids) for ids in by_turns(outcome.token_ids, outcome.turn_tokens)]

    def _observe(self, group: Group, prompt: Prompt, outcomes: Sequence[Sequence[Outcome]]) -> None:
        """Note what observing costs on a prompt that is one to measure it on, in every outcome that is ok."""
        first = group[0][0]
        turn = self.observed.get((first.task.name, first.sample.id))
        if turn is None:
            return
        pairs = [pair for (_, cells), own in zip(group, outcomes, strict=True) for pair in zip(cells, own, strict=True)]
        ok = [(at_prefill(cell.cell.policy.needs), outcome) for cell, outcome in pairs if outcome.status == "ok"]
        head = prompt.ids[: prompt.context] if self.spec.query == "agnostic" else prompt.ids
        found = observe_ms(self.engine, head, (needs for needs, _ in ok), turn=turn)
        for needs, outcome in ok:
            outcome.observe_ms = found.get(needs)


def record_of(
    spec: RunSpec,
    planned: PlannedSample,
    cell: PlannedCell,
    outcome: Outcome,
    said: Sequence[str] = (),
    accelerator: str = "",
) -> Record:
    """What is stored of a cell. said: what its tokens say, by turns. accelerator: what ran it, if anything did.

    A metric that raises fails the cell, and so does a number that no record may hold: both may be of foreign code.
    """
    sample, prediction, metrics = planned.sample, "", {}
    if outcome.status == "ok":
        prediction = "\n".join(_until(sample.stop, text) for text in said)
        try:
            metrics = dict(planned.task.score(sample, prediction))
        except Exception as error:  # a metric is foreign code: whatever it raises is its own cell's
            outcome.fail(f"not scored: {_why(error)}", "failed")
    stored = outcome.stored()
    notes = (*planned.notes, *stored.pop("notes"))
    store = partial(
        Record,
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
        memory=cell.cell.policy.memory,
        notes=notes,
        prompt_tokens=len(planned.ids),
        prompt_sha256=planned.sha256,
        prompt_tail=f"{sample.context[-PROMPT_TAIL:]}{sample.question}{sample.answer_prefix}"[-PROMPT_TAIL:],
        needle_tokens=len(planned.needle),
        answers=sample.answers,
        prediction=prediction,
        metrics=metrics,
        meta=dict(sample.meta),
        accelerator=accelerator,
    )
    try:
        return store(**stored)
    except ValidationError as error:
        lost = Outcome()
        lost.fail(f"no number to store: {_why(error)}")
        return store(**(lost.stored() | {"notes": notes, "prediction": "", "metrics": {}}))


def failed(spec: RunSpec, group: Group, why: BaseException | str, status: Status | None = None) -> list[Record]:
    """Records of all the cells of a group that is given up. why, status: as `Outcome.fail` takes them."""
    lost = Outcome()
    lost.fail(why, status)
    return [record_of(spec, planned, cell, lost) for planned, cells in group for cell in cells]


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"


def _until(stops: Sequence[str], text: str) -> str:
    """The text before the first of the stop strings."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@dataclass(frozen=True)
class Prepared:
    """A sweep that can be run: everything that could be refused has been looked at but the model's attention."""

    manifest: RunManifest
    samples: Sequence[PlannedSample]
    cells: Sequence[PlannedCell]
    observed: Observed
    receiver: PlannedReceiver | None = None

    @property
    def policies(self) -> list[KVPolicy]:
        return list(dict.fromkeys(cell.cell.policy for cell in self.cells))

    def missing(self, done: Set[tuple[str, str, str, str]]) -> list[Group]:
        """List groups of samples of one context, with the cells that `done` lacks of each."""

        def lacks(planned: PlannedSample) -> list[PlannedCell]:
            at = planned.task.name, planned.sample.id
            return [cell for cell in self.cells if (*at, cell.method, cell.budget) not in done]

        groups = contexts(self.samples, self.manifest.spec.query)
        work = ([(planned, cells) for planned in group if (cells := lacks(planned))] for group in groups)
        return [group for group in work if group]


def prepare(named: NamedSweep, loaded: LoadedModel, *, command: Sequence[str]) -> Prepared:
    """Plan a sweep on a model. loaded: the model, or what is known of it without its weights.

    Raises HarnessError for bad input.
    """
    here = machine()
    plan = plan_sweep(named, loaded, measured_on=measured_on(here, loaded.spec) if named.sweep.measure else None)
    manifest = RunManifest(
        run_id=plan.spec.run_id,
        status="started",
        command=tuple(command),
        spec=plan.spec,
        started=now(),
        samples=len(plan.samples),
        cells=len(plan.cells),
        git_commit=git_commit(),
        versions=versions(),
        machine=here,
        sources=sources(plan.cells),
    )
    groups = contexts(plan.samples, plan.spec.query)
    timed = observed(groups, lengths=plan.spec.lengths, count=named.sweep.observe)
    return Prepared(manifest, plan.samples, plan.cells, timed, plan.receiver)


def run_sweep(sweep: Sweep, *, root: Path, command: Sequence[str], resume_anyway: bool = False) -> Path:
    """Run what is not yet recorded of a sweep and return its run folder.

    resume_anyway: also where code, packages or processor are others than those of its first session, which every new
    record then says. Names are checked before the model loads, prompts before the first prefill. An interrupt leaves
    the run resumable. Raises HarnessError for bad input, or a folder that cannot be written.
    """
    named = plan_names(sweep)
    check_place(root)
    print(f"loading {sweep.model}", file=sys.stderr, flush=True)
    remote = sweep.trust_remote_code
    loaded = load_model(sweep.model, dtype=sweep.dtype, device=sweep.device, trust_remote_code=remote)
    prepared = prepare(named, loaded, command=command)
    # before the folder is made: it refuses models that it cannot run
    runner = SampleRunner(prepared.manifest.spec, loaded, prepared.observed, prepared.receiver)
    runner.engine.check(prepared.policies, prepared.samples[0].ids)
    resume = Resume[RunStore](resume_anyway, left=lambda store: bool(prepared.missing(store.done)))
    with (
        RunStore(root, prepared.manifest, resume) as store,
        store.ending(),
        measuring(sweep, loaded.spec) as finish,
    ):
        work = prepared.missing(store.done)
        todo, cells = sum(map(len, work)), len(prepared.cells)
        told = f"{todo} of {len(prepared.samples)} samples to do, {cells} cells each"
        print(f"run {store.folder}: {told}", file=sys.stderr)
        slow = 0.5 if sys.stderr.isatty() else 30.0
        bar = tqdm(total=todo, unit="sample", desc="samples", mininterval=slow, dynamic_ncols=True)
        with bar:
            for group in work:
                store.append(finish(_records(runner, group), group))
                bar.update(len(group))
        return store.folder


def _records(runner: SampleRunner, group: Group) -> list[Record]:
    """Records of a group; failed ones where something ends it as a whole, so that the run goes on as on Ray."""
    try:
        return runner.records(group)
    except Exception as error:  # as a worker of Ray does: the other groups are run all the same
        log.debug("a group of samples failed", exc_info=True)
        return failed(runner.spec, group, error)
