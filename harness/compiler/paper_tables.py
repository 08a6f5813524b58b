"""The published tables of CompilerKV: roll-outs of head weights and thresholds, fitted by conservative Q-learning.

Source: https://arxiv.org/abs/2602.08686. One roll-out draws a weight for every query head, or a threshold for every
layer, and is rewarded with minus the loss that compression costs. Actions come from balanced foldover levels, the same
in every round, so that a round differs from the one before by the opposite table alone. Differences: the loss is taken
over the first tokens of the answer (`CompileSpec.answer`), where the paper continues for 128 tokens; rewards are taken
less their prompt's mean at a budget, because Q cannot travel to a common level far from 0 (`methods.compilerkv.cql`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.compiler.rollouts import Rollout
from harness.compiler.stage import Workbench
from methods.compilerkv.cql import (
    Alternation,
    Records,
    Space,
    alternate,
    checksum,
    fit,
    gate_reward,
    gate_space,
    head_space,
)
from methods.compilerkv.designs import foldover_levels
from methods.compilerkv.manifest import PERPLEXITY_BINS
from methods.compilerkv.paper import prompt_risk, prompt_utility, value_norms
from methods.compilerkv.risk import bin_edges, bins
from tasks.base import rng

WINDOW = 64
PAIRS = 8
"""Mirrored pairs of roll-outs of a prompt at a budget."""
MOST_ROUNDS = 4


class Observed:
    """What the published form reads of a prompt: alpha [T], rho [L][H, T], entropy in nats, perplexity."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, self.alpha = rollout, prompt_utility(rollout.view, WINDOW)
        self.rho = [value_norms(layer) for layer in rollout.view.layers]
        self.entropy, self.perplexity = prompt_risk(rollout.view, self.alpha, WINDOW)

    def lose(self, weights: Tensor, thresholds: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Return each row's answer NLL, [R] nats a token, and how many tokens pass each layer's gate, [R, L] int64.

        weights: [R, L, Hq]. thresholds: [R, L]. At most `budget` of the tokens that pass are kept.
        """
        biases, passing = [], []
        for i, rho in enumerate(self.rho):
            largest = weights[:, i].view(len(weights), rho.shape[0], -1).amax(dim=-1)  # [R, H]
            scores = (largest[:, :, None] * rho).amax(dim=1) * self.alpha  # [R, T]
            passes = scores >= thresholds[:, i, None]
            passing.append(passes.sum(dim=1))
            rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            kept = (passes & (rank < budget)) | (rank == 0)
            bias = torch.zeros_like(scores).masked_fill(~kept, float("-inf"))
            biases.append(bias[:, None].expand(-1, rho.shape[0], -1))
        return self.rollout.losses(self.rollout.logprobs(biases))[1], torch.stack(passing, dim=1)


class Published:
    """Compiles both tables from training prompts. signals: [P, 2] of all prompts, entropy in nats and perplexity."""

    def __init__(self, bench: Workbench, signals: Tensor) -> None:
        self.bench, self.budgets, self.seed = bench, bench.spec.budgets, bench.spec.seed
        entropy, perplexity = signals[bench.training].unbind(dim=1)
        self.edges = bin_edges(entropy, perplexity)
        self.risk_bins = dict(zip(bench.training, bins(self.edges, entropy, perplexity).tolist(), strict=True))
        sizes = len(self.budgets), bench.shapes.layers
        self.spaces = {"head": head_space(*sizes, bench.shapes.query_heads), "gate": gate_space(*sizes)}

    def compile(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the artefact's tensors by name, and the report. Raises PolicyError as `alternation.alternate` does."""
        heads, gates = (partial(self._records, kind) for kind in self.spaces)
        head, gate = self.spaces.values()
        coupled = alternate(heads, gates, head=head, gate=gate, seed=self.seed, max_rounds=MOST_ROUNDS)
        tensors = {
            "head": coupled.head_table,
            "gate": coupled.gate_table,
            "head_alone": self._alone("head", gate),
            "gate_alone": self._alone("gate", head),
            "entropy_edges": self.edges.entropy,
            "perplexity_edges": self.edges.perplexity,
            "head_support": coupled.head.support.sum(dim=1).view(head.shape),
            "gate_support": coupled.gate.support.sum(dim=1).view(gate.shape),
        }
        return tensors, self._report(coupled)

    def _alone(self, kind: str, other: Space) -> Tensor:
        """A table compiled against the neutral one, without alternation."""
        space, records = self.spaces[kind], self._records(kind, torch.full(other.shape, other.neutral))
        return space.table(fit(records, space, seed=self.seed).actions)

    def _records(self, kind: str, opposite: Tensor) -> list[Records]:
        """Roll-outs of head weights, or of thresholds, with a table of the other kind active."""
        digest = checksum(opposite)
        stage = f"{kind} against {digest[:12]}"
        training = self.bench.training
        stored = self.bench.measure(stage, training, lambda at: self._roll(kind, at, opposite))
        found = []
        for at, rows in zip(training, stored, strict=True):
            for row, rewards in enumerate(rows):
                actions, states = self._levels(kind, at, row), self._states(kind, at, row)
                found.append(Records.of(actions, rewards, states=states, opposite=digest))
        return found

    def _roll(self, kind: str, at: int, opposite: Tensor) -> list[Any]:
        """Rewards of every roll-out of a prompt at each budget: [N][R] for heads, [N][R][L] for thresholds."""
        seen, layers = Observed(self.bench.rollout(at)), self.bench.shapes.layers
        high, wide = divmod(self.risk_bins[at], PERPLEXITY_BINS)
        found = []
        for row, budget in enumerate(self.budgets):
            drawn = self.spaces[kind].values[self._levels(kind, at, row)]  # [R, F]
            if kind == "head":
                weights = drawn.view(len(drawn), layers, -1)
                thresholds = opposite[row, :, high, wide].expand(len(drawn), -1)
            else:
                weights, thresholds = opposite[row].expand(len(drawn), -1, -1), drawn
            nll, passing = seen.lose(weights, thresholds, budget)
            level = nll.mean()  # stands for the full cache's loss: one constant a prompt and budget
            rewards = level - nll
            if kind == "gate":
                tokens = seen.rollout.view.tokens
                rewards = gate_reward(nll[:, None], level, passing=passing, budget=budget, tokens=tokens)
            found.append(rewards.tolist())
        return found

    def _levels(self, kind: str, at: int, row: int) -> Tensor:
        factors = self.bench.shapes.layers * (self.bench.shapes.query_heads if kind == "head" else 1)
        draw = rng(self.seed, kind, self.bench.prompts[at].id, self.budgets[row])
        return foldover_levels(factors, PAIRS, self.spaces[kind].count, seed=draw.randrange(2**31))

    def _states(self, kind: str, at: int, row: int) -> Tensor:
        """Entries that a roll-out set: [F]."""
        space = self.spaces[kind]
        entries = torch.arange(space.states).view(space.shape)[row]
        if kind == "head":
            return entries.flatten()
        high, wide = divmod(self.risk_bins[at], PERPLEXITY_BINS)
        return entries[:, high, wide]

    def _report(self, coupled: Alternation) -> dict[str, Any]:
        return {
            "training": len(self.bench.training),
            "rounds": coupled.rounds,
            "converged": coupled.converged,
            "changed": [list(pair) for pair in coupled.changed],
            "occupied_risk_bins": len(set(self.risk_bins.values())),
            "unsupported": {"head": coupled.head.unsupported, "gate": coupled.gate.unsupported},
            "untried": {"head": coupled.head.untried, "gate": coupled.gate.untried},
            "reach": coupled.head.reach,
        }
