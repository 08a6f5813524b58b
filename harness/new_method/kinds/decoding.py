"""A method that goes on evicting while it decodes."""

WHAT = "tokens whose keys have the smallest norm, chosen again at every decoded token"

METHOD = '''"""@CLASS@: the cache stays at its budget while it decodes, until a rule of your own takes its place.

Source: none yet; give the paper's address here and in `paper=`. Differences: state every one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import EvictionPolicy, LayerView, StepView
from methods.registry import method


@method("@NAME@", paper="control, no paper")
@dataclass(frozen=True)
class @CLASS@(EvictionPolicy):
    """Tokens whose keys have the smallest norm, at every step anew; the last `recent` always."""

    recent: int = 4
    evict: bool = True

    def score(self, view: LayerView) -> Tensor:  # [B, H, T], higher is kept
        return -view.kv.keys.float().square().sum(dim=-1).sqrt()

    def after_step(self, step: StepView) -> Tensor:  # [B, H], the slot that each head gives up, -1 for none
        kv = step.kv
        norms = kv.load()[0].float().square().sum(dim=-1).sqrt()
        late = kv.positions > step.position - self.recent  # where nothing else is left, the oldest goes
        worst = torch.where(late, -1.0 - kv.positions, norms).masked_fill(kv.positions < 0, -torch.inf)
        return worst.argmax(dim=-1).masked_fill(kv.live <= step.budget, -1)
'''

TEST = '''"""The contract of @NAME@, and its tokens at every step against a plain loop that shares no code with it."""

import math

import pytest
import torch

from harness.contract import check_method, make_view
from methods.base import KV, StepView
from methods.registry import make_policy


def test_the_contract_holds() -> None:
    check_method("@NAME@")


@pytest.mark.parametrize(("tokens", "budget"), [(20, 3), (20, 6), (40, 12)])
def test_tokens_are_those_of_a_plain_loop_at_every_step(tokens: int, budget: int) -> None:
    policy, recent = make_policy("@NAME@"), 4
    view, draw = make_view(tokens, policy.needs), torch.Generator().manual_seed(1)
    kv, whole = policy.compress(view, budget)[0], view.layers[0].kv
    norms = [dict(enumerate(math.sqrt(sum(x * x for x in k)) for k in keys)) for keys in whole.keys[0].tolist()]
    held = [set(positions) for positions in kv.positions[0].tolist()]
    for position in range(tokens, tokens + 9):
        new = torch.randn(1, len(held), 1, kv.keys.shape[3], generator=draw)
        at = torch.full((1, len(held), 1), position)
        kv = KV(*(torch.cat([x, new], dim=2) for x in kv.load()), torch.cat([kv.positions, at], dim=2))
        freed = policy.after_step(StepView(kv, None, position, budget)).unsqueeze(2)
        kv.positions.scatter_(2, freed, -1)
        for head, (of, own) in enumerate(zip(norms, held, strict=True)):
            of[position] = math.sqrt(sum(x * x for x in new[0, head, 0].tolist()))
            own.add(position)
            old = [t for t in own if t <= position - recent]
            own.remove(max(old, key=of.__getitem__) if old else min(own))
            assert {t for t in kv.positions[0, head].tolist() if t >= 0} == own
'''
