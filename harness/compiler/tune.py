"""`harness tune`: the search that chooses CompilerKV's form, for any method that states choices.

Every trial is a set of the method's parameters. It runs on the calibration prompts that the form is chosen on, at the
budgets that tell candidates apart; the set with the least divergence from the full cache is chosen (`selection.choose`)
and written as an artefact, from which `NAME@tuned` is made. Trials are stored as they are run: repeat to go on.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from harness.compiler.asked import TuneSpec
from harness.compiler.stage import CHOICE_PROMPTS, Workbench
from harness.errors import HarnessError
from harness.machine import git_commit, machine, versions
from harness.models.prompt import token_sha256
from harness.records.atomic_files import write_text
from harness.records.log_folder import now
from methods.base import KVPolicy, Needs, PolicyError
from methods.compilerkv.selection import choose
from methods.registry import Method, load_methods, make_policy
from methods.tuned.artefact import Trial, Tuning

Parameters = dict[str, Any]


class Tuner:
    """One folder of trials, of one or more methods on the same prompts."""

    def __init__(self, spec: TuneSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        known = load_methods()
        self.methods = {name: known[name] for name in spec.methods}
        self.sets = {name: parameter_sets(own, spec.trials, spec.seed) for name, own in self.methods.items()}
        wanted = (policy.needs for name in self.sets for policy in self._policies(name))
        self.bench = Workbench(spec, folder, needs=reduce(or_, wanted, Needs()), apart={"methods"})
        self.asked = self.bench.training[:CHOICE_PROMPTS]

    def tune(self, name: str, command: Sequence[str]) -> tuple[Tuning, Path]:
        """Run the trials of a method that are missing and write its artefact. command: as typed."""
        bench, spec, method, sets = self.bench, self.spec, self.methods[name], self.sets[name]
        losses = self._losses(name)
        best, report = choose(losses, [bench.prompts[at].family for at in self.asked])
        rows = zip(sets, losses.mean(dim=0).T.tolist(), report["scores"], strict=True)
        corpora = ", ".join(f"{corpus} ({sha256[:12]})" for corpus, sha256 in bench.corpora.items())
        tuning = Tuning(
            method=name,
            model=bench.loaded.spec.name,
            model_revision=bench.loaded.spec.revision,
            chosen=sets[best],
            budgets=spec.tight,
            choices={key: tuple(values) for key, values in method.choices.items()},
            space=len(parameter_space(method)),
            trials=tuple(Trial(parameters=own, divergence=means, score=score) for own, means, score in rows),
            left_out={"ratio": report["left_out_ratio"], "often": report["often"]},
            prompts=tuple(sorted(token_sha256(bench.prompts[at].ids) for at in self.asked)),
            corpus=f"{len(self.asked)} prompts of {corpora}",
            seed=spec.seed,
            command=tuple(command),
            git_commit=git_commit(),
            made_on={**machine(), "versions": versions()},
            created=now(),
        )
        path = self.folder / f"{name}.json"
        write_text(path, tuning.model_dump_json(indent=1) + "\n")
        return tuning, path

    def _losses(self, name: str) -> Tensor:
        """Divergences [P, N, C] of the trials of a method, nats a token."""
        revision = self.bench.loaded.spec.revision
        try:
            policies = [policy.for_model(revision) for policy in self._policies(name)]
        except PolicyError as error:
            raise HarnessError(str(error)) from None
        return self.bench.compare(name, self.asked, [(budget, policies) for budget in self.spec.tight])

    def _policies(self, name: str) -> list[KVPolicy]:
        return [make_policy(name, own) for own in self.sets[name]]


def parameter_sets(method: Method, count: int, seed: int) -> list[Parameters]:
    """Return at most `count` sets of a method's choices: its defaults, presets among them, then drawn by the seed."""
    space = parameter_space(method)
    named = [_as_choices(method, preset) for preset in ({}, *method.presets.values())]
    first = [own for i, own in enumerate(named) if own is not None and own in space and own not in named[:i]]
    rest = [own for own in space if own not in first]
    Random(f"{method.name} {seed}").shuffle(rest)
    return [*first, *rest][:count]


def parameter_space(method: Method) -> list[Parameters]:
    """Return every set of a method's choices that is not redundant."""
    every = [dict(zip(method.choices, values, strict=True)) for values in product(*method.choices.values())]
    return [own for own in every if not make_policy(method.name, own).redundant]


def _as_choices(method: Method, preset: Mapping[str, Any]) -> Parameters | None:
    """A preset as a set of choices; None where it changes something that is no choice."""
    plain, own = method.policy(), method.policy(**preset)
    fixed = (name for name in method.parameters if name not in method.choices)
    if any(getattr(own, name) != getattr(plain, name) for name in fixed):
        return None
    return {name: getattr(own, name) for name in method.choices}
