"""The contract of recent_keys, and its kept tokens against a plain loop that shares no code with it."""

from __future__ import annotations

import math

import pytest

from harness.contract import check_method, make_view
from methods.registry import make_policy


@pytest.mark.parametrize("label", ["recent_keys", "recent_keys@short"])
def test_the_contract_holds(label: str) -> None:
    check_method(label)


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


@pytest.mark.parametrize(("tokens", "budget"), [(9, 1), (9, 6), (40, 8), (40, 39)])
def test_kept_tokens_are_those_of_a_plain_loop(tokens: int, budget: int) -> None:
    policy = make_policy("recent_keys@short")
    view = make_view(tokens, policy.needs)
    for layer, kv in zip(view.layers, policy.compress(view, budget), strict=True):
        for head, keys in enumerate(layer.kv.keys[0].tolist()):
            mean = [sum(column) / 4 for column in zip(*keys[-4:], strict=True)]
            recent = list(range(tokens - min(4, budget), tokens))
            least = sorted(range(tokens - 4), key=lambda token: (cosine(keys[token], mean), token))
            assert kv.positions[0, head].tolist() == sorted([*least[: max(0, budget - 4)], *recent])
