"""From a sweep to what is run: methods and tasks by name, cells, prompts by sample, each once. Refusals are here.

Sweep -> plan_names -> NamedSweep -> (the model) -> plan_sweep -> Plan
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from harness.engine.types import AsKept, Cell, Limits, NextTurn, Prompt
from harness.errors import HarnessError, shown
from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer, answer_tokens, token_sha256, turn_tokens, wrap
from harness.plan.datasets import find_asset
from harness.plan.methods import PlannedMethod, plan_methods, told_uncompiled
from harness.plan.names import check_sweep, refusals, settled
from harness.plan.receivers import PlannedReceiver, plan_receiver
from harness.records.record import READ
from harness.records.spec import AS, FULL, OWN, QueryMode, RunSpec, Sweep, TaskSpec
from methods.base import Budget, KVPolicy
from methods.label import MethodLabel
from tasks.base import NothingFits, Sample, Task, TaskOptions
from tasks.graded.settings import find_grades

LOG = logging.getLogger(__name__)
NO_TEMPLATE = "the model has no chat template: raw prompts"


@dataclass(frozen=True)
class PlannedCell:
    """A cell with the names its records carry. budget: as asked, `full` or `own`."""

    method: str
    budget: str
    cell: Cell


@dataclass(frozen=True)
class PlannedSample:
    """A sample with its token ids (`array` of int) and the context border; the answer's ids follow the prompt.

    needle, protected: indexes of the tokens of its needles, and of its spans to protect. notes: what its records must
    say of the prompt. turns: the tokens that each further turn of a conversation brings.
    """

    task: Task
    sample: Sample
    ids: array[int]
    context: int
    answer: tuple[int, ...]
    needle: tuple[int, ...] = ()
    protected: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    turns: tuple[array[int], ...] = ()

    @property
    def sha256(self) -> str:
        return token_sha256(self.ids)

    def prompt(self, tokenizer: TaskTokenizer, loaded: LoadedModel, max_new_tokens: int | None) -> Prompt:
        limits = Limits(
            max_new_tokens=_capped(self.sample.max_new_tokens, max_new_tokens),
            eos_ids=loaded.eos_ids | _ids_of((*self.sample.stop, *self.sample.end_tokens), tokenizer),
            min_new_tokens=self.sample.min_new_tokens,
            stop=self.sample.stop,
            text=tokenizer.decode,
        )
        turns = tuple(
            NextTurn(ids.tolist(), replace(limits, max_new_tokens=_capped(turn.max_new_tokens, max_new_tokens)))
            for ids, turn in zip(self.turns, self.sample.turns, strict=True)
        )
        again = self.task.again
        return Prompt(self.ids.tolist(), self.context, self.answer, limits, self.needle, self.protected, turns, again)

    def longest(self, max_new_tokens: int | None) -> int:
        """Most tokens that are generated, and those that further turns bring."""
        new = [self.sample.max_new_tokens, *(turn.max_new_tokens for turn in self.sample.turns)]
        return sum(_capped(own, max_new_tokens) for own in new) + sum(map(len, self.turns))


Group = Sequence[tuple[PlannedSample, Sequence[PlannedCell]]]  # samples of one context, with the cells wanted of each


@dataclass(frozen=True)
class NamedSweep:
    """A sweep whose names all stand for something: what can be had before its model loads."""

    sweep: Sweep
    tasks: Sequence[Task]
    methods: Sequence[PlannedMethod]


@dataclass(frozen=True)
class Plan:
    """Everything that a run is.

    samples: with their prompts as tokens. cells: wanted of every sample. receiver: another model that answers.
    """

    spec: RunSpec
    samples: Sequence[PlannedSample]
    cells: Sequence[PlannedCell]
    receiver: PlannedReceiver | None = None


def plan_names(sweep: Sweep) -> NamedSweep:
    """Tasks and methods of a sweep. Raises HarnessError for what can be refused without the model."""
    sweep, tasks = settled(sweep), check_sweep(sweep)
    methods = plan_methods(sweep)
    plan_cells(methods, plan_budgets(sweep, methods))  # refuses a sweep without a cell
    return NamedSweep(sweep, tasks, methods)


def plan_sweep(named: NamedSweep, loaded: LoadedModel, *, measured_on: str | None) -> Plan:
    """What is run of a sweep on a model, or on what is known of it without its weights. measured_on: see `RunSpec`.

    Raises HarnessError for a method made for another model or fitted on one of the prompts, missing or damaged data, a
    prompt that does not fit, a budget that is below no prompt.
    """
    sweep = named.sweep
    methods = [method.on(loaded.spec.revision) for method in named.methods]
    for line in told_uncompiled(methods, sweep.model):
        LOG.warning(line)
    budgets = plan_budgets(sweep, methods)
    cells = plan_cells(methods, budgets)
    samples, tasks, max_tokens = plan_samples(sweep, named.tasks, loaded)
    check_unseen(samples, methods)
    check_budgets(samples, cells, sweep.query)
    specs = tuple(spec for spec, _ in methods)
    receiver = plan_receiver(sweep, loaded)
    resolved = {"budgets": tuple(map(str, budgets)), "max_tokens": max_tokens, "measured_on": measured_on}
    if receiver is not None:
        resolved |= {"answered_by": receiver.spec, "answered_map": receiver.sha256}
    return Plan(run_spec(sweep, loaded, methods=specs, tasks=tasks, **resolved), samples, cells, receiver)


def check_unseen(samples: Sequence[PlannedSample], methods: Sequence[PlannedMethod]) -> None:
    """Raises HarnessError when a method was fitted on one of the prompts that it would be scored on."""
    for spec, policy in methods:
        seen = policy.fitted_on()
        known = next((planned for planned in samples if planned.sha256 in seen), None) if seen else None
        if known is not None:
            raise HarnessError(
                f"method {spec.label} was fitted on sample {known.sample.id} of {known.task.name}; "
                "leave that task out, or compile tables from another corpus"
            )


def plan_budgets(sweep: Sweep, methods: Sequence[PlannedMethod]) -> list[Budget | AsKept]:
    """Every budget of a sweep: those asked for, and what each method of its own budget keeps.

    Some such methods named among the budgets are these alone. Without --budgets there are no others beside them. Raises
    HarnessError for a name of none.
    """
    own = {spec.label: AsKept(policy, spec.label) for spec, policy in methods if spec.own}
    asked = {MethodLabel.parse(label).asked: label for label in own}
    named = [asked.get(label, label) for label in sweep.as_kept]
    for label in named:
        if label not in own:
            known = f"; this run has {', '.join(own)}" if own else ""
            raise HarnessError(
                f"budget {shown(AS + label)} is what a method of its own budget keeps, and no method of this run is "
                f"that one{known}; add it to --methods"
            )
    numbers = sweep.parsed_budgets if "budgets" in sweep.model_fields_set or not own else ()
    return [*numbers, *(own[label] for label in dict.fromkeys(named or own))]


def plan_cells(methods: Sequence[PlannedMethod], budgets: Iterable[Budget | AsKept]) -> list[PlannedCell]:
    """Every method at every budget, of tokens kept or read; one that is given none once. HarnessError for no cell."""
    named, cells = {str(budget): budget for budget in budgets}, []
    for spec, policy in methods:
        if spec.budgeted:
            of = READ if policy.reads_a_part else ""
            cells += [PlannedCell(spec.label, of + text, _cell(policy, budget)) for text, budget in named.items()]
        else:
            cells.append(PlannedCell(spec.label, OWN if spec.own else FULL, Cell(policy, None)))
    if not cells:
        raise HarnessError("no budget asked for; name some with --budgets, such as 128,512 or 0.25")
    return cells


def _cell(policy: KVPolicy, budget: Budget | AsKept) -> Cell:
    return Cell(policy, None, budget) if isinstance(budget, AsKept) else Cell(policy, budget)


def plan_samples(
    sweep: Sweep, tasks: Sequence[Task], loaded: LoadedModel
) -> tuple[list[PlannedSample], tuple[TaskSpec, ...], int]:
    """Every prompt of the run, what the tasks say of their data, and the token limit of prompt plus generation.

    Raises HarnessError for missing or damaged data and for a prompt that does not fit.
    """
    options = task_options(sweep, loaded)
    samples, specs = [], []
    why = "none has a setting that qualified at these lengths; see --graded"
    for task in tasks:
        own = options if task.name in sweep.tasks else replace(options, lengths=task.fitting(options))
        if len(own.lengths) < len(options.lengths):
            unfit = ", ".join(str(length) for length in options.lengths if length not in own.lengths)
            LOG.warning("%s is left out at %s tokens: no setting of it qualified there", task.name, unfit)
        if not own.lengths:
            continue
        try:
            drawn, spec = plan_task(task, own, loaded, sweep.nll_tokens)
        except NothingFits as error:
            why = f"{task.name}: {error}"
            LOG.warning("%s is left out: %s", task.name, error)
            continue
        for planned in drawn:
            _check_fits(planned, options.max_tokens, sweep.max_new_tokens)
        samples += drawn
        specs.append(spec)
    if not specs:
        raise HarnessError(f"no task is left: {why}")
    return samples, tuple(specs), options.max_tokens


def task_options(sweep: Sweep, loaded: LoadedModel) -> TaskOptions:
    """What a sweep asks of every task. Raises HarnessError for more tokens than the model takes, or unsound grades."""
    max_tokens = sweep.max_tokens or loaded.context
    if max_tokens > loaded.context:
        raise HarnessError(f"--max-tokens {max_tokens} exceeds the model's context of {loaded.context}; lower it")
    with refusals():
        grades = find_grades(sweep.graded, loaded.spec.revision)
    return TaskOptions(
        tokenizer=TaskTokenizer(loaded.tokenizer),
        max_tokens=max_tokens,
        lengths=sweep.lengths,
        limit=sweep.limit,
        seed=sweep.seed,
        data_dir=None if sweep.data_dir is None else Path(sweep.data_dir),
        whole=sweep.whole,
        contexts=sweep.contexts,
        fetch=find_asset,
        grades=grades,
    )


def plan_task(
    task: Task, options: TaskOptions, loaded: LoadedModel, nll_tokens: int
) -> tuple[list[PlannedSample], TaskSpec]:
    """The prompts of one task and what it says of its data. Raises HarnessError for missing or damaged data."""
    with refusals(f"task {task.name}: "):
        drawn = [_plan_sample(task, sample, loaded, nll_tokens) for sample in task.samples(options)]
        provenance = {**asdict(task.about), **task.provenance(options)}
    if not drawn:
        raise HarnessError(f"task {task.name} has no samples for these options; raise --limit or check the data")
    return drawn, TaskSpec(name=task.name, protocol=task.protocol, provenance=provenance)


def contexts(samples: Sequence[PlannedSample], query: QueryMode) -> list[list[PlannedSample]]:
    """Samples that are prefilled together: neighbours of one task with the same context, when query-agnostic."""
    if query == "aware":
        return [[planned] for planned in samples]
    keyed = groupby(samples, key=lambda planned: (planned.task.name, planned.ids[: planned.context].tobytes()))
    return [list(group) for _, group in keyed]


def check_budgets(samples: Sequence[PlannedSample], cells: Sequence[PlannedCell], query: QueryMode) -> None:
    """Raises HarnessError when a budget is below no prompt of some task; single short prompts are skipped later."""
    longest: dict[str, int] = {}
    for planned in samples:
        tokens = planned.context if query == "agnostic" else len(planned.ids)
        longest[planned.task.name] = max(tokens, longest.get(planned.task.name, 0))
    for name, tokens in longest.items():
        for cell in cells:
            budget = cell.cell.budget
            if budget is not None and budget.resolve(tokens) >= tokens:
                raise HarnessError(
                    f"budget {cell.budget} is not below any prompt of {name}, the longest has {tokens} tokens; "
                    "lower --budgets or raise --lengths"
                )


def run_spec(sweep: Sweep, loaded: LoadedModel, **resolved: Any) -> RunSpec:
    """The resolved spec. resolved: methods, budgets, tasks and max_tokens as planned."""
    values = {name: getattr(sweep, name) for name in Sweep.model_fields.keys() & RunSpec.model_fields.keys()}
    values |= {"model": loaded.spec}
    if sweep.query == "agnostic":
        values["first_token"] = "compressed"
    return RunSpec(**values | resolved)


def _ids_of(texts: Sequence[str], tokenizer: TaskTokenizer) -> frozenset[int]:
    """Tokens that are one of `texts` and nothing else; like end-of-text they are barred before `min_new_tokens`."""
    last = {text: tokenizer.encode(text)[-1:] for text in texts}
    return frozenset(ids[0] for text, ids in last.items() if ids and tokenizer.decode(ids) == text)


def _plan_sample(task: Task, sample: Sample, loaded: LoadedModel, nll_tokens: int) -> PlannedSample:
    wrapped = wrap(loaded.tokenizer, sample)
    answer = answer_tokens(loaded.tokenizer, wrapped, task.reference(sample), limit=nll_tokens)
    notes = (NO_TEMPLATE,) if sample.chat and not loaded.tokenizer.chat_template else ()
    notes = (*notes, *loaded.set_aside)
    if sample.turns and "\n" not in sample.stop:
        raise HarnessError(f"task {task.name}: a conversation has a line for each answer; add a line break to `stop`")
    turns = tuple(array("i", turn_tokens(loaded.tokenizer, sample, turn)) for turn in sample.turns)
    loaded.check_ids(chain(wrapped.ids, answer, *turns), f"task {task.name} sample {sample.id}")
    ids, of_spans = array("i", wrapped.ids), (wrapped.needle, wrapped.protected)
    return PlannedSample(task, sample, ids, wrapped.context, tuple(answer), *of_spans, notes, turns)


def _check_fits(planned: PlannedSample, max_tokens: int, max_new_tokens: int | None) -> None:
    tokens, new = len(planned.ids), planned.longest(max_new_tokens)
    if tokens + new > max_tokens:
        raise HarnessError(
            f"task {planned.task.name} sample {planned.sample.id}: a prompt of {tokens} tokens and {new} generated "
            f"ones exceed {max_tokens}, the model's context or --max-tokens; lower --lengths"
        )


def _capped(own: int, cap: int | None) -> int:
    return own if cap is None else min(own, cap)
