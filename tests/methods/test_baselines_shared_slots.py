"""Baselines that share slots out between heads or layers, against plain loops; what a head gives up is freed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from harness.engine.row_cache import GrowingRows
from methods.base import KVPolicy, PolicyError, PromptView
from methods.registry import make_policy
from tests.methods.test_golden import DIM, HEADS, LAYERS, Gold, kept_by, make_layers, naive_pooled, naive_top, sizes

SLOT = 2 * DIM * 4  # float32 key and value


def whole(shares: list[Fraction], total: int) -> list[int]:
    """Whole slots by largest remainder."""
    slots = [int(share) for share in shares]
    first = sorted(range(len(shares)), key=lambda i: (slots[i] - shares[i], i))
    for i in first[: total - sum(slots)]:
        slots[i] += 1
    return slots


def wins(rows: list[list[float]], count: int) -> list[int]:
    """How many of the `count` best entries of all rows each row owns; equal ones: the earlier row, then token."""
    ranked = sorted((-score, i, t) for i, row in enumerate(rows) for t, score in enumerate(row))
    return [sum(i == row for _, i, _ in ranked[:count]) for row in range(len(rows))]


def naive_adakv(pooled: list[list[float]], budget: int, *, window: int, floor: bool) -> list[int]:
    """Slots of every head of a layer."""
    tokens = len(pooled[0])
    mean = budget - window
    if mean <= 0 or tokens <= window:
        return [budget] * HEADS
    past = [row[: tokens - window] for row in pooled]
    if floor:
        safe = max(0, budget // 5 - window)
        for row in past:
            for t in sorted(range(len(row)), key=lambda t: (-row[t], t))[:safe]:
                row[t] = 1e9
        return [window + n for n in wins(past, HEADS * mean)]
    shares = [Fraction(4, 5) * n + Fraction(1, 5) * mean for n in wins(past, HEADS * mean)]
    return [window + n for n in whole(shares, HEADS * mean)]


@sizes
@pytest.mark.parametrize("preset", ["", "@paper", "@kvcf", "@kvpress", "@floor"])
def test_adakv_shares_a_layers_slots_out_by_its_best_scores(preset: str, tokens: int, budget: int) -> None:
    table = {"@kvcf": (8, 7, "max"), "@kvpress": (64, 5, "avg"), "@floor": (2, 5, "avg")}
    window, kernel, kind = table.get(preset, (32, 7, "max"))
    own: dict[str, Any] = {"recent": 2, "kernel": 5, "pool": "avg", "floor": True} if preset == "@floor" else {}
    layers = make_layers(tokens)
    for gold, heads in zip(layers, kept_by("adakv" + preset.replace("@floor", ""), layers, budget, **own), strict=True):
        pooled = naive_pooled(gold, window=window, kernel=kernel, kind=kind, shared=False)
        counts = naive_adakv(pooled, budget, window=window, floor=preset in ("@kvpress", "@floor"))
        assert sum(counts) == HEADS * budget
        assert heads == [naive_top(row, n, recent=window) for row, n in zip(pooled, counts, strict=True)]


def lopsided(tokens: int) -> tuple[Gold, ...]:
    """Layers whose first head looks at a few tokens and whose others spread evenly, the more so the deeper."""
    layers = make_layers(tokens)
    for gold in layers:
        gold.view.queries = gold.view.queries.clone()
        gold.view.queries[:, :HEADS] *= 3 + gold.view.index
        gold.view.queries[:, HEADS:] *= 0.1
        gold.view._memo.clear()
    return layers


@pytest.fixture
def uneven() -> Any:
    make_layers.cache_clear()
    yield lopsided(77)
    make_layers.cache_clear()


def test_adakvs_heads_are_ragged_and_what_they_give_up_is_freed(uneven: tuple[Gold, ...]) -> None:
    policy = make_policy("adakv@kvcf")
    kept = policy.compress(PromptView([gold.view for gold in uneven]), 20)
    counts = [kv.live[0].tolist() for kv in kept]
    assert all(abs(row[0] - row[1]) > 4 and sum(row) == 40 and min(row) >= 8 + 12 // 5 for row in counts)
    for kv in kept:
        rows = GrowingRows([kv], position=77, room=1)
        held = sum(x.numel() * x.element_size() for group in rows.groups for x in (group.keys, group.values))
        assert kv.nbytes == 40 * SLOT
        assert held == kv.nbytes + HEADS * SLOT  # room for one token, and no padding
    assert policy.notes(20, 77, LAYERS) == ()
    assert "share evenly" in policy.notes(8, 77, LAYERS)[0]


def naive_dynamickv(pooled: list[list[list[float]]], budget: int, *, window: int, ratio: int) -> list[int]:
    """Slots of every layer. pooled: [L][H][T]."""
    tokens = len(pooled[0][0])
    mean = budget - window
    if mean <= 0 or tokens <= window:
        return [budget] * len(pooled)
    flat = [[x for row in layer for x in row[: tokens - window]] for layer in pooled]
    counts = wins(flat, mean * len(pooled) * HEADS)
    cap = min(ratio * mean, tokens - window)
    slots, left = [Fraction(0)] * len(pooled), Fraction(mean * len(pooled))
    open_ = [i for i, n in enumerate(counts) if n]
    while open_ and left:  # shares in proportion, what a full layer cannot hold to the others
        total = sum(counts[i] for i in open_)
        add = {i: min(cap - slots[i], left * counts[i] / total) for i in open_}
        for i, more in add.items():
            slots[i] += more
        left -= sum(add.values())
        open_ = [i for i in open_ if slots[i] < cap]
    return [window + n for n in whole(slots, mean * len(pooled))]


@sizes
@pytest.mark.parametrize("preset", ["", "@paper", "@runner", "@tight"])
def test_dynamickv_shares_a_prompts_slots_out_by_its_best_scores(preset: str, tokens: int, budget: int) -> None:
    window, kind, ratio = (16, "avg", 5) if preset == "@runner" else (8, "max", 1 if preset == "@tight" else 10)
    layers = make_layers(tokens)
    own: dict[str, Any] = {"ratio": 1} if preset == "@tight" else {}
    pooled = [naive_pooled(gold, window=window, kernel=7, kind=kind, shared=False) for gold in layers]
    slots = naive_dynamickv(pooled, budget, window=window, ratio=ratio)
    assert sum(slots) == LAYERS * budget
    for rows, n, heads in zip(
        pooled, slots, kept_by("dynamickv" + preset.replace("@tight", ""), layers, budget, **own), strict=True
    ):
        assert heads == [naive_top(row, n, recent=window) for row in rows]


def test_dynamickvs_budgets_follow_the_prompt(uneven: tuple[Gold, ...]) -> None:
    policy = make_policy("dynamickv")
    view = PromptView([gold.view for gold in uneven])
    found = [int(kv.live[0, 0]) for kv in policy.compress(view, 20)]
    for gold in uneven[:1]:
        gold.view.queries = gold.view.queries * 0.01
        gold.view._memo.clear()
    flat = [int(kv.live[0, 0]) for kv in policy.compress(view, 20)]
    assert found != flat
    assert sum(found) == sum(flat) == 20 * LAYERS
    assert policy.per_layer(20, view.sizes) is None
    assert policy.notes(20, 77, LAYERS) == ()
    assert "share evenly" in policy.notes(8, 77, LAYERS)[0]


def test_dynamickv_gives_what_no_layer_earned_to_those_with_room(uneven: tuple[Gold, ...]) -> None:
    for gold in uneven[1:]:  # their windows look at themselves alone
        gold.view.kv.keys[:, :, :69] = 0
        gold.view.kv.keys[:, :, 69:] = 1
        gold.view.queries = torch.full_like(gold.view.queries, 100)
        gold.view._memo.clear()
    view = PromptView([gold.view for gold in uneven])
    kept = [int(kv.live[0, 0]) for kv in make_policy("dynamickv", {"ratio": 2}).compress(view, 20)]
    assert kept == [8 + 2 * 12, 8 + 6, 8 + 6]


def test_too_few_observed_queries_are_reported() -> None:
    layers = make_layers(77)
    for name in ("adakv", "dynamickv", "chunkkv"):
        policy: KVPolicy = make_policy(name, {"recent": 70})
        with pytest.raises(PolicyError, match="70 window queries wanted, 64 observed"):
            policy.compress(PromptView([gold.view for gold in layers]), 75)
