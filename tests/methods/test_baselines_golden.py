"""Kept positions of the baselines against plain loops written from their papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from methods.base import KV, PolicyError, StepView
from methods.expected_attention import mean_turn
from methods.registry import make_policy
from methods.tova import TOVA
from tests.methods.test_golden import (
    DIM,
    GROUP,
    HEADS,
    LAYERS,
    Array,
    Gold,
    kept_by,
    make_layers,
    naive_pooled,
    naive_top,
    positions,
    rope,
    rotate,
    sizes,
)


def keys_of(gold: Gold) -> Array:
    found: Array = gold.view.kv.keys[0].double().numpy()
    return found


def length(x: Array) -> float:
    return math.sqrt(sum(float(a) ** 2 for a in x))


@sizes
@pytest.mark.parametrize("preset", ["", "@kvpress"])
def test_knorm_keeps_the_smallest_keys(preset: str, tokens: int, budget: int) -> None:
    layers = make_layers(tokens)
    for gold, heads in zip(layers, kept_by("knorm" + preset, layers, budget), strict=True):
        norms = [[length(key) for key in keys] for keys in keys_of(gold)]
        assert heads == [naive_top([-norm for norm in row], budget) for row in norms]


def test_knorm_of_the_paper_leaves_two_layers_whole_at_the_same_bytes() -> None:
    layers = make_layers(29)
    norms = [-length(key) for key in keys_of(layers[2])[1]]
    kept = kept_by("knorm@paper", layers, 20)
    assert [len(heads[0]) for heads in kept] == [29, 29, 2]
    assert kept[2][1] == naive_top(norms, 2)
    policy = make_policy("knorm@paper")
    assert policy.notes(20, 29, LAYERS) == () == policy.notes(29, 29, LAYERS)
    assert [len(heads[0]) for heads in kept_by("knorm@paper", layers, 19)] == [19, 19, 19]
    assert "not left whole" in policy.notes(19, 29, LAYERS)[0]
    assert sum(policy.layer_budgets(128, 1024, 30)) == 30 * 128  # type: ignore[attr-defined]
    assert policy.layer_budgets(128, 1024, 30)[:3] == [1024, 1024, 64]  # type: ignore[attr-defined]


@sizes
def test_keydiff_keeps_the_keys_least_like_their_mean(tokens: int, budget: int) -> None:
    layers = make_layers(tokens)
    for gold, heads in zip(layers, kept_by("keydiff", layers, budget), strict=True):
        for keys, kept in zip(keys_of(gold), heads, strict=True):
            anchor = sum(key / length(key) for key in keys) / tokens
            likeness = [float(key @ anchor) / length(key) / length(anchor) for key in keys]
            assert kept == naive_top([-x for x in likeness], budget)


@sizes
@pytest.mark.parametrize("preset", ["", "@paper", "@kvpress"])
def test_tova_keeps_what_the_last_query_attends_to(preset: str, tokens: int, budget: int) -> None:
    layers = make_layers(tokens)
    for gold, heads in zip(layers, kept_by("tova" + preset, layers, budget), strict=True):
        last = gold.attention[:, :, -1].reshape(HEADS * GROUP, tokens).mean(axis=0).tolist()
        assert heads == [naive_top(last, budget, recent=1 if preset == "@kvpress" else 0)] * HEADS


@pytest.mark.parametrize("recent", [0, 1])
def test_tova_drops_what_each_new_query_attends_to_least(recent: int) -> None:
    tokens, budget = 40, 12
    policy = TOVA(evict=True, recent=recent)
    kv = policy.compress_layer(make_layers(tokens)[0].view, budget)
    book = set(positions(kv)[0])
    pad = torch.nn.functional.pad
    keys, values = (pad(x, (0, 0, 0, 1)) for x in (kv.keys, kv.values))
    kv = KV(keys, values, pad(kv.positions, (0, 1), value=-1))
    draw = torch.Generator().manual_seed(1)
    dropped_new = 0
    for position in range(tokens, tokens + 40):
        kv.positions.scatter_(2, kv.positions.argmin(dim=-1, keepdim=True), position)
        attention = torch.rand(1, HEADS, GROUP, budget + 1, generator=draw)
        means = {t: float(attention[0, :, :, s].mean()) for s, t in enumerate(kv.positions[0, 0].tolist())}
        victim = min((t for t in means if t <= position - recent), key=lambda t: means[t])
        book = (book | {position}) - {victim}
        dropped_new += victim == position
        freed = policy.after_step(StepView(kv, attention, position, budget))
        kv.positions.scatter_(2, freed.unsqueeze(-1), -1)
        assert positions(kv) == [sorted(book)] * HEADS
        assert policy.after_step(StepView(kv, attention, position, budget)).tolist() == [[-1] * HEADS]
    assert (dropped_new > 0) == (recent == 0)


def chunk_order(scores: list[float], size: int) -> list[int]:
    """Tokens, best chunk first and best token of a chunk first."""
    chunks = [range(at, min(at + size, len(scores))) for at in range(0, len(scores), size)]
    by_mean = sorted(chunks, key=lambda chunk: (-sum(scores[t] for t in chunk) / len(chunk), chunk[0]))
    return [t for chunk in by_mean for t in sorted(chunk, key=lambda t: (-scores[t], t))]


@sizes
@pytest.mark.parametrize("preset", ["", "@paper", "@kvpress", "@small", "@across"])
def test_chunkkv_keeps_whole_chunks(preset: str, tokens: int, budget: int) -> None:
    table = {"@kvpress": (64, 5, "avg", 20), "@small": (8, 1, "max", 3), "@across": (9, 3, "avg", 4)}
    across = preset in ("@kvpress", "@across")
    window, kernel, kind, size = table.get(preset, (32, 1, "max", 10))
    own: dict[str, Any] = {"recent": 8, "chunk": 3} if preset == "@small" else {}
    if preset == "@across":
        own = {"recent": 9, "kernel": 3, "pool": "avg", "chunk": 4, "across": True}
    label = "chunkkv" if own else "chunkkv" + preset
    layers = make_layers(tokens)
    for gold, heads in zip(layers, kept_by(label, layers, budget, **own), strict=True):
        pooled = np.array(naive_pooled(gold, window=window, kernel=kernel, kind=kind, shared=False)).mean(axis=0)
        before = max(0, tokens - window)
        order = chunk_order(pooled[:before].tolist(), size)
        if across:
            scores = [*pooled[:before].tolist(), *[2.0] * (tokens - before)]
            order = [t for t in chunk_order(scores, size) if t < before]
        last = list(range(tokens - 1, max(-1, tokens - 1 - window), -1))
        assert heads == [sorted([*last, *order][:budget])] * HEADS


def test_chunkkv_splits_one_chunk_at_most() -> None:
    (heads,) = kept_by("chunkkv", make_layers(77)[:1], 64, recent=10, chunk=9)
    held = [sum(t // 9 == chunk for t in heads[0] if t < 67) for chunk in range(8)]
    assert sum(held) == 54
    assert sorted(held)[:2] in ([0, 4], [0, 0], [0, 5])  # 54 = 6 * 9, or 5 * 9 + 4 + 5 with the chunk of 4
    assert sum(count not in (0, 9, 4) for count in held) <= 1


def naive_expected(gold: Gold, *, window: int, future: int, sinks: int, covariance: bool) -> list[list[float]]:
    """Scores of every KV head from queries turned back to position 0, as the paper writes them: [H][T - sinks]."""
    tokens, view = gold.view.tokens, gold.view
    first = max(tokens - window, sinks)
    queries = view.queries[0, :, first - tokens :].double().numpy()
    turn = sum(np.array([rope(row, tokens + f) for row in np.eye(DIM)]) for f in range(future)) / future
    rows = []
    for head in range(HEADS):
        keys, values = (x[0, head, sinks:].double().numpy() for x in (view.kv.keys, view.kv.values))
        total = np.zeros(tokens - sinks)
        for member in range(GROUP):
            plain = np.array([rope(q, -(first + i)) for i, q in enumerate(queries[head * GROUP + member])])
            mean = plain.mean(axis=0) @ turn
            spread = turn.T @ np.cov(plain.T, bias=True) @ turn
            logits = [k @ mean / DIM**0.5 + covariance * (k @ spread @ k) / DIM / 2 for k in keys]
            total += np.exp(logits) / np.exp(logits).sum() / GROUP
        rows.append([float(x) * length(v) for x, v in zip(total, values, strict=True)])
    return rows


@pytest.mark.parametrize(("tokens", "budget"), [(29, 2), (60, 30)])
@pytest.mark.parametrize(
    ("preset", "own"),
    [("", {}), ("", {"window": 16, "future": 21}), ("", {"covariance": False}), ("@kvpress", {"future": 7})],
)
def test_expected_attention_is_that_of_the_gaussian(preset: str, own: dict[str, Any], tokens: int, budget: int) -> None:
    first = make_layers(tokens)[0]
    view = replace(first.view, rotate=rotate)
    layers = (replace(first, view=view),)
    policy = make_policy("expected_attention" + preset, own)
    gold = naive_expected(
        layers[0],
        window=own.get("window", 131072 if preset else 128),
        future=own.get("future", 512),
        sinks=4,
        covariance=own.get("covariance", True),
    )
    np.testing.assert_allclose(policy.score(view)[0, :, 4:].numpy(), np.array(gold), rtol=2e-4)  # type: ignore[attr-defined]
    kept = kept_by("expected_attention" + preset, layers, budget, **own)[0]
    sinks = min(4, budget)
    own_best = [[t + 4 for t in naive_top(row, budget - sinks)] for row in gold]
    assert kept == [[*range(sinks), *best] for best in own_best]


def test_the_mean_turn_is_the_mean_of_turns() -> None:
    eye = torch.eye(DIM, dtype=torch.float64)
    turns = torch.stack([rotate(eye, f) for f in range(130)])
    for count in (1, 2, 3, 5, 8, 21, 130):
        torch.testing.assert_close(mean_turn(rotate, count, eye), turns[:count].mean(dim=0))


def test_expected_attention_needs_rotary_embeddings_and_its_window() -> None:
    view = make_layers(42)[1].view
    with pytest.raises(PolicyError, match="rotary"):
        make_policy("expected_attention").score(view)  # type: ignore[attr-defined]
    narrow = replace(view, queries=view.queries[:, :, -4:], rotate=rotate)
    with pytest.raises(PolicyError, match="38 window queries wanted, 4 observed"):
        make_policy("expected_attention").score(narrow)  # type: ignore[attr-defined]
