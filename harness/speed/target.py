"""What the verbs that probe share: the model as probes load it, a prober that is started again, the limit in force."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError, shown
from harness.machine import set_threads
from harness.models.load import DTYPES, describe_model, load_model, resolve_device, resolve_dtype
from harness.plan.methods import plan_methods
from harness.plan.names import check_asked
from harness.plan.sweep import PlannedCell, plan_cells
from harness.records.measured import ProbeResult, ProbeSpec
from harness.records.spec import FULL, OWN, Asked, MethodSpec, ModelSpec, weights_note
from harness.speed.dims import check_layers
from harness.speed.memory_limit import MEMINFO, Limit, swap
from harness.speed.predicted_memory import predict
from methods.base import PolicyError
from methods.label import MethodLabel

if TYPE_CHECKING:
    from harness.speed.client import Prober

SHORT = 16
"""Tokens of the probe that shows which limit holds."""


class Restarting:
    """A prober, and another one in its place when it goes down with a probe, which is then `failed`. A context."""

    prober: Prober

    def __init__(self, start: Callable[[], Prober]) -> None:
        self._start, self._stack = start, ExitStack()

    def __enter__(self) -> Restarting:
        self.prober = self._stack.enter_context(self._start())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def ask(self, spec: ProbeSpec, *, limit_bytes: int | None = None, timeout_s: float = 600.0) -> ProbeResult:
        """Run one probe. Raises HarnessError when no prober can be started any more."""
        try:
            return self.prober.ask(spec, limit_bytes=limit_bytes, timeout_s=timeout_s)
        except HarnessError as error:
            self.__exit__(type(error), error, None)
            self.__enter__()
            return ProbeResult(status="failed", error=str(error))


@dataclass(frozen=True)
class Target:
    """The model as the probes load it, and what is asked of it."""

    typed: str
    """The model's name or path as it was asked for."""
    model: ModelSpec
    config: Any
    """Of transformers."""
    context: int
    """Tokens that the model can take."""
    threads: int
    """CPU threads of a probe."""
    methods: dict[str, MethodSpec]
    """As fitted to the model, by label."""
    cells: list[PlannedCell]

    @classmethod
    def load(cls, asked: Asked, threads: int | None) -> Target:
        """Load the model once, to be let go before the first probe, and let every method refuse it.

        For a GPU it is read without weights, where its files allow it, as is one of random weights; a method that is
        not made for it fails in its own probes then. Raises HarnessError for unknown names, a missing device, a model
        that cannot be loaded or that a method is not made for.
        """
        check_asked(asked)
        planned, budgets = plan_methods(asked), asked.parsed_budgets
        plan_cells(planned, budgets)  # refuses a request without a cell before the model loads
        place = resolve_device(asked.device)
        if place.type not in ("cpu", "cuda"):
            raise HarnessError(f"memory on device {shown(asked.device)} cannot be measured; give --device cpu or cuda")
        dtype = str(resolve_dtype(asked.dtype, place)).removeprefix("torch.")
        print(f"loading {asked.model}", file=sys.stderr, flush=True)
        here = place.type == "cpu" and not weights_note(asked.model)
        loaded = (load_model if here else describe_model)(asked.model, dtype=dtype, device=str(place))
        check_layers(loaded.model.config.get_text_config(decoder=True))
        fitted = [method.on(loaded.spec.revision) for method in planned]
        if here:
            Engine(AttachedModel(loaded.model, loaded.wording)).check([policy for _, policy in fitted], range(8))
        return cls(
            typed=asked.model,
            model=loaded.spec,
            config=loaded.model.config.get_text_config(decoder=True),
            context=loaded.context,
            threads=set_threads(threads),
            methods={spec.label: spec for spec, _ in fitted},
            cells=plan_cells(fitted, budgets),
        )

    def prober(self, prober: type[Prober]) -> Restarting:
        """Make what starts probers of this model."""
        model = self.model
        return Restarting(
            partial(prober, model=self.typed, dtype=model.dtype, device=model.device, threads=self.threads)
        )

    def predict(self, cell: PlannedCell, spec: ProbeSpec) -> int | None:
        """Predict the bytes of a probe above the model's own; None where the method refuses."""
        budget = cell.cell.budget
        slots = None if budget is None else budget.resolve(spec.tokens)
        try:
            number, cuda = DTYPES[self.model.dtype].itemsize, self.model.device.startswith("cuda")
            return predict(self.config, number, cell.cell.policy, spec, slots, cuda=cuda)
        except PolicyError:
            return None

    def lacking(self) -> list[str]:
        """Note each method that lacks what it would need for this model, such as tables."""
        lacks = {cell.method: cell.cell.policy.lacks for cell in self.cells}
        notes = [f"{method}: {why}" for method, why in lacks.items() if why]
        say(f"note: {note}" for note in notes)
        return notes

    def refusal(self, cell: PlannedCell, tokens: int) -> str | None:
        """Say why a prompt of that many tokens cannot be asked of the cell; None where it can."""
        budget = cell.cell.budget
        if tokens > self.context:
            return f"the prompt of {tokens} tokens is longer than the model's context of {self.context}"
        if budget is not None and budget.resolve(tokens) >= tokens:
            return f"the budget of {budget.resolve(tokens)} is not below the {tokens} tokens of the prompt"
        return None


def probe_spec(method: str, budget: str, changed: Mapping[str, Any], **shape: Any) -> ProbeSpec:
    """Make the probe of a cell from the label and budget of its records.

    budget: a number, or a name of none. changed: parameters of methods, `method.parameter` to value. shape: the other
    fields.
    """
    label = MethodLabel.parse(method)
    kept = None if budget in (FULL, OWN) else budget
    return ProbeSpec(method=label.asked, set=label.own(changed), budget=kept, **shape)


def limit_in_force(asker: Restarting, limit: int | None) -> tuple[str, list[str]]:
    """Find out on a short probe what kind of limit holds one, "" for none; with notes on it and on swap, said too.

    Raises HarnessError for a limit that leaves nothing beside the model, or under which not even that probe runs.
    """
    found, notes = None if limit is None else _held(asker, limit), list[str]()
    if found is not None and found.note:
        notes = [f"limit by {found.kind}, {found.note}"]
    if not any("swap" in note for note in notes):
        notes += swap_note()
    say(f"note: {note}" for note in notes)
    return "" if found is None else found.kind, notes


def _held(asker: Restarting, limit: int) -> Limit:
    own = asker.prober.model_bytes
    if limit <= own:
        raise HarnessError(f"--memory-limit of {limit} bytes is not above the loaded model's own {own}; raise it")
    short = ProbeSpec(method="fullkv", budget=None, tokens=SHORT, new_tokens=2, warm_up=False)
    result = asker.ask(short, limit_bytes=limit)
    found = asker.prober.limit
    if found is None:
        advice = "raise --memory-limit" if result.status == "oom" else "try again"
        raise HarnessError(f"no probe runs under {limit} bytes: {result.error or result.status}; {advice}")
    return found


def swap_note(meminfo: Path = MEMINFO) -> list[str]:
    """Write a line for a machine with swap, which may take what memory does not hold; none without one."""
    total, used = swap(meminfo)
    if not total:
        return []
    return [
        f"this machine has {total / 2**20:.0f} MiB of swap, {used / 2**20:.0f} in use: it may hide that memory ran out "
        "and make peaks and speed look wrong; turn it off (swapoff -a) for figures to rely on"
    ]


def say(lines: Iterable[str]) -> None:
    """Write lines of progress and notes to standard error."""
    for line in lines:
        print(f"harness: {line}", file=sys.stderr, flush=True)
