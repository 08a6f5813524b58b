"""`harness compile`: calibration prompts, roll-outs of the model, and the tables that CompilerKV looks up.

Stages, each resumable from what lies in the output folder:
    form      which score: every candidate at uniform budgets, chosen by cross-validation over training prompts; then
              the same for what its scores are averaged over, and for a gate
    budgets   slot multiples of every layer and KV head, by gradient (harness.compiler.gradient), on training prompts
    halves    the same from two disjoint halves of them: how far do tables agree
    check     on calibration-validation prompts: the tables against uniform budgets and against their own shuffles;
              tables that do not win both are left neutral
    risk      whether slots should move between the prompts of a batch by their risk (methods.compilerkv.risk)
    importance of heads in one pass, and how much of the slots follows it (harness.compiler.retrieval_heads)
    published head weights and thresholds by Q-learning when asked for (harness.compiler.paper_tables), checked like the
    budgets
Every quarter prompt of a family is for validation. Losses are divergences from the full cache on the answer's first
tokens, in nats a token.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.compiler.asked import CompileSpec
from harness.compiler.estimators import ESTIMATORS, ridge_reliability, with_table
from harness.compiler.paper_check import check_published, no_gain
from harness.compiler.paper_tables import Observed, Published
from harness.compiler.retrieval_heads import choose_pool, head_importance
from harness.compiler.stage import CHOICE_PROMPTS, Workbench
from harness.errors import HarnessError
from harness.machine import git_commit, machine, versions
from harness.models.prompt import token_sha256
from methods.base import KVPolicy
from methods.compilerkv.form import Form, FormPolicy
from methods.compilerkv.manifest import ENTROPY_BINS, Manifest
from methods.compilerkv.policy import folder_of
from methods.compilerkv.risk import fit_risk, risk_gain
from methods.compilerkv.selection import choose, gains, spearman
from methods.compilerkv.tables import Tables, load_tables, neutral, save_tables

FORMS = tuple(
    Form(window=window, kernel=kernel, forward=forward, whole=whole)
    for window, kernel, forward, whole in product((8, 16, 32), (7, 13, 21), (True, False), (0.0, 0.1, 0.2, 0.4))
)
BASES, GATES = ("head", "layer", "global"), (0.0, 0.1, 0.8)
SHUFFLES = 8


class Compiler:
    """One compilation. folder: gets the roll-outs, the state of every estimate and the tables."""

    def __init__(self, spec: CompileSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.bench = Workbench(spec, folder, apart={"published"})  # which adds stages and changes none
        training = len(self.bench.training)
        if spec.published and training < ENTROPY_BINS:
            raise HarnessError(
                f"{training} training prompts do not fill {ENTROPY_BINS} risk bins; raise --prompts "
                f"from {spec.prompts} to {2 * ENTROPY_BINS}, or leave --published out"
            )

    def compile(self, command: Sequence[str]) -> Tables:
        """Run what is missing and write the tables."""
        estimate, _ = ESTIMATORS[self.spec.estimator]
        training = self.bench.training
        form, report = self.choose_form()
        shares = estimate(self.bench, "all", form, training, self.spec.steps)
        halves = [estimate(self.bench, f"half{i}", form, training[i::2], self.spec.steps) for i in (0, 1)]
        report |= {"halves_spearman": spearman(*halves), "validation": self.check(form, shares)}
        if self.spec.estimator == "ridge":
            report["split_half"] = ridge_reliability(self.bench, "all", training)
        report |= {"training_prompts": len(training), "validation_prompts": len(self.bench.validation)}
        importance = head_importance(self.bench, training)
        pool = choose_pool(self.bench, form, importance, training)
        tensors = {"budget": shares.clone(), "importance": importance, "pool": pool}
        reasons: dict[str, str] = {}
        for row, budget in enumerate(self.spec.budgets):
            if why := no_gain(report["validation"][str(budget)], "uniform"):
                tensors["budget"][row] = 1.0
                reasons[f"budget {budget}"] = why
        signals = self.signals()
        tensors["risk"], report["risk"] = self.move_by_risk(form, shares, signals)
        reasons |= {f"risk {budget}": why for budget, why in report["risk"].pop("neutral").items()}
        if self.spec.published:
            found, report["published"] = Published(self.bench, signals).compile()
            found, unearned, gained = check_published(self.bench, found, self.bench.validation)
            report["published"]["validation"] = gained
            tensors, reasons = tensors | found, reasons | unearned
        else:
            reasons |= {"head": "not compiled", "gate": "not compiled"}
        return self._write(tensors, command, form=form, neutral=reasons, report=report)

    def choose_form(self) -> tuple[Form, dict[str, Any]]:
        """Return the score with the least divergence at uniform budgets, or the one asked for, and a report."""
        if self.spec.form != "auto":
            taken = load_tables(folder_of(self.spec.form)).manifest.form
            if taken is None:
                raise HarnessError(f"tables {self.spec.form} have no form to take; leave --form out")
            return taken, {"form": {"taken_from": self.spec.form}}
        form, chosen = self._best("form", FORMS)
        kinds = [form.model_copy(update={"basis": basis, "gate": gate}) for basis, gate in product(BASES, GATES)]
        form, refined = self._best("basis", kinds)
        return form, {"form": chosen, "basis": refined}

    def _best(self, stage: str, forms: Sequence[Form]) -> tuple[Form, dict[str, Any]]:
        names = [form.model_dump_json(exclude_defaults=True) for form in forms]
        asked = self.bench.training[:CHOICE_PROMPTS]
        uniform = [FormPolicy(form) for form in forms]
        losses = self.bench.compare(stage, asked, [(budget, uniform) for budget in self.spec.tight])
        best, report = choose(losses, [self.bench.prompts[at].family for at in asked])
        ranked = sorted(range(len(forms)), key=lambda i: report["scores"][i])[:5]
        summary = {name: report[name] for name in ("left_out_ratio", "often")}
        return forms[best], summary | {"best": {names[i]: report["scores"][i] for i in ranked}}

    def signals(self) -> Tensor:
        """Return the entropy in nats and perplexity of every prompt: [P, 2]."""

        def roll(at: int) -> list[float]:
            seen = Observed(self.bench.rollout(at))
            return [seen.entropy, seen.perplexity]

        return self.bench.measure("risk", range(len(self.bench.prompts)), roll)

    def move_by_risk(self, form: Form, shares: Tensor, signals: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return slopes [N, 2, 3] of the training prompts, 0 where validation does not confirm them, and gains."""
        bench, budgets = self.bench, self.spec.budgets
        if len(budgets) == 1:
            return neutral(bench.shapes, budgets).risk, {"neutral": {str(budgets[0]): "one budget shows no slope"}}
        tables = [(budget, with_table(form, own)) for budget, own in zip(budgets, shares, strict=True)]
        curves = bench.measure(
            "curves", bench.training, lambda at: [bench.divergences(at, [own], budget)[0] for budget, own in tables]
        )
        risk = fit_risk(curves, signals[bench.training], budgets)
        checked = bench.found("check", bench.validation)[:, :, 1]
        report = risk_gain(checked, signals[bench.validation], budgets, risk=risk, seed=self.spec.seed)
        still = "training prompts lost least with slopes of 0"
        reasons = dict[str, str]()
        for row, (budget, gained) in enumerate(report.items()):
            if why := no_gain(gained, "even shares") if any(gained["slopes"]) else still:
                risk[row, :, 0] = 0.0
                reasons[budget] = why
        return risk, report | {"neutral": reasons}

    def check(self, form: Form, shares: Tensor) -> dict[str, Any]:
        """Return the gains of the tables on validation prompts, for each budget."""
        draws = torch.Generator().manual_seed(self.spec.seed)
        orders = [torch.randperm(shares[0].numel(), generator=draws) for _ in range(SHUFFLES)]
        compared = list[tuple[int, list[KVPolicy]]]()
        for budget, table in zip(self.spec.budgets, shares, strict=True):
            shuffled = [table.flatten()[order].view(table.shape) for order in orders]
            compared.append((budget, [FormPolicy(form), *(with_table(form, own) for own in (table, *shuffled))]))
        losses = self.bench.compare("check", self.bench.validation, compared)
        return {str(budget): gains(losses[:, i], seed=self.spec.seed) for i, budget in enumerate(self.spec.budgets)}

    def _write(self, tensors: dict[str, Tensor], command: Sequence[str], **decided: Any) -> Tables:
        spec, bench = self.spec, self.bench
        named = ", ".join(f"{name} ({sha256[:12]})" for name, sha256 in bench.corpora.items())
        manifest = Manifest(
            kind="compiled",
            shapes=bench.shapes,
            budgets=spec.budgets,
            source=ESTIMATORS[spec.estimator][1] + ("; head and gate by Q-learning" if spec.published else ""),
            corpus=f"{len(bench.prompts)} prompts ({', '.join(spec.families)}) of {named}",
            seed=spec.seed,
            model=bench.loaded.spec.name,
            model_revision=bench.loaded.spec.revision,
            prompts=tuple(sorted(token_sha256(prompt.ids) for prompt in bench.prompts)),
            command=tuple(command),
            git_commit=git_commit(),
            made_on={**machine(), "versions": versions()},
            **decided,
        )
        return save_tables(Tables(manifest, **(neutral(bench.shapes, spec.budgets).tensors | tensors)), self.folder)
