"""Compactor's kept tokens are those of a loop written from the formula."""

import math

import numpy as np
import pytest
import torch

from methods.base import LayerView, PolicyError, PromptView
from methods.registry import make_policy
from tests.methods.loops import HEADS, Array, naive_top, positions
from tests.methods.test_leverage import TOKENS, made, naive

FIRST, LAST = 8, 4


def layer(seed: int) -> tuple[LayerView, Array]:
    view, bare = made(seed)
    draw = torch.Generator().manual_seed(seed)
    view.queries = torch.randn(1, 2 * HEADS, TOKENS, bare.shape[-1], generator=draw)
    return view, bare


def received(view: LayerView, head: int, chunk: int) -> list[float]:
    """Attention of both heads of the group within stretches of the tokens with a score, by value, over 3 tokens."""
    keys, values = (x[0, head, FIRST : TOKENS - LAST].double().numpy() for x in (view.kv.keys, view.kv.values))
    got = [0.0] * len(keys)
    for start in range(0, len(keys), chunk):
        part = range(start, min(start + chunk, len(keys)))
        for query in (2 * head, 2 * head + 1):
            for t in part:
                q = view.queries[0, query, FIRST + t].double().numpy()
                powers = {s: math.exp(float(q @ keys[s])) for s in part}
                for s in part:
                    got[s] += powers[s] / sum(powers.values()) / 2
    worth = [x * math.sqrt(sum(float(v) ** 2 for v in value)) for x, value in zip(got, values, strict=True)]
    return [sum(worth[max(0, t - 1) : t + 2]) / 3 for t in range(len(worth))]


@pytest.mark.parametrize("budget", [1, 12, 13, 30, 59])
@pytest.mark.parametrize(("label", "chunk", "blend"), [("compactor", 16, None), ("compactor@engine", 20, 0.5)])
def test_what_is_kept_is_what_the_loop_keeps(label: str, chunk: int, blend: float | None, budget: int) -> None:
    view, bare = layer(6)
    view.kv.keys = view.kv.keys / 8  # so that weights are not of one key alone
    halves = [
        np.array([naive(keys[FIRST : TOKENS - LAST] / 8, 0.01) for keys in bare]),
        np.array([received(view, head, chunk) for head in range(HEADS)]),
    ]
    lever, attention = ((x - x.mean()) / x.std(ddof=1) for x in halves)
    scores = (1 - budget / TOKENS if blend is None else blend) * lever + attention
    gold = [naive_top([0.0] * FIRST + row + [0.0] * LAST, budget, LAST, FIRST) for row in scores.tolist()]
    policy = make_policy(label, {"chunk": chunk})
    assert positions(policy.compress(PromptView([view]), budget)[0]) == gold


def test_every_query_is_needed() -> None:
    view, _ = made(1)  # 8 were observed
    with pytest.raises(PolicyError, match="60 window queries wanted, 8 observed"):
        make_policy("compactor").compress(PromptView([view]), 20)
