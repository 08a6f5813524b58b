"""A method that gives each layer a budget of its own."""

WHAT = "tokens whose keys have the smallest norm, more of them in the first half of the layers"

METHOD = '''"""@CLASS@: more slots for the first half of the layers, until budgets of your own take their place.

Source: none yet; give the paper's address here and in `paper=`. Differences: state every one.
"""

from dataclasses import dataclass

from torch import Tensor

from methods.base import EvictionPolicy, LayerView
from methods.registry import method


@method("@NAME@", paper="control, no paper")
@dataclass(frozen=True)
class @CLASS@(EvictionPolicy):
    """Tokens whose keys have the smallest norm, half as many again in the first layers; the last `recent` always."""

    recent: int = 1

    def score(self, view: LayerView) -> Tensor:  # [B, H, T], higher is kept
        return -view.kv.keys.float().square().sum(dim=-1).sqrt()

    def layer_budgets(self, budget: int, tokens: int, layers: int) -> list[int]:  # sum to at most layers * budget
        budget, half = min(budget, tokens), layers // 2
        more = min(budget // 2, tokens - budget)
        return [budget + more] * half + [budget] * (layers - 2 * half) + [budget - more] * half
'''

TEST = '''"""The contract of @NAME@, and its budgets and tokens against a plain loop that shares no code with it."""

import math

import pytest

from harness.contract import check_method, make_view
from methods.registry import make_policy


def test_the_contract_holds() -> None:
    check_method("@NAME@")


@pytest.mark.parametrize(
    ("tokens", "budget", "counts"),
    [(9, 1, [1, 1, 1, 1]), (9, 4, [6, 6, 2, 2]), (40, 8, [12, 12, 4, 4]), (40, 39, [40, 40, 38, 38])],
)
def test_kept_tokens_are_those_of_a_plain_loop(tokens: int, budget: int, counts: list[int]) -> None:
    policy = make_policy("@NAME@")
    view = make_view(tokens, policy.needs)
    for layer, kv, count in zip(view.layers, policy.compress(view, budget), counts, strict=True):
        for head, keys in enumerate(layer.kv.keys[0].tolist()):
            norms = [math.sqrt(sum(x * x for x in key)) for key in keys]
            smallest = sorted(range(tokens - 1), key=lambda token: (norms[token], token))
            assert kv.positions[0, head].tolist() == sorted([tokens - 1, *smallest[: count - 1]])
'''
