"""A method that looks across layers: their heads compete for the same slots."""

WHAT = "tokens of all layers and heads together by the norm of their values"

METHOD = '''"""@CLASS@: one choice over all layers and KV heads, until a score of your own takes its place.

Source: none yet; give the paper's address here and in `paper=`. Differences: state every one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import KV, KVPolicy, LayerView, PromptView, best
from methods.device import read
from methods.registry import method


@method("@NAME@", paper="control, no paper")
@dataclass(frozen=True)
class @CLASS@(KVPolicy):
    """Tokens of all layers and heads together by the norm of their values; the last one in every head."""

    def score(self, view: LayerView) -> Tensor:  # [B, H, T], higher is kept; layers must be comparable
        return view.kv.values.float().square().sum(dim=-1).sqrt()

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        scores = torch.stack([layer.only_live(self.score(layer))[0] for layer in view.layers])  # [L, H, T]
        layers, heads, tokens = scores.shape
        scores[..., -1] = torch.inf
        top = best(scores.flatten(), layers * heads * min(budget, tokens))
        chosen = torch.zeros_like(scores, dtype=torch.bool).flatten().scatter_(0, top, True).view(scores.shape)
        chosen &= scores > -torch.inf  # slots that hold nothing
        places = torch.arange(tokens, device=scores.device).masked_fill(~chosen, tokens).sort(dim=-1).values
        [most] = read([chosen.sum(dim=-1).amax(dim=-1)])  # of the fullest head of each layer; a GPU is waited for once
        own = [places[i, :, :width].unsqueeze(0) for i, width in enumerate(most)]
        slots = [x.masked_fill(x == tokens, -1) for x in own]  # -1: an empty slot, which costs no bytes
        return [layer.kv.take(x) for layer, x in zip(view.layers, slots, strict=True)]
'''

TEST = '''"""The contract of @NAME@, and its kept tokens against a plain loop that shares no code with it."""

import math

import pytest

from harness.contract import check_method, make_view
from methods.registry import make_policy


def test_the_contract_holds() -> None:
    check_method("@NAME@")


@pytest.mark.parametrize(("tokens", "budget"), [(9, 1), (9, 4), (40, 8), (40, 39)])
def test_kept_tokens_are_those_of_a_plain_loop(tokens: int, budget: int) -> None:
    policy = make_policy("@NAME@")
    view, last = make_view(tokens, policy.needs), tokens - 1
    norms = {}
    for at, layer in enumerate(view.layers):
        for head, values in enumerate(layer.kv.values[0].tolist()):
            norms |= {(at, head, t): math.sqrt(sum(x * x for x in value)) for t, value in enumerate(values)}
    kept = {slot for slot in norms if slot[2] == last}
    heads = len(kept)
    kept |= set(sorted(norms.keys() - kept, key=lambda slot: -norms[slot])[: heads * (budget - 1)])
    for at, kv in enumerate(policy.compress(view, budget)):
        for head, positions in enumerate(kv.positions[0].tolist()):
            assert [t for t in positions if t >= 0] == sorted(slot[2] for slot in kept if slot[:2] == (at, head))
'''
