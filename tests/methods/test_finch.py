"""FINCH: kept tokens by loops over its formula; attention over turned keys is that over tokens without gaps."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from methods.base import KV, LayerView, PolicyError
from methods.finch import Finch
from methods.registry import make_policy
from methods.views import Form
from tests.methods.loops import DIM, GROUP, HEADS, Gold, kept_by, make_layers, naive_top, positions, whole
from tests.methods.test_golden import rope, rotate


def naive_scores(gold: Gold, window: int) -> list[list[float]]:
    """finch_press.py:69-77 at kvpress 8bb29b9: a query at position p counts p times."""
    tokens, rows = gold.view.tokens, []
    for group in gold.attention:
        asked = range(max(0, tokens - window), tokens)
        total = [sum(float(own[p, t]) * p for own in group for p in asked) for t in range(tokens)]
        rows.append([x / len(asked) / GROUP for x in total])
    return rows


def naive(gold: Gold, budget: int, window: int, chunk: int) -> list[list[int]]:
    found, before = [], gold.view.tokens - window
    for row in naive_scores(gold, window):
        if chunk == 0 or budget <= window:
            found.append(naive_top(row, budget, window))
            continue
        starts = range(0, before, chunk)
        sizes = [min(chunk, before - at) for at in starts]
        slots = whole([Fraction(size * (budget - window), before) for size in sizes], budget - window)
        own = [
            at + t
            for at, size, count in zip(starts, sizes, slots, strict=True)
            for t in naive_top(row[at : at + size], count)
        ]
        found.append([*own, *range(before, before + window)])
    return found


@pytest.mark.parametrize(("tokens", "budget"), [(29, 3), (29, 14), (77, 8), (77, 30), (77, 76)])
@pytest.mark.parametrize(("window", "chunk"), [(4, 0), (8, 0), (8, 16), (4, 10)])
def test_what_is_kept_is_what_the_loop_keeps(tokens: int, budget: int, window: int, chunk: int) -> None:
    layers = tuple(replace(gold, view=replace(gold.view, rotate=rotate, _memo={})) for gold in make_layers(tokens))
    gold = [naive(own, budget, window, chunk) for own in layers]
    for rerotate in (True, False):
        assert kept_by("finch", layers, budget, recent=window, chunk=chunk, rerotate=rerotate) == gold
    for own in layers:
        scores = Finch(recent=window).score(own.view)[0].numpy()
        np.testing.assert_allclose(scores, np.array(naive_scores(own, window)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [5, 12, 39])
def test_attention_is_that_of_tokens_without_gaps(budget: int) -> None:
    tokens, rng = 40, np.random.default_rng(0)
    plain = rng.standard_normal((HEADS, tokens, DIM))
    turned = torch.tensor(np.array([[[rope(own[t], t) for t in range(tokens)] for own in plain]]))
    queries = torch.tensor(rng.standard_normal((1, HEADS * GROUP, tokens, DIM)))
    view = LayerView(0, KV(turned, turned, torch.arange(tokens).expand(1, HEADS, tokens)), queries, Form(1.0))
    with pytest.raises(PolicyError, match="rotary"):
        Finch(recent=4).compress_layer(view, budget)
    kv = Finch(recent=4).compress_layer(replace(view, rotate=rotate), budget)
    query = rng.standard_normal(DIM)
    for head, kept in enumerate(positions(kv)):
        assert len(kept) == budget and (kept[-budget:] != list(range(tokens - budget, tokens)))
        for slot, t in enumerate(kept):
            expected = rope(query, budget) @ rope(plain[head, t], slot)  # the next token comes right behind
            assert rope(query, tokens) @ kv.keys[0, head, slot].numpy() == pytest.approx(expected, abs=1e-4)


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(PolicyError, match="chunk=-1"):
        make_policy("finch", {"chunk": -1})
