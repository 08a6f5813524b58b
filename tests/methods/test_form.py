"""The compiled form: scores and kept slots against plain loops, and a soft eviction against the hard one."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.contract import HEADS
from methods.base import KV, LayerView, PolicyError, PromptView
from methods.compilerkv.form import Form, FormPolicy, best_slots, shares_of, slot_counts, soft_bias
from methods.compilerkv.selection import choose, gains, interval
from tests.methods.compiled import live, prompt

TOKENS = 40


@pytest.mark.parametrize(
    ("forward", "kernel", "whole"), [(True, 5, 0.0), (False, 5, 0.0), (True, 13, 0.3), (True, 1, 1.0)]
)
def test_scores_are_those_of_loops(forward: bool, kernel: int, whole: float) -> None:
    form = Form(window=4, kernel=kernel, forward=forward, whole=whole)
    layer = prompt(TOKENS).layers[0]
    attention = layer.attention(4)[0].mean(dim=(1, 2))  # [H, T]
    sums = layer.column_sums[0].sum(dim=1)  # type: ignore[index]
    found = form.scores(PromptView([layer]))[0][0]
    for head in range(HEADS):
        for t in range(TOKENS):
            around = range(t - kernel + 1, t + 1) if forward else range(t - kernel // 2, t - kernel // 2 + kernel)
            seen = [attention[head, i].item() for i in around if 0 <= i < TOKENS - 4]
            own = sum(seen) / kernel if t < TOKENS - 4 else attention[head, t].item()
            expected = (1 - whole) * own + whole * (sums[head, t] / sums[head].sum()).item()
            assert found[head, t].item() == pytest.approx(expected, abs=1e-6)


def test_a_form_with_whole_prompt_attention_asks_for_it() -> None:
    assert Form(whole=0.0).needs.column_sums is False
    assert Form(whole=0.1).needs.column_sums is True
    layer = prompt(TOKENS).layers[0]
    layer.column_sums = None
    with pytest.raises(PolicyError, match="compilerkv@window"):
        Form(window=4, whole=0.1).scores(PromptView([layer]))


@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=2),
    st.integers(1, 6),
    st.integers(0, 99),
    st.sampled_from([3, 9999]),
)
def test_each_head_keeps_its_own_number_of_the_best(counts: list[int], recent: int, seed: int, values: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (1, 2, 12), generator=draw) / values  # many equal ones, or hardly any
    slots = best_slots(scores, counts, recent=recent)
    assert slots.shape == (1, 2, max(counts))
    for head, count in enumerate(counts):
        kept = [slot for slot in slots[0, head].tolist() if slot >= 0]
        last = list(range(12 - min(recent, count), 12))
        others = sorted(range(12 - recent), key=lambda t: (-scores[0, head, t].item(), t))[: max(0, count - recent)]
        assert kept == sorted([*others, *last])
        assert slots[0, head, count:].tolist() == [-1] * (max(counts) - count)


def test_shares_decide_the_slots_beyond_the_window_and_the_total_is_the_budget() -> None:
    view = PromptView(prompt(TOKENS).layers[:3])
    shares = ((1.0, 3.0), (0.5, 0.5), (0.0, 1.0))
    counts = slot_counts(shares, 11, view.sizes, window=2)
    assert sum(itertools.chain(*counts)) == 11 * 3 * HEADS
    assert counts in ([[11, 29], [6, 7], [2, 11]], [[11, 29], [7, 6], [2, 11]])
    assert live(FormPolicy(Form(window=2, kernel=3), shares), view, 11) == counts
    assert slot_counts((), 9, view.sizes, window=2) == [[9, 9]] * 3
    assert slot_counts(shares, 5, view.sizes, window=8) == [[5, 5]] * 3  # no more than the window to share
    steep = ((100.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    assert slot_counts(steep, 20, view.sizes, window=2)[0][0] == TOKENS  # a head holds the prompt at most
    with pytest.raises(PolicyError, match="4 slot shares for 3 layers of 2 KV heads"):
        slot_counts(shares[:2], 9, view.sizes, window=2)


@pytest.mark.parametrize("budgets", [[5.0, 9.0], [30.0, 12.5]])
def test_a_soft_eviction_expects_the_budget_and_hardens(budgets: list[float]) -> None:
    scores = torch.rand(HEADS, TOKENS, generator=torch.Generator().manual_seed(1)) + 0.01
    counts = torch.tensor([budgets, [20.0, 20.0]])
    for tau in (0.6, 0.1):
        bias = soft_bias(scores, counts, window=4, tau=tau)
        assert bias.shape == (2, HEADS, TOKENS) and bool((bias <= 0).all())
        assert torch.equal(bias[..., -4:], torch.zeros(2, HEADS, 4))
        torch.testing.assert_close(bias.exp().sum(dim=-1), counts, atol=1e-2, rtol=0)
    hard = soft_bias(scores, torch.full((1, HEADS), 10.0), window=4, tau=1e-3).exp() > 0.5
    kept = best_slots(scores.unsqueeze(0), [10, 10], recent=4)[0]
    assert [sorted(row.nonzero().flatten().tolist()) for row in hard[0]] == [sorted(row.tolist()) for row in kept]


def test_the_gradient_of_a_soft_eviction_is_the_difference_quotient() -> None:
    scores = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.01
    weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(count: torch.Tensor) -> torch.Tensor:
        return (soft_bias(scores, count, window=4, tau=0.3).exp() * weight).sum()

    count = torch.full((1, 1), 15.0, dtype=torch.float64, requires_grad=True)
    loss(count).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        by_hand = (loss(count + 1e-3) - loss(count - 1e-3)) / 2e-3
    assert count.grad is not None and count.grad.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_shares_have_mean_1() -> None:
    weights = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    torch.testing.assert_close(shares_of(weights) * weights.exp().mean(), weights.exp())


def test_the_form_is_chosen_where_every_family_and_budget_counts_the_same() -> None:
    families = ["a", "b"] * 8
    losses = torch.zeros(16, 2, 3)
    losses[0::2] = torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])
    losses[1::2] = torch.tensor([[0.3, 0.1, 0.2], [0.2, 0.2, 0.2]])
    best, report = choose(losses, families)
    by_hand = [(0.5 + 0.5 + 1.5 + 1.0) / 4, (1.0 + 1.0 + 0.5 + 1.0) / 4, (1.5 + 1.5 + 1.0 + 1.0) / 4]
    assert report["scores"] == pytest.approx(by_hand)
    assert best == by_hand.index(min(by_hand))
    assert (report["often"], report["left_out_ratio"]) == (1.0, pytest.approx(min(by_hand)))


def test_gains_are_paired_over_prompts() -> None:
    draw = torch.Generator().manual_seed(0)
    level = 10 * torch.rand(40, generator=draw)
    noise = 0.01 * torch.randn(40, 6, generator=draw)
    losses = level[:, None] + torch.tensor([0.5, 0.2, 0.5, 0.6, 0.4, 0.5]) + noise
    found = gains(losses, seed=0)
    assert found["over_uniform"]["mean"] == pytest.approx(0.3, abs=0.02)
    assert 0.28 < found["over_shuffled"]["low"] < 0.3 < found["over_shuffled"]["high"] < 0.32
    flat = interval(torch.zeros(5), seed=0)
    assert (flat["mean"], flat["low"], flat["high"]) == (0, 0, 0)


def test_a_basis_averages_over_heads_or_layers() -> None:
    view = prompt(TOKENS)
    own, layer, everywhere = (
        torch.stack(Form(window=4, kernel=5, basis=basis).scores(view))[:, 0] for basis in ("head", "layer", "global")
    )  # [L, H, T]
    torch.testing.assert_close(layer, own.mean(dim=1, keepdim=True).expand_as(own))
    torch.testing.assert_close(everywhere, own.mean(dim=(0, 1)).expand_as(own))


def test_a_gate_drops_what_scores_too_little_but_never_the_window() -> None:
    view, form = prompt(TOKENS), Form(window=4, kernel=1, gate=0.9)
    for kv, own in zip(FormPolicy(form).compress(view, 30), form.scores(view), strict=True):
        for head in range(HEADS):
            worth = own[0, head] * TOKENS
            best = sorted(range(TOKENS - 4), key=lambda t, worth=worth: (-worth[t].item(), t))[:26]  # type: ignore[misc]
            expected = sorted([*(t for t in best if worth[t] >= 0.9), *range(TOKENS - 4, TOKENS)])
            assert sorted(t for t in kv.positions[0, head].tolist() if t >= 0) == expected
    assert all(sum(heads) < 30 * HEADS for heads in live(FormPolicy(form), view, 30))


def test_a_batch_of_prompts_keeps_what_each_keeps_alone() -> None:
    one, other = prompt(TOKENS), prompt(TOKENS)
    for layer in other.layers:
        layer.queries = layer.queries.flip(2)
        layer.kv = KV(layer.kv.keys.flip(2), layer.kv.values.flip(2), layer.kv.positions)
    layers = []
    for a, b in zip(one.layers, other.layers, strict=True):
        kv = KV(*(torch.cat([getattr(x.kv, name) for x in (a, b)]) for name in ("keys", "values", "positions")))
        sums = torch.cat([x.column_sums for x in (a, b) if x.column_sums is not None])
        layers.append(LayerView(a.index, kv, torch.cat([a.queries, b.queries]), a.form, sums))
    policy = FormPolicy(Form(window=4, kernel=5, gate=0.3), ((1.0, 3.0), (0.5, 0.5), (0.2, 1.0), (2.0, 1.0)))
    together = policy.compress(PromptView(layers), 14)
    for place, alone in enumerate((one, other)):
        for kv, own in zip(together, policy.compress(alone, 14), strict=True):
            assert torch.equal(kv.positions[place : place + 1], own.positions)
            assert torch.equal(kv.values[place : place + 1], own.values)
