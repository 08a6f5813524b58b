"""Kept positions of every method against the plain loops of `tests.methods.loops`, at prefill and while decoding."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from harness.engine.row_cache import GrowingRows
from methods.base import KV, LayerView, PolicyError, PromptView, Sizes, StepView
from methods.expected_attention import mean_turn
from methods.h2o import H2O
from methods.pyramidkv import PyramidKV
from methods.registry import make_policy
from methods.streamingllm import StreamingLLM
from methods.tova import TOVA
from methods.views import Form
from tests.methods.loops import (
    DIM,
    GOLDEN,
    GROUP,
    HEADS,
    LAYERS,
    Array,
    Gold,
    Loop,
    kept_by,
    length,
    make_layers,
    naive_pyramid,
    naive_top,
    positions,
    sizes,
    spread_out,
    their_pyramid,
)

SIZES = [(29, 14), (29, 28), (42, 20), (77, 1), (77, 8), (77, 50), (77, 70)]
"""Prompts within every window, between two, beyond all; budgets below, at and above the windows of 8, 32 and 64."""


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
@pytest.mark.parametrize(("label", "changed", "loop"), GOLDEN, ids=[label for label, *_ in GOLDEN])
def test_what_is_kept_is_what_the_loop_keeps(
    label: str, changed: dict[str, Any], loop: Loop, tokens: int, budget: int
) -> None:
    layers = make_layers(tokens)
    assert kept_by(label, layers, budget, **changed) == loop(layers, budget)


@pytest.mark.parametrize("layers", [2, 4, 28, 32])
@pytest.mark.parametrize("budget", [1, 7, 8, 9, 64, 128, 512])
def test_pyramidkv_is_its_authors_and_flat_below_twice_its_budget(budget: int, layers: int) -> None:
    twice = 2 * (budget - 8)
    for tokens in {n for n in (twice - 1, twice, twice + 1, twice + 9, budget, budget + 1, 8192) if n >= budget}:
        slots = PyramidKV().layer_budgets(budget, tokens, layers)
        assert slots == naive_pyramid(budget, tokens, layers) and sum(slots) == layers * budget
        flat = budget <= 8 or tokens < twice or tokens == budget
        assert (len(set(slots)) == 1) == flat
        assert ("pyramid is flat at this budget" in PyramidKV().notes(budget, sizes(tokens, layers))) == flat
        if budget > 8:  # what they add in whole divisions is below one slot a step
            theirs = their_pyramid(budget, tokens, layers)
            assert all(-1 <= far - own <= layers for far, own in zip(theirs, slots, strict=True))
            assert len(set(theirs)) == 1 or not flat


def test_pyramidkvs_kept_tokens_are_snapkvs_where_it_is_flat() -> None:
    layers = make_layers(77)
    assert kept_by("pyramidkv@paper", layers, 47) == kept_by("snapkv@kvcf", layers, 47)
    assert kept_by("pyramidkv@paper", layers, 46) != kept_by("snapkv@kvcf", layers, 46)  # 77 >= 2 * (46 - 8)


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "headkv", "dynamickv"])
def test_what_the_authors_store_per_query_head_is_noted(name: str) -> None:
    policy = make_policy(name)
    cost = "its authors' code stores slots per query head: {} times these bytes"
    assert cost.format(3) in policy.notes(128, Sizes(1024, 4, query_heads=6, kv_heads=2))
    assert not any("query head" in note for note in policy.notes(128, Sizes(1024, 4, query_heads=2, kv_heads=2)))


@pytest.mark.parametrize("name", ["snapkv", "snapkv_shared", "pyramidkv"])
def test_a_budget_that_is_its_window_alone_is_noted(name: str) -> None:
    policy, alone = make_policy(f"{name}@kvpress"), "its window alone: this budget holds no other token"
    assert alone in policy.notes(64, sizes(1024, 4)) and alone not in policy.notes(65, sizes(1024, 4))
    layers = make_layers(77)
    assert kept_by(f"{name}@kvpress", layers, 64) == [[list(range(13, 77))] * HEADS] * LAYERS
    assert kept_by(f"{name}@kvpress", layers, 65) != [[list(range(12, 77))] * HEADS] * LAYERS


def test_pyramidkv_of_kvpress_is_flat_below_1280() -> None:
    policy = make_policy("pyramidkv@kvpress")
    assert policy.layer_budgets(1279, 8192, 4) == [1279] * 4
    assert policy.notes(1279, sizes(8192, 4)) == ("pyramid is flat at this budget",)
    assert policy.layer_budgets(1280, 8192, 4) == [2496, 1685, 875, 64]


def test_keydiff_goes_through_a_prompt_in_kvpresses_blocks() -> None:
    assert make_policy("keydiff@block") == make_policy("keydiff", {"block": 128})
    layers = make_layers(77)
    assert kept_by("keydiff@block", layers, 20, block=8) != kept_by("keydiff", layers, 20)
    assert kept_by("keydiff@block", layers, 20, block=57) == kept_by("keydiff", layers, 20)


def test_knorm_of_the_paper_leaves_two_layers_whole_at_the_same_bytes() -> None:
    layers = make_layers(29)
    norms = [-length(key) for key in layers[2].keys[1]]
    kept = kept_by("knorm@paper", layers, 20)
    assert [len(heads[0]) for heads in kept] == [29, 29, 2]
    assert kept[2][1] == naive_top(norms, 2)
    policy = make_policy("knorm@paper")
    assert policy.notes(20, sizes(29, LAYERS)) == () == policy.notes(29, sizes(29, LAYERS))
    assert [len(heads[0]) for heads in kept_by("knorm@paper", layers, 19)] == [19, 19, 19]
    assert "not left whole" in policy.notes(19, sizes(29, LAYERS))[0]
    assert sum(policy.layer_budgets(128, 1024, 30)) == 30 * 128  # type: ignore[attr-defined]
    assert policy.layer_budgets(128, 1024, 30)[:3] == [1024, 1024, 64]  # type: ignore[attr-defined]


@pytest.fixture
def uneven() -> Iterator[tuple[Gold, ...]]:
    """Layers whose first head looks at a few tokens and whose others spread evenly, the more so the deeper."""
    make_layers.cache_clear()
    layers = make_layers(77)
    for gold in layers:
        gold.view.queries = gold.view.queries.clone()
        gold.view.queries[:, :HEADS] *= 3 + gold.view.index
        gold.view.queries[:, HEADS:] *= 0.1
        gold.view._memo.clear()
    yield layers
    make_layers.cache_clear()


def test_adakvs_heads_are_ragged_and_what_they_give_up_is_freed(uneven: tuple[Gold, ...]) -> None:
    policy = make_policy("adakv@kvcf")
    kept = policy.compress(PromptView([gold.view for gold in uneven]), 20)
    counts = [kv.live[0].tolist() for kv in kept]
    assert all(abs(row[0] - row[1]) > 4 and sum(row) == 40 and min(row) >= 8 + 12 // 5 for row in counts)
    slot = 2 * DIM * 4 + 4  # float32 key and value, int32 position
    for kv in kept:
        rows = GrowingRows([kv], position=77, room=1)
        held = rows.stored_bytes(0)
        assert kv.nbytes == 40 * slot
        assert held == kv.nbytes + HEADS * (slot - 4)  # room for one token, and no padding
    for own in (policy, make_policy("dynamickv")):
        assert own.notes(20, sizes(77, LAYERS)) == ()
        assert "share evenly" in own.notes(8, sizes(77, LAYERS))[0]


def test_dynamickv_gives_what_no_layer_earned_to_those_with_room(uneven: tuple[Gold, ...]) -> None:
    for gold in uneven[1:]:  # their windows look at themselves alone
        gold.view.kv.keys[:, :, :69] = 0
        gold.view.kv.keys[:, :, 69:] = 1
        gold.view.queries = torch.full_like(gold.view.queries, 100)
        gold.view._memo.clear()
    view = PromptView([gold.view for gold in uneven])
    kept = [int(kv.live[0, 0]) for kv in make_policy("dynamickv", {"ratio": 2}).compress(view, 20)]
    assert kept == [8 + 2 * 12, 8 + 6, 8 + 6]


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


@pytest.mark.parametrize(("recent", "sinks"), [(0, 0), (1, 0), (0, 3)])
def test_tova_drops_what_each_new_query_attends_to_least(recent: int, sinks: int) -> None:
    tokens, budget = 40, 12
    policy = TOVA(evict=True, recent=recent, sinks=sinks)
    kv = with_empty_slots(policy.compress_layer(make_layers(tokens)[0].view, budget), 1)
    book = set(positions(kv)[0])
    draw = torch.Generator().manual_seed(1)
    dropped_new = 0
    for position in range(tokens, tokens + 40):
        append(kv, position, torch.zeros(HEADS, DIM))
        attention = torch.rand(1, HEADS, GROUP, budget + 1, generator=draw)
        means = {t: float(attention[0, :, :, s].mean()) for s, t in enumerate(kv.positions[0, 0].tolist())}
        victim = min((t for t in means if sinks <= t <= position - recent), key=lambda t: means[t])
        book = (book | {position}) - {victim}
        dropped_new += victim == position
        free(kv, policy.after_step(StepView(kv, attention, position, budget)))
        assert positions(kv) == [sorted(book)] * HEADS
        assert policy.after_step(StepView(kv, attention, position, budget)).tolist() == [[-1] * HEADS]
    assert (dropped_new > 0) == (recent == 0)


@pytest.mark.parametrize(("held_back", "sinks"), [(False, 0), (True, 0), (False, 3)])
def test_h2o_evicts_the_lightest_old_token_while_decoding(held_back: bool, sinks: int) -> None:
    tokens, budget = 40, 20
    slots, recent = 18, 9  # 20 slots of 64 bytes hold 18 with a 4-byte sum each; half of them recent
    gold = make_layers(tokens)[0]
    books = [{t: row[t] for t in naive_top(row, slots, recent, sinks)} for row in gold.received.tolist()]
    policy = H2O(evict=True, sinks=sinks)
    kv = with_empty_slots(policy.compress_layer(gold.view, budget), 2)
    assert positions(kv) == [sorted(book) for book in books]
    kv.extra["sums"].masked_fill_(kv.positions < sinks, 0.0)  # the lightest of all, and kept
    books = [{t: received * (t >= sinks) for t, received in book.items()} for book in books]
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
                del book[min((t for t in book if sinks <= t <= position - recent), key=lambda t: book[t])]
        free(kv, policy.after_step(StepView(kv, attention, position, budget)))
        assert positions(kv) == [sorted(book) for book in books]


def rope(x: Array, position: int) -> Array:
    """Rotary embedding of x [D] at a position, half-rotation layout, base 10000."""
    half = len(x) // 2
    out = np.zeros_like(x)
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def rotate(keys: torch.Tensor, by: int | torch.Tensor) -> torch.Tensor:
    turns = torch.as_tensor(by).expand(keys.shape[:-1]).flatten().tolist()
    rows = [rope(*own) for own in zip(keys.reshape(-1, DIM).numpy(), turns, strict=True)]
    return torch.tensor(np.array(rows)).reshape(keys.shape)


@pytest.mark.parametrize(("budget", "held_back"), [(12, False), (12, True), (3, False), (5, True)])
def test_streamingllm_counts_positions_inside_the_cache(budget: int, held_back: bool) -> None:
    tokens, sinks = 40, min(4, budget)
    rng = np.random.default_rng(0)
    plain = {t: rng.standard_normal((HEADS, DIM)) for t in range(tokens + 30)}  # keys before RoPE
    turned = torch.tensor(np.array([[[rope(plain[t][h], t) for t in range(tokens)] for h in range(HEADS)]]))
    whole = KV(turned, turned, torch.arange(tokens).expand(1, HEADS, tokens))
    policy = StreamingLLM(reassign=True, evict=True)
    kv = with_empty_slots(policy.compress_layer(LayerView(0, whole, turned, Form(1.0), rotate=rotate), budget), 2)
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
                held = kv.load()[0][0, head, slots[t]].numpy()
                assert rope(query, position) @ held == pytest.approx(expected, abs=1e-9)
        append(kv, position, torch.tensor(np.array([rope(plain[position][h], position) for h in range(HEADS)])))
        free(kv, policy.after_step(StepView(kv, None, position, budget)))


def naive_expected(
    gold: Gold, window: int, future: int = 512, sinks: int = 4, *, covariance: bool = True, epsilon: float = 0.0
) -> list[list[float]]:
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
        rows.append([(float(x) + epsilon) * length(v) for x, v in zip(total, values, strict=True)])
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
    gold = naive_expected(layers[0], **{"window": 131072 if preset else 128, **own})
    np.testing.assert_allclose(policy.score(view)[0, :, 4:].numpy(), np.array(gold), rtol=2e-4)  # type: ignore[attr-defined]
    kept = kept_by("expected_attention" + preset, layers, budget, **own)[0]
    sinks = min(4, budget)
    own_best = [[t + 4 for t in naive_top(row, budget - sinks)] for row in gold]
    assert kept == [[*range(sinks), *best] for best in own_best]


def naive_ada_press(rows: list[list[float]], budget: int, safeguard: float, sinks: int = 4) -> list[list[int]]:
    """What AdaKVPress leaves unmasked of scores [H][T - sinks], as adakv_press.py:59-77 at kvpress 8bb29b9.

    Sinks are worth more than all else, as in expected_attention_press.py:163.
    """
    scores = [[max(map(max, rows)) + 1] * sinks + row for row in rows]
    tokens = len(scores[0])
    for row in scores:
        for t in sorted(range(tokens), key=lambda t: (-row[t], t))[: int(budget * safeguard)]:
            row[t] = math.inf
    worst_last = sorted((-score, head, t) for head, row in enumerate(scores) for t, score in enumerate(row))
    kept = worst_last[: HEADS * budget]
    return [sorted(t for _, own, t in kept if own == head) for head in range(HEADS)]


@pytest.mark.parametrize(("tokens", "budget"), [(29, 4), (29, 28), (60, 5), (60, 13), (60, 30), (60, 50), (60, 60)])
@pytest.mark.parametrize("safeguard", [0.2, 0.0, 0.7, 1.0])
def test_expected_attention_of_the_paper_shares_slots_as_adakvpress(tokens: int, budget: int, safeguard: float) -> None:
    first = make_layers(tokens)[0]
    values = first.view.kv.values * torch.tensor([1.0, 2.0]).view(1, HEADS, 1, 1)  # of unlike worth
    view = replace(first.view, rotate=rotate, kv=replace(first.view.kv, values=values), _memo={})
    layers = (replace(first, view=view),)
    gold = naive_ada_press(naive_expected(layers[0], 131072, epsilon=0.01), budget, safeguard)
    kept = kept_by("expected_attention@paper", layers, budget, safeguard=safeguard)[0]
    assert kept == gold and sum(map(len, kept)) == HEADS * budget
    assert len(kept[0]) != len(kept[1]) or safeguard >= 0.7 or budget in (4, tokens)
    assert kept_by("expected_attention@paper", layers, 3) == [[[0, 1, 2]] * HEADS]  # within the sinks


@pytest.mark.parametrize("forward", [False, True])
def test_expected_attention_may_be_pooled(forward: bool) -> None:
    first = make_layers(60)[0]
    layers = (replace(first, view=replace(first.view, rotate=rotate, _memo={})),)
    rows = spread_out(naive_expected(layers[0], 128), 0, 5, "avg", forward=forward)
    kept = kept_by("expected_attention", layers, 20, kernel=5, pool="avg", forward=forward)[0]
    assert kept == [[0, 1, 2, 3, *(t + 4 for t in naive_top(row, 16))] for row in rows]


def test_the_mean_turn_is_the_mean_of_turns() -> None:
    eye = torch.eye(DIM, dtype=torch.float64)
    turns = torch.stack([rotate(eye, f) for f in range(130)])
    for count in (1, 2, 3, 5, 8, 21, 130):
        torch.testing.assert_close(mean_turn(rotate, count, eye), turns[:count].mean(dim=0))


def test_expected_attention_needs_rotary_embeddings() -> None:
    view = make_layers(42)[1].view
    with pytest.raises(PolicyError, match="rotary"):
        make_policy("expected_attention").score(view)  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("window", [1, 16, 64])
def test_window_attention_is_the_softmax(tokens: int, window: int) -> None:
    gold = make_layers(tokens)[0]
    np.testing.assert_allclose(gold.view.attention(window)[0].numpy(), gold.attention[:, :, -window:], atol=1e-6)
