"""Attention kernels against plain loops over queries, heads and slots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness.kernels import causal_attention, column_sums, prefill_kernel, slot_attention, slot_weights

HEADS, GROUP, DIM = 2, 3, 4
SCALING = 0.7


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def weights(query: Tensor, keys: Tensor, seen: list[int]) -> list[float]:
    """Softmax of one query [D] over the slots `seen` of keys [S, D], one number a slot."""
    logits = [SCALING * float(query @ keys[slot]) for slot in seen]
    total = sum(math.exp(x - max(logits)) for x in logits)
    return [math.exp(x - max(logits)) / total for x in logits]


def mixed(query: Tensor, keys: Tensor, values: Tensor, seen: list[int]) -> Tensor:
    shares = weights(query, keys, seen)
    return sum((share * values[slot] for share, slot in zip(shares, seen, strict=True)), torch.zeros(values.shape[-1]))


@pytest.mark.parametrize("window", [None, 1, 3, 9, 40])
def test_causal_attention_sees_what_came_before_inside_the_window(window: int | None) -> None:
    tokens = 9
    queries = draw(1, HEADS * GROUP, tokens, DIM)
    keys, values = draw(1, HEADS, tokens, DIM), draw(1, HEADS, tokens, DIM)
    out = causal_attention(queries, keys, values, scaling=SCALING, window=window)
    for head in range(HEADS * GROUP):
        for at in range(tokens):
            seen = list(range(0 if window is None else max(0, at - window + 1), at + 1))
            k, v = keys[0, head // GROUP], values[0, head // GROUP]
            torch.testing.assert_close(out[0, head, at], mixed(queries[0, head, at], k, v, seen))


@pytest.mark.parametrize("count", [1, 3])
def test_slot_attention_sees_the_masked_slots_of_its_own_head(count: int) -> None:
    batch, slots = 2, 7
    queries = draw(batch, HEADS * GROUP, count, DIM)
    keys, values = draw(batch, HEADS, slots, DIM), draw(batch, HEADS, slots, DIM + 2)
    mask = torch.rand(batch, HEADS, count, slots) < 0.5
    mask[..., 4] = True
    out = slot_attention(queries, keys, values, mask=mask, scaling=SCALING)
    assert out.shape == (batch, HEADS * GROUP, count, DIM + 2)
    open_out = slot_attention(queries, keys, values, mask=None, scaling=SCALING)
    for row in range(batch):
        for head in range(HEADS * GROUP):
            kv = head // GROUP
            for at in range(count):
                seen = [slot for slot in range(slots) if mask[row, kv, at, slot]]
                query, k, v = queries[row, head, at], keys[row, kv], values[row, kv]
                torch.testing.assert_close(out[row, head, at], mixed(query, k, v, seen))
                torch.testing.assert_close(open_out[row, head, at], mixed(query, k, v, list(range(slots))))


def test_slot_weights_are_those_the_attention_used() -> None:
    batch, slots = 2, 6
    queries, keys = draw(batch, HEADS * GROUP, 1, DIM), draw(batch, HEADS, slots, DIM)
    mask = torch.rand(batch, HEADS, 1, slots) < 0.6
    mask[..., 2] = True
    found = slot_weights(queries, keys, mask=mask, scaling=SCALING)
    assert found.shape == (batch, HEADS, GROUP, slots)
    assert found.dtype == torch.float32
    for row in range(batch):
        for head in range(HEADS):
            seen = [slot for slot in range(slots) if mask[row, head, 0, slot]]
            for member in range(GROUP):
                gold = torch.zeros(slots)
                gold[seen] = torch.tensor(weights(queries[row, head * GROUP + member, 0], keys[row, head], seen))
                torch.testing.assert_close(found[row, head, member], gold)


@pytest.mark.parametrize("block", [1, 4, 11, 128])
def test_column_sums_do_not_depend_on_the_block(block: int) -> None:
    tokens = 11
    queries = draw(1, tokens, HEADS * GROUP, DIM).transpose(1, 2)  # not contiguous, as from a model
    keys = draw(1, HEADS, tokens, DIM)
    found = column_sums(queries, keys, scaling=SCALING, block=block)
    gold = torch.zeros(1, HEADS, GROUP, tokens)
    for head in range(HEADS):
        for member in range(GROUP):
            for at in range(tokens):
                seen = list(range(at + 1))
                shares = weights(queries[0, head * GROUP + member, at], keys[0, head], seen)
                gold[0, head, member, : at + 1] += torch.tensor(shares)
    torch.testing.assert_close(found, gold)
    torch.testing.assert_close(found.sum(-1), torch.full((1, HEADS, GROUP), float(tokens)))


def test_half_precision_sums_are_kept_in_float32() -> None:
    queries, keys = draw(1, HEADS * GROUP, 5, DIM).bfloat16(), draw(1, HEADS, 5, DIM).bfloat16()
    assert column_sums(queries, keys, scaling=1.0).dtype == torch.float32
    mask = torch.ones(1, HEADS, 1, 5, dtype=torch.bool)
    assert slot_weights(queries[:, :, :1], keys, mask=mask, scaling=1.0).dtype == torch.float32


def test_the_cpu_prefills_with_sdpa() -> None:
    assert prefill_kernel(torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert prefill_kernel(torch.device("cuda"), torch.float32) == "sdpa"
