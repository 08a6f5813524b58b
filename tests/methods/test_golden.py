"""Kept positions of every method against plain loops written from the papers, which share no code with the methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from harness.engine.kernels import causal_attention, column_sums
from methods.base import KV, LayerView, PromptView, StepView
from methods.h2o import H2O
from methods.pyramidkv import PyramidKV
from methods.registry import make_policy
from methods.streamingllm import StreamingLLM

LAYERS, HEADS, GROUP, DIM = 3, 2, 3, 8
Array = np.ndarray[Any, Any]
SIZES = [(29, 14), (29, 28), (42, 20), (77, 1), (77, 8), (77, 50), (77, 70)]
"""Prompts within every window, between two, beyond all; budgets below, at and above the windows of 8, 32 and 64."""
sizes = pytest.mark.parametrize(("tokens", "budget"), SIZES)


@dataclass(frozen=True)
class Gold:
    """A random layer, and its causal softmax [H, G, T, T] by loops in float64. Shared by tests: no one writes to it."""

    view: LayerView
    attention: Array

    @property
    def received(self) -> Array:
        """Attention that each token received from the queries at and after it, summed over the group: [H, T]."""
        total: Array = self.attention.sum(axis=2).sum(axis=1)
        return total


@cache
def make_layers(tokens: int) -> tuple[Gold, ...]:
    """Random keys, values and queries, peaked enough that attention is far from uniform."""
    draw = torch.Generator().manual_seed(tokens)
    layers = []
    for index in range(LAYERS):
        keys, values = (torch.randn(1, HEADS, tokens, DIM, generator=draw) for _ in range(2))
        queries = 2 * torch.randn(1, HEADS * GROUP, tokens, DIM, generator=draw)
        attention = naive_attention(queries[0].double().numpy(), keys[0].double().numpy(), DIM**-0.5)
        kv = KV(keys, values, torch.arange(tokens).expand(1, HEADS, tokens))
        view = LayerView(index, kv, queries[:, :, max(0, tokens - 64) :], DIM**-0.5)
        view.column_sums = torch.tensor(attention.sum(axis=2))[None].float()
        layers.append(Gold(view, attention))
    return tuple(layers)


def naive_attention(queries: Array, keys: Array, scaling: float) -> Array:
    """Softmax of queries [Hq, T, D] over keys [H, T, D] -> [H, G, T, T]."""
    out = np.zeros((HEADS, GROUP, keys.shape[1], keys.shape[1]))
    for head, member, at in np.ndindex(out.shape[:3]):
        query = queries[head * GROUP + member, at]
        powers = [math.exp(float(query @ keys[head, t]) * scaling) for t in range(at + 1)]
        out[head, member, at, : at + 1] = [power / sum(powers) for power in powers]
    return out


def naive_top(scores: list[float], budget: int, *, sinks: int = 0, recent: int = 0) -> list[int]:
    """The last `recent`, then the first `sinks`, then the best of the others; equal scores go to the earlier token."""
    tokens = len(scores)
    kept: list[int] = []
    by_score = sorted(range(tokens), key=lambda t: (-scores[t], t))
    for t in [*range(tokens - 1, tokens - 1 - recent, -1), *range(sinks), *by_score]:
        if 0 <= t < tokens and t not in kept and len(kept) < budget:
            kept.append(t)
    return sorted(kept)


def naive_pooled(gold: Gold, *, window: int, kernel: int, kind: str, shared: bool) -> list[list[float]]:
    """SnapKV's votes of every KV head: mean over the window and the query group, pooled before the window."""
    tokens = gold.view.tokens
    votes = gold.attention[:, :, -window:].mean(axis=2).mean(axis=1)
    if shared:
        votes[:] = votes.mean(axis=0)
    prefix = max(0, tokens - window)
    pooled = []
    for head in range(HEADS):
        row = list(votes[head])
        for t in range(prefix):
            near = [votes[head, i] for i in range(t - kernel // 2, t + kernel // 2 + 1) if 0 <= i < prefix]
            row[t] = max(near) if kind == "max" else sum(near) / kernel
        pooled.append(row)
    return pooled


def kept_by(label: str, layers: tuple[Gold, ...], budget: int, **overrides: object) -> list[list[list[int]]]:
    """Positions kept, [layer][head]."""
    view = PromptView([gold.view for gold in layers])
    return [positions(kv) for kv in make_policy(label, overrides).compress(view, budget)]


def positions(kv: KV) -> list[list[int]]:
    return [sorted(p for p in head if p >= 0) for head in kv.positions[0].tolist()]


@sizes
@pytest.mark.parametrize("preset", ["", "@paper", "@kvcf", "@kvpress", "@w8k13"])
@pytest.mark.parametrize("name", ["snapkv", "snapkv_shared"])
def test_snapkv_keeps_pooled_votes_and_the_window(name: str, preset: str, tokens: int, budget: int) -> None:
    table = {"": (32, 7, "max"), "@paper": (32, 7, "max"), "@kvcf": (8, 7, "max")}
    window, kernel, kind = table.get(preset) or {"@kvpress": (64, 5, "avg"), "@w8k13": (8, 13, "avg")}[preset]
    layers = make_layers(tokens)
    for gold, heads in zip(layers, kept_by(name + preset, layers, budget), strict=True):
        pooled = naive_pooled(gold, window=window, kernel=kernel, kind=kind, shared=name == "snapkv_shared")
        assert heads == [naive_top(row, budget, recent=window) for row in pooled]


def naive_pyramid(budget: int, tokens: int, layers: int, *, window: int = 8, beta: int = 20) -> list[int]:
    """Whole slots of each layer: a line from high to low over the slots outside the window, spent exactly."""
    mean = Fraction(budget - window)
    low, high = mean / beta, 2 * mean - mean / beta
    if high >= tokens - window:
        high, low = Fraction(tokens - window), 2 * mean - (tokens - window)
    if mean <= 0 or low > high:
        return [budget] * layers
    shares = [high - (high - low) * i / (layers - 1) for i in range(layers)]
    whole = [math.floor(share) for share in shares]
    first = sorted(range(layers), key=lambda i: (whole[i] - shares[i], i))
    for i in first[: layers * (budget - window) - sum(whole)]:
        whole[i] += 1
    return [window + slots for slots in whole]


@sizes
def test_pyramidkv_keeps_more_in_low_layers(tokens: int, budget: int) -> None:
    layers = make_layers(tokens)
    slots = naive_pyramid(budget, tokens, LAYERS)
    if budget == 20:
        assert slots[0] > slots[1] > slots[2]
    for index, heads in enumerate(kept_by("pyramidkv@paper", layers, budget)):
        pooled = naive_pooled(layers[index], window=8, kernel=7, kind="max", shared=False)
        assert heads == [naive_top(row, slots[index], recent=8) for row in pooled]


def test_pyramidkv_spends_its_budget_as_the_formula_says() -> None:
    for layers, budget in product((2, 4, 28, 32), (9, 64, 128, 500, 512, 1000, 1023)):
        assert PyramidKV().layer_budgets(budget, 1024, layers) == naive_pyramid(budget, 1024, layers)


def test_pyramidkv_of_kvpress_is_flat_below_1280() -> None:
    policy = make_policy("pyramidkv@kvpress")
    assert policy.layer_budgets(1279, 8192, 4) == [1279] * 4
    assert policy.notes(1279, 8192, 4) == ("pyramid is flat at this budget",)
    assert policy.layer_budgets(1280, 8192, 4) == [2496, 1685, 875, 64]


@sizes
@pytest.mark.parametrize("preset", ["", "@kvcf", "@kvpress"])
def test_h2o_keeps_heavy_hitters_and_recent_tokens(preset: str, tokens: int, budget: int) -> None:
    recent = {"": budget - budget // 2, "@kvcf": 8, "@kvpress": 0}[preset]
    layers = make_layers(tokens)
    for gold, heads in zip(layers, kept_by("h2o" + preset, layers, budget), strict=True):
        received = gold.received.tolist()
        if preset == "@kvpress":
            received = [[row[t] / (tokens - t) for t in range(tokens)] for row in received]
        assert heads == [naive_top(row, budget, recent=recent) for row in received]


@sizes
def test_streamingllm_keeps_sinks_and_recent_tokens(tokens: int, budget: int) -> None:
    sinks = min(4, budget)
    expected = [*range(sinks), *range(tokens - budget + sinks, tokens)]
    assert kept_by("streamingllm", make_layers(tokens), budget) == [[expected] * HEADS] * LAYERS


@sizes
def test_random_keeps_the_last_token_and_a_seeded_draw(tokens: int, budget: int) -> None:
    for index, heads in enumerate(kept_by("random", make_layers(tokens), budget, seed=3)):
        draw = torch.rand(1, HEADS, tokens, generator=torch.Generator().manual_seed(3 * 1_000_003 + index))
        assert heads == [naive_top(row, budget, recent=1) for row in draw[0].tolist()]


def append(kv: KV, position: int, keys: torch.Tensor) -> None:
    """Put a new token into the first empty slot of each head. keys: [H, D]."""
    for head in range(HEADS):
        slot = kv.positions[0, head].tolist().index(-1)
        kv.keys[0, head, slot], kv.positions[0, head, slot] = keys[head], position


def free(kv: KV, victims: torch.Tensor) -> None:
    for head, victim in enumerate(victims[0].tolist()):
        if victim >= 0:
            kv.positions[0, head, victim] = -1


def with_empty_slots(kv: KV, count: int) -> KV:
    pad = torch.nn.functional.pad
    extra = {name: pad(x, (0, count)) for name, x in kv.extra.items()}
    keys, values = (pad(x, (0, 0, 0, count)) for x in (kv.keys, kv.values))
    return replace(kv, keys=keys, values=values, positions=pad(kv.positions, (0, count), value=-1), extra=extra)


@pytest.mark.parametrize("held_back", [False, True])
def test_h2o_evicts_the_lightest_old_token_while_decoding(held_back: bool) -> None:
    tokens, budget = 40, 20
    slots, recent = 18, 9  # 20 slots of 64 bytes hold 18 with a 4-byte sum each; half of them recent
    gold = make_layers(tokens)[0]
    books = [{t: row[t] for t in naive_top(row, slots, recent=recent)} for row in gold.received.tolist()]
    policy = H2O(evict=True)
    kv = with_empty_slots(policy.compress_layer(gold.view, budget), 2)
    assert positions(kv) == [sorted(book) for book in books]
    draw = torch.Generator().manual_seed(1)
    start = tokens - 1 if held_back else tokens
    kv.positions.masked_fill_(kv.positions == start, -1)
    for book in books:
        book.pop(start, None)
    for position in range(start, start + 25):
        append(kv, position, torch.zeros(HEADS, DIM))
        live = (kv.positions >= 0).unsqueeze(2)
        attention = torch.rand(1, HEADS, GROUP, kv.positions.shape[2], generator=draw) * live
        for head, book in enumerate(books):
            for slot, t in enumerate(kv.positions[0, head].tolist()):
                if t >= 0:
                    book[t] = book.get(t, 0.0) + float(attention[0, head, :, slot].double().sum())
            if len(book) > slots:
                del book[min((t for t in book if t <= position - recent), key=lambda t: book[t])]
        free(kv, policy.after_step(StepView(kv, attention, position, budget)))
        assert [sorted(book) for book in books] == [
            sorted(p for p in row if p >= 0) for row in kv.positions[0].tolist()
        ]


def rope(x: Array, position: int) -> Array:
    """Rotary embedding of x [D] at a position, half-rotation layout, base 10000."""
    half = len(x) // 2
    out = np.zeros_like(x)
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def rotate(keys: torch.Tensor, by: int) -> torch.Tensor:
    rows = [rope(row, by) for row in keys.reshape(-1, DIM).numpy()]
    return torch.tensor(np.array(rows)).reshape(keys.shape)


@pytest.mark.parametrize(("budget", "held_back"), [(12, False), (12, True), (3, False), (5, True)])
def test_streamingllm_counts_positions_inside_the_cache(budget: int, held_back: bool) -> None:
    tokens, sinks = 40, min(4, budget)
    rng = np.random.default_rng(0)
    plain = {t: rng.standard_normal((HEADS, DIM)) for t in range(tokens + 30)}  # keys before RoPE
    turned = torch.tensor(np.array([[[rope(plain[t][h], t) for t in range(tokens)] for h in range(HEADS)]]))
    whole = KV(turned, turned, torch.arange(tokens).expand(1, HEADS, tokens))
    policy = StreamingLLM(reassign=True, evict=True)
    kv = with_empty_slots(policy.compress_layer(LayerView(0, whole, turned, 1.0, rotate=rotate), budget), 2)
    start = tokens - 1 if held_back else tokens
    kv.positions.masked_fill_(kv.positions == start, -1)
    for position in range(start, start + 10):
        cached = [*range(sinks), *range(position - budget + sinks, position)]
        if held_back and position == start:
            cached = [*range(sinks), *range(tokens - budget + sinks, tokens - 1)]
        query = rng.standard_normal(DIM)
        for head in range(HEADS):
            slots = {t: slot for slot, t in enumerate(kv.positions[0, head].tolist()) if t >= 0}
            assert sorted(slots) == cached
            for place, t in enumerate(cached):
                expected = rope(query, len(cached)) @ rope(plain[t][head], place)
                assert rope(query, position) @ kv.load()[0][0, head, slots[t]].numpy() == pytest.approx(
                    expected, abs=1e-9
                )
        append(kv, position, torch.tensor(np.array([rope(plain[position][h], position) for h in range(HEADS)])))
        free(kv, policy.after_step(StepView(kv, None, position, budget)))


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("window", [1, 16, 64])
def test_window_attention_is_the_softmax(tokens: int, window: int) -> None:
    gold = make_layers(tokens)[0]
    np.testing.assert_allclose(gold.view.attention(window)[0].numpy(), gold.attention[:, :, -window:], atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 64, 65, 127, 300])
@pytest.mark.parametrize("fused", [True, False])
def test_column_sums_are_those_of_the_whole_softmax(tokens: int, fused: bool) -> None:
    keys, queries = torch.randn(1, HEADS, tokens, DIM), 2 * torch.randn(1, HEADS * GROUP, tokens, DIM)
    _, lse = causal_attention(queries, keys, keys, scaling=0.3, window=None)
    sums = column_sums(queries, keys, lse if fused else None, scaling=0.3)
    logits = queries[0].double() @ keys[0].double().repeat_interleave(GROUP, dim=0).transpose(1, 2) * 0.3
    whole = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf")).softmax(dim=-1).sum(dim=1)
    torch.testing.assert_close(sums.double().reshape(-1, tokens), whole, atol=1e-5, rtol=1e-5)
