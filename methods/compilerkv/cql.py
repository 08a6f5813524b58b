"""Horizon-1 conservative Q-learning of the two published tables, each fitted to roll-outs with the other one active.

Source: https://arxiv.org/abs/2602.08686 (tabular, no bootstrap target; head weights from 29 values on [0.8, 1.5],
thresholds from 21 values on [0.8, 1.0], reward minus the loss that compression costs; heads with the current gate, then
the gate with the updated heads, until the actions stop changing). A state is an entry of a table, an action is one of
its values. Running the model is the caller's part: roll-outs come in as numbers. Q starts at 0.
Differences: states are balanced by drawing every state with records equally often in an epoch, its records in turn,
where the authors' code draws records at random with replacement; of equal Q the lowest action is taken; records
carry the checksum of the opposite table, and stale ones are refused.

Properties to know before trusting a table: the conservative term prefers what was tried often, so actions must be tried
equally often (`designs.foldover_levels`). Adam moves a Q by about the learning rate a step, so Q stays within
`Fitted.reach` of 0; rewards whose common level lies beyond it teach little, where the same rewards less their mean do.

Shape letters: n records   S states   A actions   R roll-outs of a prompt   F entries set in one roll-out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import PolicyError
from methods.compilerkv.manifest import ENTROPY_BINS, PERPLEXITY_BINS, UNSUPPORTED_GATE, UNSUPPORTED_HEAD


@dataclass(frozen=True)
class Settings:
    """How Q is fitted; the defaults are the published ones."""

    conservatism: float = 0.75
    regression: float = 0.5
    lr: float = 3e-4
    weight_decay: float = 0.01
    batch: int = 4096
    epochs: int = 10


PUBLISHED = Settings()


@dataclass(frozen=True)
class Space:
    """A table to learn: its shape, the values an entry may take, and which of them is neutral."""

    shape: tuple[int, ...]
    low: float
    high: float
    count: int
    neutral: float

    @property
    def states(self) -> int:
        return math.prod(self.shape)

    @property
    def values(self) -> Tensor:
        """[A] float32, ascending."""
        return torch.linspace(self.low, self.high, self.count, dtype=torch.float64).float()

    @property
    def fallback(self) -> int:
        """The action of the neutral value."""
        return int((self.values - self.neutral).abs().argmin())

    def table(self, actions: Tensor) -> Tensor:
        """Return a float32 table of this shape. actions: [S] int64."""
        return self.values[actions].view(self.shape)


def head_space(budgets: int, layers: int, query_heads: int) -> Space:
    """Return the head weights [N, L, Hq]: 29 values on [0.8, 1.5]."""
    return Space((budgets, layers, query_heads), 0.8, 1.5, 29, UNSUPPORTED_HEAD)


def gate_space(budgets: int, layers: int) -> Space:
    """Return the thresholds [N, L, 20, 4]: 21 values on [0.8, 1.0]."""
    return Space((budgets, layers, ENTROPY_BINS, PERPLEXITY_BINS), 0.8, 1.0, 21, UNSUPPORTED_GATE)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Q and what it chooses.

    q: [S, A] float32. support: [S, A] int64, records of each. actions: [S] int64. reach: steps times learning rate.
    """

    q: Tensor
    support: Tensor
    actions: Tensor
    reach: float

    @property
    def unsupported(self) -> int:
        """States without a record; they took the neutral action."""
        return int((self.support.sum(dim=1) == 0).sum())

    @property
    def untried(self) -> int:
        """States with records that chose an action none of these records tried."""
        tried = self.support.gather(1, self.actions[:, None])[:, 0]
        return int(((tried == 0) & (self.support.sum(dim=1) > 0)).sum())


def loss(q: Tensor, states: Tensor, actions: Tensor, rewards: Tensor, *, settings: Settings = PUBLISHED) -> Tensor:
    """Return the mean over records of conservatism * (logsumexp_a Q(s, .) - Q(s, a)) + regression * (Q(s, a) - r)^2.

    q: [S, A]. states, actions: [n] int64. rewards: [n].
    """
    # index_select adds its gradient in a fixed order, whatever the number of threads
    chosen = q.flatten().index_select(0, states * q.shape[1] + actions)  # [n]
    soft = q.logsumexp(dim=1).index_select(0, states)
    return (settings.conservatism * (soft - chosen) + settings.regression * (chosen - rewards) ** 2).mean()


@dataclass(frozen=True, eq=False)
class Records:
    """Roll-outs of one table, and the checksum of the opposite table that was active.

    states, actions: [n] int64. rewards: [n] float.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    opposite: str

    @classmethod
    def of(cls, actions: Tensor, rewards: Tensor, *, states: Tensor, opposite: str) -> Records:
        """Make a record per roll-out and entry. actions: [R, F]. rewards: [R] or [R, F]. states: [F] that were set."""
        each = rewards if rewards.dim() == 2 else rewards[:, None]
        flat = states.expand(actions.shape).flatten()
        return cls(flat, actions.flatten(), each.expand(actions.shape).flatten(), opposite)


def fit(found: Sequence[Records], space: Space, *, seed: int, settings: Settings = PUBLISHED) -> Fitted:
    """Fit Q to all records and take the best action of every state, the neutral one where there is none.

    On the CPU, the same for the same seed. Raises PolicyError for no records, rewards that are not finite, or states
    and actions out of range.
    """
    if not any(len(own.states) for own in found):
        raise PolicyError("no records to learn from; roll out at least one prompt")
    states, actions, rewards = (
        torch.cat([getattr(own, name) for own in found]).cpu() for name in ("states", "actions", "rewards")
    )
    _check(states, actions, rewards, space)
    rewards = rewards.float()
    draw = torch.Generator().manual_seed(seed)
    q = torch.zeros(space.states, space.count, requires_grad=True)
    optimizer = torch.optim.AdamW([q], lr=settings.lr, weight_decay=settings.weight_decay)
    for _ in range(settings.epochs):
        for batch in torch.split(balanced_epoch(states, draw), settings.batch):
            optimizer.zero_grad()
            loss(q, states[batch], actions[batch], rewards[batch], settings=settings).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    best = q.detach().argmax(dim=1)
    support = torch.bincount(states * space.count + actions, minlength=q.numel()).view(q.shape)
    best[support.sum(dim=1) == 0] = space.fallback
    steps = settings.epochs * math.ceil(len(states) / settings.batch)
    return Fitted(q.detach(), support, best, steps * settings.lr)


def balanced_epoch(states: Tensor, draw: torch.Generator) -> Tensor:
    """Order the records of one epoch at random, [n] int64: every state n / states times, its records in turn."""
    total = len(states)
    shuffled = torch.randperm(total, generator=draw)
    by_state = shuffled[states[shuffled].argsort(stable=True)]
    counts = torch.bincount(states)
    counts = counts[counts > 0]
    starts, turn = counts.cumsum(0) - counts, torch.arange(total)
    group = torch.randperm(len(counts), generator=draw)[turn % len(counts)]
    picks = by_state[starts[group] + turn // len(counts) % counts[group]]
    return picks[torch.randperm(total, generator=draw)]


def _check(states: Tensor, actions: Tensor, rewards: Tensor, space: Space) -> None:
    sizes = [tuple(x.shape) for x in (states, actions, rewards)]
    if len(set(sizes)) != 1:
        raise PolicyError(f"states, actions and rewards are {sizes}; give three lists of the same length")
    finite_only(rewards, "rewards")
    for name, x, count in (("state", states, space.states), ("action", actions, space.count)):
        if int(x.min()) < 0 or int(x.max()) >= count:
            raise PolicyError(f"{name}s go from {int(x.min())} to {int(x.max())}, the table has 0 to {count - 1}")


def finite_only(x: Tensor, name: str) -> None:
    """Raises PolicyError when a value of `x` is not finite; `name` says what the values are."""
    bad = (~x.isfinite()).flatten().nonzero()
    if bad.numel():
        found = f"{bad.shape[0]} of {x.numel()} {name} are not finite, the first is number {int(bad[0])}"
        raise PolicyError(f"{found}; drop those prompts or roll them out again")


def gate_reward(
    compressed: Tensor, full: Tensor, *, passing: Tensor, budget: Tensor | int, tokens: Tensor | int
) -> Tensor:
    """Return a head's reward, minus the nats that compression costs, less the share of the prompt over the budget.

    compressed, full: losses of one continuation. passing: how many tokens reach the threshold. tokens: prompt tokens T.
    """
    return full - compressed - (passing - budget).clamp(min=0) / tokens


def checksum(table: Tensor) -> str:
    """Return the sha256 of a table's float32 bytes, row by row."""
    return hashlib.sha256(table.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


Rollouts = Callable[[Tensor], Sequence[Records]]
"""Takes the opposite table, float32 of its space's shape, and returns records made with it active."""


@dataclass(frozen=True, eq=False)
class Alternation:
    """Both tables after the last round.

    head_table, gate_table: float32. changed: (head, gate) actions that differ from the round before, for every round.
    converged: the last round changed none.
    """

    head: Fitted
    gate: Fitted
    head_table: Tensor
    gate_table: Tensor
    changed: tuple[tuple[int, int], ...]

    @property
    def rounds(self) -> int:
        return len(self.changed)

    @property
    def converged(self) -> bool:
        return self.changed[-1] == (0, 0)


def alternate(
    head_rollouts: Rollouts,
    gate_rollouts: Rollouts,
    *,
    head: Space,
    gate: Space,
    seed: int,
    max_rounds: int = 8,
    settings: Settings = PUBLISHED,
) -> Alternation:
    """Fit heads with the gate active, then the gate with these heads, until no action changes or `max_rounds`.

    Starts from neutral tables. Every fit draws its batches from the same seed, so that equal records give equal tables.
    Raises PolicyError for a record of another opposite table, and what `fit` raises.
    """
    if max_rounds < 1:
        raise PolicyError(f"max_rounds={max_rounds} compiles nothing; give at least 1")
    head_actions = torch.full((head.states,), head.fallback)
    gate_actions = torch.full((gate.states,), gate.fallback)
    changed: list[tuple[int, int]] = []
    while len(changed) < max_rounds and (0, 0) not in changed:
        heads = _fit_round(head_rollouts, gate.table(gate_actions), head, seed=seed, settings=settings)
        gates = _fit_round(gate_rollouts, head.table(heads.actions), gate, seed=seed + 1, settings=settings)
        changed.append((int((heads.actions != head_actions).sum()), int((gates.actions != gate_actions).sum())))
        head_actions, gate_actions = heads.actions, gates.actions
    return Alternation(heads, gates, head.table(head_actions), gate.table(gate_actions), tuple(changed))


def _fit_round(rollouts: Rollouts, opposite: Tensor, space: Space, *, seed: int, settings: Settings) -> Fitted:
    """A table fitted to roll-outs against `opposite`. Raises PolicyError for a record of another opposite table."""
    wanted, found = checksum(opposite), rollouts(opposite)
    for number, records in enumerate(found):
        if records.opposite != wanted:
            other = f"record {number} was rolled out against table {records.opposite[:12] or 'none'}"
            raise PolicyError(f"{other}, the current one is {wanted[:12]}; roll it out again")
    return fit(found, space, seed=seed, settings=settings)
