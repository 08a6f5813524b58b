"""Coupled compilation of the head and the gate table: each is fitted to roll-outs made with the other one active.

Source: https://arxiv.org/abs/2602.08686 (heads with the current gate, then the gate with the updated heads, until the
actions stop changing). Difference: records carry the checksum of the opposite table, and stale ones are refused.

Shape letters as in `methods.compilerkv.cql`, and R roll-outs of a prompt, F entries set in one roll-out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import PolicyError
from methods.compilerkv.cql import PUBLISHED, Fitted, Records, Settings, Space, fit


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
