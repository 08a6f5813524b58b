"""LagKV's kept tokens are those of a loop written from the paper's formula."""

import math
from itertools import pairwise

import pytest
import torch

from methods.base import KV
from methods.registry import make_policy
from tests.methods.loops import HEADS, LAYERS, Array, Gold, kept_by, make_layers, sizes, top


def worth(states: Array, lag: int, sinks: int) -> list[float]:
    """Softmax over each partition that has a next one, of one head's keys or values [T, D]."""
    found = []
    parts = [states[at : at + lag] for at in range(sinks, len(states) - lag + 1, lag)]
    for own, after in pairwise(parts):
        deviations = []
        for token in own:
            seen = [(x - min(c)) / (max(c) - min(c)) for x, c in zip(token, after.T, strict=True)]
            mean = sum(seen) / len(seen)
            deviations.append(math.sqrt(sum((x - mean) ** 2 for x in seen) / (len(seen) - 1)))
        powers = [math.exp(x) for x in deviations]
        found += [x / sum(powers) for x in powers]
    return found


def ranks(gold: Gold, lag: int, sinks: int) -> list[list[float]]:
    """Rank of each token in its partition; the sinks first, then the latest of those that are not measured."""
    rows = []
    for keys, values in zip(gold.keys, gold.view.kv.values[0].double().numpy(), strict=True):
        both = [k + v for k, v in zip(worth(keys, lag, sinks), worth(values, lag, sinks), strict=True)]
        row = [math.inf if t < sinks else float(lag + t) for t in range(len(keys))]
        for start in range(0, len(both), lag):
            part = range(start, start + lag)
            for rank, t in enumerate(sorted(part, key=lambda t: (both[t], -t))):
                row[sinks + t] = float(rank)
        rows.append(row)
    return rows


@pytest.mark.parametrize(("lag", "sinks"), [(8, 4), (10, 0), (3, 16), (40, 4)])
@pytest.mark.parametrize("budget", [1, 8, 20, 30, 50, 70])
def test_what_is_kept_is_what_the_loop_keeps(lag: int, sinks: int, budget: int) -> None:
    layers = make_layers(77)
    loop = top(lambda gold: ranks(gold, lag, sinks))
    assert kept_by("lagkv", layers, budget, lag=lag, sinks=sinks) == loop(layers, budget)


def test_each_partition_keeps_as_many() -> None:
    layers = make_layers(77)
    for heads in kept_by(
        "lagkv@kvpress", layers, 4 + 8 * 3 + 9, lag=8
    ):  # 9 partitions, 8 of them measured, 1 left over
        for kept in heads:
            assert [sum(4 + 8 * i <= t < 12 + 8 * i for t in kept) for i in range(9)] == [3] * 8 + [8]
            assert kept[:4] == [0, 1, 2, 3] and kept[-1] == 76


def test_a_short_prompt_keeps_sinks_and_recent_tokens() -> None:
    layers = make_layers(77)  # of two partitions of 128 none is whole
    assert kept_by("lagkv", layers, 20) == [[[*range(16), *range(73, 77)]] * HEADS] * LAYERS
    assert "whatever their score" in make_policy("lagkv").notes(20, sizes(77, LAYERS))[0]
    assert make_policy("lagkv").notes(257, sizes(1024, LAYERS)) == ()  # 16 + 128 + 112 are kept anyway
    assert make_policy("lagkv").notes(256, sizes(1024, LAYERS)) != ()


def test_a_constant_channel_is_left_out() -> None:
    [gold, *_] = make_layers(77)
    keys = gold.view.kv.keys.clone()
    keys[..., 0] = 1.0
    gold.view.kv, whole = KV(keys, gold.view.kv.values, gold.view.kv.positions), gold.view.kv
    try:
        kept = kept_by("lagkv", (gold,), 30, lag=8)
    finally:
        gold.view.kv = whole
        gold.view.forget()
    assert [len(own) for own in kept[0]] == [30, 30] and torch.isfinite(keys).all()
