"""A method that scores tokens: the plainest."""

WHAT = "tokens whose keys have the smallest norm"

METHOD = '''"""@CLASS@: keep the tokens whose keys have the smallest norm, until a score of your own takes their place.

Source: none yet; give the paper's address here and in `paper=`. Differences: state every one.
"""

from dataclasses import dataclass

from torch import Tensor

from methods.base import EvictionPolicy, LayerView
from methods.registry import method


@method("@NAME@", paper="control, no paper")
@dataclass(frozen=True)
class @CLASS@(EvictionPolicy):
    """Tokens whose keys have the smallest norm; the last `recent` always."""

    recent: int = 1

    def score(self, view: LayerView) -> Tensor:  # [B, H, T], higher is kept
        return -view.kv.keys.float().square().sum(dim=-1).sqrt()
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
    view = make_view(tokens, policy.needs)
    for layer, kv in zip(view.layers, policy.compress(view, budget), strict=True):
        for head, keys in enumerate(layer.kv.keys[0].tolist()):
            norms = [math.sqrt(sum(x * x for x in key)) for key in keys]
            smallest = sorted(range(tokens - 1), key=lambda token: (norms[token], token))
            assert kv.positions[0, head].tolist() == sorted([tokens - 1, *smallest[: budget - 1]])
'''
