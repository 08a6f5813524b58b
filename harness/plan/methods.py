"""From a label to a policy: the one way, for sweeps, probes, `harness.attached` and lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import harness.kvpress  # noqa: F401 - `kvpress:` labels
from harness.plan.names import asked_methods, refusals
from harness.records.spec import Asked, MethodSpec
from methods.base import Budget, KVPolicy
from methods.budget import decimal_text
from methods.label import TUNED, MethodLabel
from methods.registry import load_methods, make_policy, read_label


class PlannedMethod(NamedTuple):
    """A method as it will run. spec: what records say of it."""

    spec: MethodSpec
    policy: KVPolicy

    def on(self, revision: str) -> PlannedMethod:
        """The method on the model of that revision. Raises HarnessError for one that was made for another model."""
        with refusals(f"method {self.spec.label}: "):
            policy = self.policy.for_model(revision)
            params = _params(policy)
        return PlannedMethod(self.spec.model_copy(update={"params": params}), policy)


def plan_methods(asked: Asked) -> list[PlannedMethod]:
    """Every method asked for, once each. Raises HarnessError for unknown names and unusable parameters."""
    return [_planned(label, changed) for label, changed in asked_methods(asked)]


def told_uncompiled(methods: Sequence[PlannedMethod], model: str) -> list[str]:
    """Say which methods run without what is compiled for a model, what they do instead and the command that makes it.

    A line for each thing that is lacking.
    """
    lacking = dict[str, list[str]]()
    for spec, policy in methods:
        if policy.lacks:
            lacking.setdefault(policy.lacks, []).append(spec.label)
    make = f"make some with `harness compile --model {model} --out DIR`"
    return [
        f"UNCOMPILED: {', '.join(labels)}: {lacks}; {make}, --set {labels[0].partition('@')[0]}.tables=DIR takes them"
        for lacks, labels in lacking.items()
    ]


def plan_method(label: str, changed: Mapping[str, Any] | None = None, *, revision: str | None = None) -> PlannedMethod:
    """One method by its label, `name`, `name@preset` or `prefix:rest`.

    revision: of the model that it runs on; None leaves the method as it is before a model is known. Raises HarnessError
    for an unknown name, preset or parameter, a value that the method refuses, or another model's method.
    """
    with refusals():
        planned = _planned(read_label(label), changed or {})
    return planned if revision is None else planned.on(revision)


def policy_of(spec: MethodSpec, revision: str) -> KVPolicy:
    """A method as a run's manifest states it, on a model. Raises PolicyError for one that cannot be made here."""
    label = MethodLabel.parse(spec.label)
    if label.prefix is not None or label.preset == TUNED:
        return make_policy(label.asked).for_model(revision)
    known = load_methods()[label.name].policy
    given = {field.name for field in fields(known) if field.init}  # type: ignore[arg-type]
    params = {name: value for name, value in spec.params.items() if name in given}
    return make_policy(label.asked, params).for_model(revision)


def plan_budget(budget: object) -> Budget:
    """A budget as typed: tokens (512) or a fraction of the prompt (0.25, 25%). Raises HarnessError for another."""
    with refusals():
        if type(budget) is int:
            return Budget(tokens=budget)
        return Budget.parse(decimal_text(budget) if isinstance(budget, float) else str(budget))


def _planned(label: MethodLabel, changed: Mapping[str, Any]) -> PlannedMethod:
    with refusals():
        policy = make_policy(label, changed)
        params = _params(policy)
    full = str(label.changed(changed))
    kind = {"budgeted": policy.budgeted, "own": policy.kind == "own"}
    return PlannedMethod(MethodSpec(label=full, name=label.name, params=params, **kind), policy)


def _params(policy: KVPolicy) -> dict[str, Any]:
    """All parameters of a policy, and what else decides its results. Raises PolicyError of `provenance`."""
    return asdict(policy) | policy.provenance()  # type: ignore[call-overload, no-any-return]
