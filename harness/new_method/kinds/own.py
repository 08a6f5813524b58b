"""A method without a budget: the prompt says how much is kept."""

WHAT = "tokens whose keys have a norm below the mean of their head"

METHOD = '''"""@CLASS@: as many tokens as pass a threshold, until one of your own takes its place.

Source: none yet; give the paper's address here and in `paper=`. Differences: state every one.
"""

from dataclasses import dataclass

import torch

from methods.base import KV, Kind, KVPolicy, PromptView
from methods.device import read
from methods.registry import method


@method("@NAME@", paper="control, no paper")
@dataclass(frozen=True)
class @CLASS@(KVPolicy):
    """Tokens whose keys have a norm below `share` of the mean of their head, and the last one."""

    share: float = 1.0

    @property
    def kind(self) -> Kind:
        return "own"  # it is given no budget: how much it keeps is what comes out

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        places = []
        for layer in view.layers:
            norms = layer.finite(layer.kv.keys.float().square().sum(dim=-1).sqrt(), "norms")  # [B, H, T]
            chosen = norms < self.share * norms.mean(dim=-1, keepdim=True)
            chosen[..., -1] = True
            every = torch.arange(layer.tokens, device=norms.device)
            places.append(every.masked_fill(~chosen, layer.tokens).sort(dim=-1).values)
        most = read([(own < view.tokens).sum(dim=-1).amax().view(1) for own in places])  # a GPU is waited for once
        slots = [own[..., :width] for own, (width,) in zip(places, most, strict=True)]
        left = [own.masked_fill(own == view.tokens, -1) for own in slots]  # -1: an empty slot, which costs no bytes
        return [layer.kv.take(own) for layer, own in zip(view.layers, left, strict=True)]
'''

TEST = '''"""The contract of @NAME@, and its kept tokens against a plain loop that shares no code with it."""

import math

import pytest

from harness.contract import check_method, make_view
from methods.registry import make_policy


def test_the_contract_holds() -> None:
    check_method("@NAME@")


@pytest.mark.parametrize(("tokens", "share"), [(9, 1.0), (40, 1.0), (40, 0.8), (40, 0.0), (40, 9.0)])
def test_kept_tokens_are_those_of_a_plain_loop(tokens: int, share: float) -> None:
    policy = make_policy("@NAME@", {"share": share})
    view = make_view(tokens, policy.needs)
    for layer, kv in zip(view.layers, policy.compress(view, tokens), strict=True):
        for head, keys in enumerate(layer.kv.keys[0].tolist()):
            norms = [math.sqrt(sum(x * x for x in key)) for key in keys]
            most = share * sum(norms) / tokens
            kept = [t for t, norm in enumerate(norms) if norm < most or t == tokens - 1]
            assert [t for t in kv.positions[0, head].tolist() if t >= 0] == kept
'''
