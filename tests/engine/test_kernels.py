"""Attention kernels against plain loops over queries, heads and slots."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from harness.engine.kernels import causal_attention, column_sums, prefill_kernel, slot_attention, slot_weights
from harness.engine.layer_cache import visible
from methods.base import KV, LayerView
from methods.views import Form
from tests.engine.naive import naive

HEADS, GROUP, DIM = 2, 3, 4
SCALING = 0.7


def weights(query: Tensor, keys: Tensor, seen: list[int]) -> list[float]:
    """Softmax of one query [D] over the slots `seen` of keys [S, D], one number a slot."""
    logits = [SCALING * float(query @ keys[slot]) for slot in seen]
    total = sum(math.exp(x - max(logits)) for x in logits)
    return [math.exp(x - max(logits)) / total for x in logits]


def mixed(query: Tensor, keys: Tensor, values: Tensor, seen: list[int]) -> Tensor:
    shares = weights(query, keys, seen)
    return sum((share * values[slot] for share, slot in zip(shares, seen, strict=True)), torch.zeros(values.shape[-1]))


@pytest.mark.parametrize(("window", "wider"), [(None, 0), (1, 0), (3, 0), (9, 0), (40, 0), (None, 2)])
def test_causal_attention_sees_what_came_before_inside_the_window(window: int | None, wider: int) -> None:
    tokens = 9
    queries, keys = torch.randn(1, HEADS * GROUP, tokens, DIM), torch.randn(1, HEADS, tokens, DIM)
    values = torch.randn(1, HEADS, tokens, DIM + wider)
    out, lse = causal_attention(queries, keys, values, Form(SCALING, window))
    assert (lse is None) == (window in (1, 3) or wider > 0)  # the fused kernel takes neither
    for head in range(HEADS * GROUP):
        for at in range(tokens):
            seen = list(range(0 if window is None else max(0, at - window + 1), at + 1))
            k, v = keys[0, head // GROUP], values[0, head // GROUP]
            torch.testing.assert_close(out[0, head, at], mixed(queries[0, head, at], k, v, seen))


@pytest.mark.parametrize("new", [70, 5, 1])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("softcap", "sinks"), [(2.0, False), (None, True), (1.5, True)])
def test_caps_and_sinks_are_in_every_kernel(softcap: float | None, sinks: bool, window: int | None, new: int) -> None:
    tokens = 70  # more than a block of queries
    queries = 3 * torch.randn(2, HEADS * GROUP, new, DIM)
    keys, values = torch.randn(2, HEADS, tokens, DIM), torch.randn(2, HEADS, tokens, DIM)
    sink = torch.randn(HEADS * GROUP) if sinks else None
    form = Form(DIM**-0.5, window, softcap, None if sink is None else sink.view(1, HEADS, GROUP))
    wanted, wanted_lse, sums = naive(queries, keys, values, window=window, softcap=softcap, sinks=sink)
    out, lse = causal_attention(queries, keys, values, form)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    at = torch.arange(tokens)
    mask = visible(at.expand(2, HEADS, tokens), at[tokens - new :], window)
    torch.testing.assert_close(
        slot_attention(queries, keys, values, form, mask=mask).double(), wanted, atol=1e-5, rtol=1e-5
    )
    if window is not None:
        return
    torch.testing.assert_close(column_sums(queries, keys, lse, form).double(), sums, atol=1e-4, rtol=1e-4)
    if lse is not None:
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)
    view = LayerView(0, KV(keys, values, at.expand(2, HEADS, tokens)), queries, form)
    torch.testing.assert_close(view.attention(new).sum(dim=3).double(), sums, atol=1e-5, rtol=1e-5)
    if new == 1:
        torch.testing.assert_close(slot_weights(queries, keys, form, mask=mask).double(), sums, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_slot_attention_sees_the_masked_slots_of_its_own_head(count: int) -> None:
    batch, slots = 2, 7
    queries = torch.randn(batch, HEADS * GROUP, count, DIM)
    keys, values = torch.randn(batch, HEADS, slots, DIM), torch.randn(batch, HEADS, slots, DIM + 2)
    mask = torch.rand(batch, HEADS, count, slots) < 0.5
    mask[..., 4] = True
    out = slot_attention(queries, keys, values, Form(SCALING), mask=mask)
    assert out.shape == (batch, HEADS * GROUP, count, DIM + 2)
    open_out = slot_attention(queries, keys, values, Form(SCALING), mask=None)
    used = slot_weights(queries[:, :, :1], keys, Form(SCALING), mask=mask[:, :, :1])
    assert used.shape == (batch, HEADS, GROUP, slots)
    for row, head, at in product(range(batch), range(HEADS * GROUP), range(count)):
        kv = head // GROUP
        seen = mask[row, kv, at].nonzero().flatten().tolist()
        query, k, v = queries[row, head, at], keys[row, kv], values[row, kv]
        torch.testing.assert_close(out[row, head, at], mixed(query, k, v, seen))
        torch.testing.assert_close(open_out[row, head, at], mixed(query, k, v, list(range(slots))))
        if at == 0:
            gold = torch.zeros(slots)
            gold[seen] = torch.tensor(weights(query, k, seen))
            torch.testing.assert_close(used[row, kv, head % GROUP], gold)


@pytest.mark.parametrize("new", [1, 4, 10])
def test_a_chunk_attends_as_it_does_within_the_whole(new: int) -> None:
    queries, keys, values = (
        torch.randn(1, HEADS * GROUP, 10, DIM),
        torch.randn(1, HEADS, 10, DIM),
        torch.randn(1, HEADS, 10, DIM),
    )
    whole, lse = causal_attention(queries, keys, values, Form(SCALING))
    last, last_lse = causal_attention(queries[:, :, -new:], keys, values, Form(SCALING))
    assert lse is not None and last_lse is not None
    torch.testing.assert_close(last, whole[:, :, -new:])
    torch.testing.assert_close(last_lse, lse[:, :, -new:])


def summed(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention each token receives, by loops over heads and queries: the last Q of the tokens."""
    tokens, new = keys.shape[2], queries.shape[2]
    gold = torch.zeros(1, HEADS, GROUP, tokens)
    for head, member, at in product(range(HEADS), range(GROUP), range(new)):
        seen = list(range(tokens - new + at + 1))
        shares = weights(queries[0, head * GROUP + member, at], keys[0, head], seen)
        gold[0, head, member, : len(seen)] += torch.tensor(shares)
    return gold


@pytest.mark.parametrize("new", [1, 4, 11])
@pytest.mark.parametrize("fused", [True, False])
def test_column_sums_are_those_of_the_attention(new: int, fused: bool) -> None:
    tokens = 11
    queries = torch.randn(1, new, HEADS * GROUP, DIM).transpose(1, 2)  # not contiguous, as from a model
    keys = torch.randn(1, HEADS, tokens, DIM)
    _, lse = causal_attention(queries, keys, torch.randn(1, HEADS, tokens, DIM), Form(SCALING))
    found = column_sums(queries, keys, lse if fused else None, Form(SCALING))
    torch.testing.assert_close(found, summed(queries, keys))


@pytest.mark.parametrize("fused", [True, False])
def test_column_sums_of_many_blocks(fused: bool) -> None:
    queries, keys = torch.randn(1, HEADS * GROUP, 200, 16), torch.randn(1, HEADS, 1200, 16)
    _, lse = causal_attention(queries, keys, keys, Form(SCALING))
    found = column_sums(queries, keys, lse if fused else None, Form(SCALING))
    logits = (queries.unflatten(1, (HEADS, -1)) @ keys.unsqueeze(2).transpose(3, 4)) * SCALING
    future = torch.ones(200, 1200, dtype=torch.bool).triu(1001)
    torch.testing.assert_close(found, logits.masked_fill(future, float("-inf")).softmax(dim=-1).sum(dim=3))


def test_sums_of_half_precision_are_float32_and_as_good_as_their_input() -> None:
    queries = torch.randn(1, HEADS * GROUP, 130, 16).mul(4).bfloat16()
    keys = torch.randn(1, HEADS, 130, 16).mul(4).bfloat16()
    _, lse = causal_attention(queries, keys, keys, Form(SCALING))
    found = column_sums(queries, keys, lse, Form(SCALING))
    exact = column_sums(queries.float(), keys.float(), None, Form(SCALING))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    mask = torch.ones(1, HEADS, 1, 130, dtype=torch.bool)
    used = slot_weights(queries[:, :, :1], keys, Form(SCALING), mask=mask)
    assert found.dtype == column_sums(queries, keys, None, Form(SCALING)).dtype == used.dtype == torch.float32


def test_the_cpu_prefills_with_sdpa() -> None:
    assert prefill_kernel(torch.device("cpu"), torch.bfloat16) == "sdpa"
