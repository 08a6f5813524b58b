"""What every method keeps, as plain loops written from the papers, which share no code with the methods."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch

from methods.base import KV, LayerView, PromptView, Sizes
from methods.registry import make_policy
from methods.views import Form

LAYERS, HEADS, GROUP, DIM = 3, 2, 3, 8
Array = np.ndarray[Any, Any]
Rows = list[list[float]]
"""Scores of a layer's tokens, [H][T]."""


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

    @property
    def keys(self) -> Array:
        """[H, T, D] in float64."""
        found: Array = self.view.kv.keys[0].double().numpy()
        return found


Loop = Callable[[tuple[Gold, ...], int], list[list[list[int]]]]
"""Positions kept of a prompt at a budget, [layer][head]."""


def sizes(tokens: int, layers: int) -> Sizes:
    """Sizes of a prompt without query groups."""
    return Sizes(tokens, layers, HEADS, HEADS)


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
        view = LayerView(index, kv, queries[:, :, max(0, tokens - 64) :], Form(DIM**-0.5))
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


def kept_by(label: str, layers: tuple[Gold, ...], budget: int, **overrides: object) -> list[list[list[int]]]:
    view = PromptView([gold.view for gold in layers])
    return [positions(kv) for kv in make_policy(label, overrides).compress(view, budget)]


def positions(kv: KV) -> list[list[int]]:
    return [sorted(p for p in head if p >= 0) for head in kv.positions[0].tolist()]


def length(x: Array) -> float:
    return math.sqrt(sum(float(a) ** 2 for a in x))


def naive_top(scores: list[float], budget: int, recent: int = 0, sinks: int = 0) -> list[int]:
    """The last `recent`, the first `sinks`, then the best of the others; equal scores go to the earlier token."""
    tokens = len(scores)
    last = list(range(tokens - 1, max(-1, tokens - 1 - recent), -1))
    first = [t for t in range(min(sinks, tokens)) if t not in last]
    by_score = sorted(set(range(tokens)) - set(last) - set(first), key=lambda t: (-scores[t], t))
    return sorted([*last, *first, *by_score][:budget])


def naive_votes(gold: Gold, window: int, *, shared: bool = False) -> Rows:
    """SnapKV's votes of every KV head: mean over the window and the query group."""
    votes = gold.attention[:, :, -window:].mean(axis=2).mean(axis=1)
    if shared:
        votes[:] = votes.mean(axis=0)
    rows: Rows = votes.tolist()
    return rows


def spread_out(rows: Rows, window: int, kernel: int, kind: str, *, forward: bool = False) -> Rows:
    """Rows pooled over `kernel` tokens before the window: around each one, or up to it."""
    prefix = max(0, len(rows[0]) - window)
    ahead = 0 if forward else kernel // 2
    pooled = [list(row) for row in rows]
    for row, new in zip(rows, pooled, strict=True):
        for t in range(prefix):
            near = [row[i] for i in range(t + ahead - kernel + 1, t + ahead + 1) if 0 <= i < prefix]
            new[t] = max(near) if kind == "max" else sum(near) / kernel
    return pooled


def naive_pooled(
    gold: Gold, window: int, kernel: int, kind: str, *, shared: bool = False, forward: bool = False
) -> Rows:
    return spread_out(naive_votes(gold, window, shared=shared), window, kernel, kind, forward=forward)


def whole(shares: list[Fraction], total: int) -> list[int]:
    """Whole slots by largest remainder."""
    slots = [int(share) for share in shares]
    first = sorted(range(len(shares)), key=lambda i: (slots[i] - shares[i], i))
    for i in first[: total - sum(slots)]:
        slots[i] += 1
    return slots


def wins(rows: Rows, count: int) -> list[int]:
    """How many of the `count` best entries of all rows each row owns; equal ones: the earlier row, then token."""
    ranked = sorted((-score, i, t) for i, row in enumerate(rows) for t, score in enumerate(row))
    return [sum(i == row for _, i, _ in ranked[:count]) for row in range(len(rows))]


def top(
    scores: Callable[[Gold], Rows],
    recent: Callable[[int], int] = lambda budget: 0,
    *,
    sinks: int = 0,
    slots: Callable[[list[Rows], int], list[list[int]]] = lambda rows, budget: [[budget] * HEADS] * LAYERS,
) -> Loop:
    """The first and last tokens and the best of each head. slots: of every layer and head, by the scores of all."""

    def loop(layers: tuple[Gold, ...], budget: int) -> list[list[list[int]]]:
        rows = [scores(gold) for gold in layers]
        counts = slots(rows, budget)
        assert sum(map(sum, counts)) == LAYERS * HEADS * budget
        each = [zip(*own, strict=True) for own in zip(rows, counts, strict=True)]
        return [[naive_top(row, count, recent(budget), sinks) for row, count in heads] for heads in each]

    return loop


def snapkv(window: int, kernel: int, kind: str, *, shared: bool = False, **slots: Any) -> Loop:
    return top(lambda gold: naive_pooled(gold, window, kernel, kind, shared=shared), lambda _: window, **slots)


def their_pyramid(
    budget: int, tokens: int, layers: int, *, window: int = 8, beta: int = 20, floor: bool = True
) -> list[Any]:
    """Slots of each layer in PyramidKV's own code, pyramidkv_utils.py:450-466 at KVCache-Factory c97f9d7.

    floor: its whole divisions (//); exact fractions otherwise.
    """
    most = budget - window
    least: Any = most // beta if floor else Fraction(most, beta)
    first = most * 2 - least
    if first >= tokens - window:
        first = tokens - window
        least = most * 2 - first
    step = (first - least) // (layers - 1) if floor else Fraction(first - least) / (layers - 1)
    if tokens < budget:
        return [tokens] * layers
    if tokens < most * 2:
        return [budget] * layers
    return [first - layer * step + window for layer in range(layers)]


def naive_pyramid(budget: int, tokens: int, layers: int, *, window: int = 8, beta: int = 20) -> list[int]:
    """Their slots without what the floors add, in whole numbers; a window's budget, which they refuse, is even."""
    if budget <= window:
        return [budget] * layers
    slots = their_pyramid(budget, tokens, layers, window=window, beta=beta, floor=False)
    return whole([Fraction(own) for own in slots], layers * budget)


def pyramid(rows: list[Rows], budget: int) -> list[list[int]]:
    slots = naive_pyramid(budget, len(rows[0][0]), LAYERS)
    assert budget != 20 or slots[0] > slots[1] > slots[2]
    return [[own] * HEADS for own in slots]


def adakv(window: int, kernel: int, kind: str, *, floor: bool = False) -> Loop:
    def slots(rows: list[Rows], budget: int) -> list[list[int]]:
        return [naive_adakv(own, budget, window, floor=floor) for own in rows]

    return snapkv(window, kernel, kind, slots=slots)


def naive_adakv(pooled: Rows, budget: int, window: int, *, floor: bool) -> list[int]:
    """Slots of every head of a layer."""
    mean = budget - window
    if mean <= 0 or len(pooled[0]) <= window:
        return [budget] * HEADS
    past = [row[: len(row) - window] for row in pooled]
    if floor:
        for row in past:
            for t in sorted(range(len(row)), key=lambda t: (-row[t], t))[: max(0, budget // 5 - window)]:
                row[t] = 1e9
        return [window + n for n in wins(past, HEADS * mean)]
    shares = [Fraction(4, 5) * n + Fraction(1, 5) * mean for n in wins(past, HEADS * mean)]
    return [window + n for n in whole(shares, HEADS * mean)]


def dynamickv(window: int, kind: str, ratio: int) -> Loop:
    def slots(rows: list[Rows], budget: int) -> list[list[int]]:
        return [[own] * HEADS for own in naive_dynamickv(rows, budget, window, ratio)]

    return snapkv(window, 7, kind, slots=slots)


def naive_dynamickv(pooled: list[Rows], budget: int, window: int, ratio: int) -> list[int]:
    """Slots of every layer. pooled: [L][H][T]."""
    tokens, mean = len(pooled[0][0]), budget - window
    if mean <= 0 or tokens <= window:
        return [budget] * LAYERS
    counts = wins([[x for row in layer for x in row[: tokens - window]] for layer in pooled], mean * LAYERS * HEADS)
    cap = min(ratio * mean, tokens - window)
    slots, left = [Fraction(0)] * LAYERS, Fraction(mean * LAYERS)
    open_ = [i for i, n in enumerate(counts) if n]
    while open_ and left:  # shares in proportion, what a full layer cannot hold to the others
        total = sum(counts[i] for i in open_)
        add = {i: min(cap - slots[i], left * counts[i] / total) for i in open_}
        for i, more in add.items():
            slots[i] += more
        left -= sum(add.values())
        open_ = [i for i in open_ if slots[i] < cap]
    return [window + n for n in whole(slots, mean * LAYERS)]


def chunkkv(
    window: int, kernel: int, kind: str, size: int, *, across: bool = False, forward: bool = False, sinks: int = 0
) -> Loop:
    def scores(gold: Gold) -> Rows:
        """Minus the place of each token, best chunk first and best token of a chunk first; 0 in the window."""
        tokens, before = gold.view.tokens, max(0, gold.view.tokens - window)
        mean = np.array(naive_pooled(gold, window, kernel, kind, forward=forward)).mean(axis=0)[:before].tolist()
        worth = [*mean, *[2.0] * (tokens - before)] if across else mean
        chunks = [range(at, min(at + size, len(worth))) for at in range(0, len(worth), size)]
        chunks.sort(key=lambda chunk: (-sum(worth[t] for t in chunk) / len(chunk), chunk[0]))
        order = [t for chunk in chunks for t in sorted(chunk, key=lambda t: (-worth[t], t))]
        return [[-float(order.index(t)) if t in order else 0.0 for t in range(tokens)]] * HEADS

    return top(scores, lambda _: window, sinks=sinks)


def received(gold: Gold) -> Rows:
    rows: Rows = gold.received.tolist()
    return rows


def last_queries(gold: Gold) -> Rows:
    last: list[float] = gold.attention[:, :, -1].reshape(HEADS * GROUP, -1).mean(axis=0).tolist()
    return [last] * HEADS


def likeness(gold: Gold) -> Rows:
    """Minus the cosine of each key with the mean of those of length one."""
    return [unlike(keys) for keys in gold.keys]


def differences(gold: Gold) -> Rows:
    return [[1 + score for score in row] for row in likeness(gold)]


def unlike(keys: Array) -> list[float]:
    """Minus the cosine of each key [S, D] with the mean of those of length one."""
    anchor = sum(key / length(key) for key in keys) / len(keys)
    return [-float(key @ anchor) / length(key) / length(anchor) for key in keys]


def keydiff(block: int, *, recent: int = 0, sinks: int = 0, pool: tuple[int, str, bool] = (1, "max", False)) -> Loop:
    """Blocks that join what is kept so far, as in block_press.py:65-92 at kvpress 8bb29b9; a small `block` is many."""

    def kept(keys: Array, budget: int) -> list[int]:
        own = list(range(budget))
        for start in range(budget, len(keys), block):
            own += range(start, min(start + block, len(keys)))
            raised = [[1 + score for score in unlike(keys[own])]]
            kernel, kind, forward = pool
            [scores] = spread_out(raised, recent, kernel, kind, forward=forward)
            own = [own[i] for i in naive_top(scores, budget, recent, sinks)]
        return own

    return lambda layers, budget: [[kept(keys, budget) for keys in gold.keys] for gold in layers]


def pooled(scores: Callable[[Gold], Rows], recent: int, kernel: int, kind: str, *, forward: bool) -> Loop:
    """The best by pooled scores, the last `recent` and the first three."""
    return top(lambda gold: spread_out(scores(gold), recent, kernel, kind, forward=forward), lambda _: recent, sinks=3)


def drawn(gold: Gold) -> Rows:
    draw = torch.Generator().manual_seed(3 * 1_000_003 + gold.view.index)
    rows: Rows = torch.rand(1, HEADS, gold.view.tokens, generator=draw)[0].tolist()
    return rows


def ends(gold: Gold) -> Rows:
    return [[math.inf if t < 4 else t for t in range(gold.view.tokens)]] * HEADS


NORMS = top(lambda gold: [[-length(key) for key in keys] for keys in gold.keys])
MEANS = top(lambda gold: (gold.received / np.arange(gold.view.tokens, 0, -1)).tolist())
AVG: dict[str, object] = {"kernel": 5, "pool": "avg", "sinks": 3}
AHEAD: dict[str, object] = {"kernel": 4, "forward": True, "sinks": 3}
ACROSS: dict[str, object] = {"recent": 9, "kernel": 3, "pool": "avg", "chunk": 4, "across": True}
PLAIN = (32, 7, "max")
VOTES = {"": PLAIN, "@paper": PLAIN, "@kvcf": (8, 7, "max"), "@kvpress": (64, 5, "avg"), "@w8k13": (8, 13, "avg")}
AHEAD_OF_8 = top(lambda gold: naive_pooled(gold, 8, 4, "max", forward=True), lambda _: 8)
GOLDEN: list[tuple[str, dict[str, object], Loop]] = [
    ("fullkv", {}, lambda layers, _: [[list(range(layers[0].view.tokens))] * HEADS] * LAYERS),
    *((f"snapkv{preset}", {}, snapkv(*own)) for preset, own in VOTES.items()),
    *((f"snapkv_shared{preset}", {}, snapkv(*own, shared=True)) for preset, own in VOTES.items()),
    ("pyramidkv@paper", {}, snapkv(8, 7, "max", slots=pyramid)),
    *((name, {}, adakv(32, 7, "max")) for name in ("adakv", "adakv@paper")),
    ("adakv@kvcf", {}, adakv(8, 7, "max")),
    ("adakv@kvpress", {}, adakv(64, 5, "avg", floor=True)),
    ("adakv", {"recent": 2, "kernel": 5, "pool": "avg", "floor": True}, adakv(2, 5, "avg", floor=True)),
    *((name, {}, dynamickv(8, "max", 10)) for name in ("dynamickv", "dynamickv@paper")),
    ("dynamickv@runner", {}, dynamickv(16, "avg", 5)),
    ("dynamickv", {"ratio": 1}, dynamickv(8, "max", 1)),
    *((name, {}, chunkkv(32, 1, "max", 10)) for name in ("chunkkv", "chunkkv@paper")),
    ("chunkkv@kvpress", {}, chunkkv(64, 5, "avg", 20, across=True)),
    ("chunkkv", {"recent": 8, "chunk": 3}, chunkkv(8, 1, "max", 3)),
    ("chunkkv", {"recent": 8, **AHEAD}, chunkkv(8, 4, "max", 10, forward=True, sinks=3)),
    ("chunkkv", ACROSS, chunkkv(9, 3, "avg", 4, across=True)),
    ("h2o", {}, top(received, lambda budget: budget - budget // 2)),
    ("h2o@kvcf", {}, top(received, lambda _: 8)),
    ("h2o@kvpress", {}, MEANS),
    *((name, {}, top(last_queries)) for name in ("tova", "tova@paper")),
    ("tova@kvpress", {}, top(last_queries, lambda _: 1)),
    *((name, {}, NORMS) for name in ("knorm", "knorm@kvpress")),
    *((name, {}, top(likeness)) for name in ("keydiff", "keydiff@kvpress")),
    ("keydiff@block", {"block": 16}, keydiff(16)),
    ("keydiff", {"block": 5, "recent": 3, "sinks": 2}, keydiff(5, recent=3, sinks=2)),
    ("keydiff", {"block": 9, "kernel": 4, "pool": "avg", "forward": True}, keydiff(9, pool=(4, "avg", True))),
    ("keydiff", {**AVG, "recent": 2}, pooled(differences, 2, 5, "avg", forward=False)),
    ("snapkv", {"recent": 8, "kernel": 4, "forward": True}, AHEAD_OF_8),
    ("h2o@kvcf", AVG, pooled(received, 8, 5, "avg", forward=False)),
    ("h2o@kvcf", {"recent": 2, **AHEAD}, pooled(received, 2, 4, "max", forward=True)),
    ("tova", AVG, pooled(last_queries, 0, 5, "avg", forward=False)),
    ("tova@kvpress", AHEAD, pooled(last_queries, 1, 4, "max", forward=True)),
    ("streamingllm", {}, top(ends)),
    ("random", {"seed": 3}, top(drawn, lambda _: 1)),
]
