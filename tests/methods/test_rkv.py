"""R-KV against loops over its formula, at prefill and while decoding."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from methods.base import PolicyError, StepView
from methods.registry import make_policy
from methods.rkv import RKV
from tests.methods.loops import DIM, GROUP, HEADS, Array, kept_by, length, make_layers, naive_top, positions
from tests.methods.test_golden import append, free, with_empty_slots

MIX = 0.07


def naive_redundancy(keys: Array) -> list[float]:
    """cal_similarity of rkv/utils.py:40-95 at R-KV d15c976, for one head's keys [S, D] in the order of tokens."""
    count = len(keys)
    means = [0.0] * count
    for i, key in enumerate(keys):
        row = [0.0 if i == j else float(key @ k) / length(key) / length(k) for j, k in enumerate(keys)]
        alike = [j for j, cosine in enumerate(row) if cosine > 0.5]
        row[alike[-1] if alike else 0] = 0.0
        means = [mean + cosine / count for mean, cosine in zip(means, row, strict=True)]
    powers = [math.exp(mean) for mean in means]
    return [power / sum(powers) for power in powers]


def naive_scores(weights: Array, keys: Array, window: int, kernel: int) -> list[float]:
    """r1_kv.py:54-75 there: weights [G, W, S] of the last W queries, keys [S, D]; scores of the tokens before them."""
    before = len(keys) - window
    votes = [0.0] * before
    for query in range(weights.shape[1]):
        best = [max(float(own[query, t]) for own in weights) for t in range(before)]
        votes = [vote + x / sum(best) / weights.shape[1] for vote, x in zip(votes, best, strict=True)]
    half = kernel // 2
    spread = [max(votes[max(0, t - half) : t + half + 1]) for t in range(before)]
    likes = naive_redundancy(keys)
    return [MIX * vote - (1 - MIX) * like for vote, like in zip(spread, likes, strict=False)]


@pytest.mark.parametrize(("tokens", "budget"), [(29, 9), (29, 28), (77, 8), (77, 30), (77, 5)])
@pytest.mark.parametrize(("window", "kernel"), [(8, 7), (4, 3)])
def test_a_prompt_keeps_what_the_loop_keeps(tokens: int, budget: int, window: int, kernel: int) -> None:
    layers = make_layers(tokens)
    gold = []
    for own in layers:
        pairs = zip(own.attention[:, :, -window:], own.keys, strict=True)
        rows = [naive_scores(weights, keys, window, kernel) for weights, keys in pairs]
        gold.append([naive_top([*row, *[9.0] * window], budget, window) for row in rows])
    assert kept_by("rkv@prefill", layers, budget, recent=window, kernel=kernel) == gold


def test_redundant_keys_leave_first_and_the_last_of_them_stays() -> None:
    layers = make_layers(42)
    view = layers[0].view
    keys = view.kv.keys.clone()
    alike = [5, 11, 17, 41]
    keys[:, :, alike] = keys[:, :, 5:6] + 0.01 * keys[:, :, alike]
    view = type(view)(0, type(view.kv)(keys, view.kv.values, view.kv.positions), view.queries, view.form)
    scores = RKV(mix=0.0).score(view)[0]
    assert all(row[41] > max(row[5], row[11], row[17]) + 1e-3 for row in scores.tolist())


@pytest.mark.parametrize(
    ("budget", "buffer", "window", "every"),
    [(30, 6, 4, 6), (30, 128, 4, 11), (20, 3, 8, 3), (30, 1, 4, 1)],
)
def test_it_ranks_again_every_buffer_and_drops_the_worst_in_between(
    budget: int, buffer: int, window: int, every: int
) -> None:
    tokens, slot = 40, 2 * DIM * 4 + 4
    slots = budget * slot // (slot + 8)
    assert every == min(buffer, (slots - window) // 2)
    gold = make_layers(tokens)[0]
    policy = RKV(recent=window, kernel=3, buffer=buffer)
    kv = with_empty_slots(policy.compress_layer(gold.view, budget), 1)
    assert kv.nbytes == slots * HEADS * (slot + 8) <= budget * HEADS * slot
    books: list[dict[int, Any]] = []
    for weights, keys in zip(gold.attention[:, :, -window:], gold.keys, strict=True):
        rank = [*naive_scores(weights, keys, window, 3), *[math.inf] * window]
        books.append({t: (rank[t], keys[t]) for t in naive_top(rank, slots, window)})
    assert positions(kv) == [sorted(book) for book in books]
    draw, asked = torch.Generator().manual_seed(1), min(window, every)
    votes = [weights_of(gold.attention[head, :, -window:], tokens - window, book) for head, book in enumerate(books)]
    for position in range(tokens, tokens + 60):
        fresh = torch.randn(HEADS, DIM, generator=draw)
        append(kv, position, fresh)
        attention = torch.rand(1, HEADS, GROUP, slots + 1, generator=draw) * (kv.positions >= 0).unsqueeze(2)
        for head, book in enumerate(books):
            book[position] = (math.inf, fresh[head].double().numpy())
            at = {t: s for s, t in enumerate(kv.positions[0, head].tolist()) if t >= 0}
            end = position + -position % every
            if end - position < asked:
                best = {t: max(attention[0, head, :, s].tolist()) for t, s in at.items() if t <= end - window}
                for t, weight in best.items():
                    votes[head][t] = votes[head].get(t, 0.0) + weight / sum(best.values())
            if position % every == 0:
                order = sorted(book)
                keys = np.array([book[t][1] for t in order])
                rank = naive_ranks([votes[head].get(t, 0.0) for t in order], keys, window)
                votes[head].clear()
                book.update({t: (own, book[t][1]) for t, own in zip(order, rank, strict=True)})
            if len(book) > slots:
                gone = min(book, key=lambda t: book[t][0])
                del book[gone]
                votes[head].pop(gone, None)
        free(kv, policy.after_step(StepView(kv, attention, position, budget)))
        assert positions(kv) == [sorted(book) for book in books]


def weights_of(weights: Array, before: int, kept: dict[int, Any]) -> dict[int, float]:
    """Sum over the queries of weights [G, W, T] of their shares in the tokens before them, the greatest of a group."""
    total = dict.fromkeys(kept, 0.0)
    for query in range(weights.shape[1]):
        best = [max(float(own[query, t]) for own in weights) for t in range(before)]
        for t in kept:
            total[t] += best[t] / sum(best) if t < before else 0.0
    return total


def naive_ranks(votes: list[float], keys: Array, window: int) -> list[float]:
    """Scores of all tokens by the attention that they got, infinite in the window."""
    before = len(votes) - window
    shares = [vote / sum(votes) for vote in votes]
    spread = [max(shares[max(0, t - 1) : t + 2]) for t in range(before)]
    likes = naive_redundancy(keys)
    return [*(MIX * vote - (1 - MIX) * like for vote, like in zip(spread, likes, strict=False)), *[math.inf] * window]


def test_parameters_out_of_range_are_refused() -> None:
    for name, value in (("mix", 1.5), ("mix", -0.1), ("buffer", 0), ("recent", 0)):
        with pytest.raises(PolicyError, match=f"{name}={value}"):
            make_policy("rkv", {name: value})
