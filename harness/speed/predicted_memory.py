"""Bytes that a prefill and decode need above the model, from shapes alone: what `speed.one_method` keeps and when.

Letters as in `methods.base`, and Q tokens of a prefill forward, P prompts, e bytes of a number, E hidden and I
intermediate size, V vocabulary, N slots kept of every layer and KV head, R new tokens. Every cache slot of every KV
head costs c = 2 * D * e bytes, and 4 for its position once a policy has taken slots. The peak is the highest of:

    prefill     KV(now) + Q * 2 * D * e (rotary tables) + the highest of
                  norm      Q * E * (4 e), above it two float32 copies where e < 4
                  rotary    Q * E * 3 e + Q * (Hq + 2 H) * D * e + 3 * Q * Hq * D * e
                  attend    Q * E * 3 e + (2 Hq + 2 H) * Q * D * e + Q * Hq * 4, and for chunks after the first
                            Q * Hq * D * (e + 12) (attention of the past, mixed in float32), Q * S * (1 + e) (mask) in
                            models with sliding windows
                  observe   Q * E * 3 e + (2 Hq + 2 H) * Q * D * e + 2 * Q * Hq * 4 + (Hq + 2 H) * S * 4
                            + H * S * (D + 8) * e + the higher of 3 * H * Q * (D + 8) * e (queries widened) and
                              (H * S + H * Q * (1, + 2 where e < 4)) * (D + 8) * e (the kernel, which packs them)
                  mlp       Q * E * 4 e + 3 * Q * I * e
    compress    KV(now) + one layer's N slots + window weights Hq * W * T * (4, + e where e < 4) + 4 * H * T * 8
                (of queries by stretches of C tokens, a KV head at a time, Hq / H * T * (3 * C + D) * 4 for the second)
    logits      V * (e, + 4 where e < 4), W + 1 times with 4 more where log-probabilities are wanted
    batch       KV of all prompts, and one layer of them again with room for R
    decode      KV of all prompts with room for R, P * V * 4 (first logits), and the higher of
                  P * V * (e, + 4 where e < 4), and half a layer (its keys or values are copied to where room is)

A method that leaves codes (`methods.coded`) has the bytes of its codes, scales and residual for N * c, and more in

    compress    H * N * D * (2 e + 13) (what one layer's codes are taken from, in float32)
    decode      P * H * N * D * (3 e + 1) (one layer decoded, and its codes as they are turned)

With codes of single slots (`methods.slotwise`) these are 2 e + 20 and 2 e + 12, in float32 too. Tokens that come
later are plain until a step of them becomes codes.

KV(now) in the last prompt is what the earlier P - 1 prompts left, and of the prompt itself
    per layer, unchunked    L - 1 layers of N slots, and one full
    otherwise               L full layers; after it, N slots of each of them as well
What a policy observed stays with every full layer. A sliding-window layer is full until all are compressed.

A prompt that is repeated (`harness.engine.repeat`) in chunks of C tokens is as one of T + C tokens in chunks of C whose
layers hold, beside the full cache, C slots, L * Hq * (T + C) * 4 (what their keys got, in all and in the chunk) and,
one of them at a time, C slots more, a copy of itself and 2 * Hq * BLOCK * S * 4 (the weights of a block of queries).

That is of a CPU, where one kernel serves attention and column sums (`harness.engine.kernels`). With Triton on a GPU
(`harness.engine.triton_kernels`) chunks need no more than a whole prompt, and

    attend      Q * Hq * D * e more (heads are brought together for the next product)
    observe     attend + Hq * S * 4, twice in chunks
    batch       KV of all prompts, and two more of one layer, with 4 * 8 for each of their slots (`ragged_rows`)
    decode      the same where room has to grow, or P * Hq * D * 8 for each 512 slots, up to 64 (parts of a stream)

A mixture of experts is taken for a dense layer of its config's intermediate size. Left out is that a GPU's allocator
rounds every tensor up to 512 bytes; blocks that it holds beside are no part of the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from harness.engine.kernels import BLOCK, TILE
from harness.engine.layer_cache import room_step
from harness.records.measured import ProbeSpec
from harness.speed.dims import FLOAT32, Dims
from methods.base import KVPolicy, Needs, Sizes
from methods.coded import CodedPolicy
from methods.slotwise import SlotCoding
from methods.stored import Coding
from methods.views import POSITION_BYTES

INDEX = 8
SPLIT, SPLITS = 512, 64  # of `triton_kernels`, which is there only where Triton is


@dataclass(frozen=True)
class ProbeShape:
    """What is run.

    per_layer: whether a layer is compressed without the others. tokens: of each prompt. slots: kept of each
    compressible layer and KV head, on average. coding: how they become codes, None where they stay as they are.
    cuda: whether the kernels are those of a GPU. one_buffer: whether rows decode as `RaggedRows`.
    """

    needs: Needs
    per_layer: bool
    keeps_all: bool
    tokens: int
    slots: int
    batch: int
    new_tokens: int
    chunk: int | None
    coding: Coding | None = None
    cuda: bool = False
    one_buffer: bool = False

    @property
    def step(self) -> int:
        """Tokens of a prefill forward."""
        return min(self.chunk or self.tokens, self.tokens)


def predict(
    config: Any, dtype_bytes: int, policy: KVPolicy, spec: ProbeSpec, budget: int | None, *, cuda: bool = False
) -> int:
    """Predict the peak bytes above the model of a probe under `policy`, as the head of this module says.

    config: the model's text config. dtype_bytes: of a weight and of a number of the cache. budget: slots per layer and
    KV head; None for a policy that is given none: one that finds its own may keep everything. cuda: whether it runs on
    a GPU.
    """
    dims, tokens = Dims.of(config, dtype_bytes), spec.tokens
    slots = tokens if budget is None else min(budget, tokens)
    sizes = Sizes(tokens, dims.seen, dims.heads, dims.kv_heads)
    alone = policy.per_layer(slots, sizes) is not None
    coding = policy.coding if isinstance(policy, CodedPolicy) else None
    if isinstance(policy, CodedPolicy) and budget is not None:
        slots = min(policy.fitting(budget, dims.head_dim, dims.head_dim, 2 * dims.head_dim * dims.number), tokens)
    all_, one = policy.kind == "whole" and not coding, cuda and coding is None and not policy.evicts_while_decoding
    times = (spec.batch, spec.new_tokens, spec.chunk)
    shape = ProbeShape(policy.needs, alone, all_, tokens, slots, *times, coding, cuda=cuda, one_buffer=one)
    return max(prefill(dims, shape), batching(dims, shape), decoding(dims, shape))


def full_layer(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of one layer's cache of the whole prompt."""
    return shape.tokens * dims.slot


def observed(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of the window queries and column sums that one layer holds until it is compressed."""
    window = min(shape.needs.window, shape.tokens) * dims.heads * dims.head_dim * dims.number
    return window + (shape.tokens * dims.heads * FLOAT32 if shape.needs.column_sums else 0)


def slot_bytes(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of the keys and values of such a layer, without positions."""
    if shape.coding is None:
        return shape.slots * dims.slot
    older = max(0, shape.slots - shape.coding.residual)
    codes = dims.kv_heads * (shape.coding.nbytes(older, dims.head_dim, dims.head_dim) - older * POSITION_BYTES)
    return min(shape.slots * dims.slot, codes + (shape.slots - older) * dims.slot)


def kept_layer(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of one compressible layer of one prompt after compression; positions of a whole prompt are implied."""
    return slot_bytes(dims, shape) + (shape.slots * POSITION_BYTES * dims.kv_heads if shape.slots < shape.tokens else 0)


def kept(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of all layers of one prompt after compression, sliding-window layers cut to their windows."""
    return dims.seen * kept_layer(dims, shape) + sum(windows(dims, shape))


def windows(dims: Dims, shape: ProbeShape) -> list[int]:
    """Bytes of each sliding-window layer of one prompt, at its own size."""
    return [min(window, shape.tokens) * dims.slot for window in dims.windows if window is not None]


def prefill(dims: Dims, shape: ProbeShape) -> int:
    """Most bytes that are held while the last prompt is prefilled and compressed."""
    earlier = (shape.batch - 1) * (kept(dims, shape) + dims.vocab * FLOAT32)
    layers, full, seen = len(dims.windows), full_layer(dims, shape), observed(dims, shape)
    scores, new = score_bytes(dims, shape), 0 if shape.keeps_all else kept_layer(dims, shape)
    if shape.per_layer and shape.step == shape.tokens and not shape.keeps_all:
        now = (dims.seen - 1) * new + (layers - dims.seen + 1) * full
        held = now + max(activations(dims, shape), attention(dims, shape) + seen + new + scores)
        now = dims.seen * new + (layers - dims.seen) * full  # when the logits come
    else:
        now = layers * full + dims.seen * seen
        at_once = 0 if not shape.per_layer else attention(dims, shape)
        copies = new * (1 if shape.per_layer else dims.seen)
        held = now + max(activations(dims, shape), at_once + copies + scores, repeating(dims, shape))
    return earlier + max(held, now + logits(dims, shape))


def activations(dims: Dims, shape: ProbeShape) -> int:
    """Most bytes that a layer's forward over a chunk takes, its cache apart."""
    q, e = shape.step, dims.number
    rotary_tables = 2 * q * dims.head_dim * e
    norm = q * dims.hidden * (4 * e + 2 * dims.up)
    mlp = q * (4 * dims.hidden + 3 * dims.intermediate) * e
    rotary = q * e * (3 * dims.hidden + (4 * dims.heads + 2 * dims.kv_heads) * dims.head_dim)
    observing = _attended(dims, shape) + (column_sums(dims, shape) if shape.needs.column_sums else 0)
    return rotary_tables + max(norm, mlp, rotary, attention(dims, shape), observing)


def repeating(dims: Dims, shape: ProbeShape) -> int:
    """Most bytes that are held, beside the full cache, while the prompt is repeated; 0 where it is not."""
    sizes = [0]
    for asked in shape.needs.repeat:
        chunk = min(asked.chunk, shape.tokens)
        weighed = (chunk if asked.apart else shape.tokens) + chunk
        own = replace(shape, tokens=shape.tokens + chunk, chunk=min(chunk, shape.step), needs=Needs())
        seen = dims.heads * (shape.tokens + (chunk if asked.apart else shape.tokens)) * FLOAT32
        got = (len(dims.windows) + 1) * chunk * dims.slot + len(dims.windows) * seen
        weights = 2 * dims.heads * min(BLOCK, chunk) * weighed * FLOAT32
        sizes.append(got + full_layer(dims, own) + max(activations(dims, own), weights))
    return max(sizes)


def attention(dims: Dims, shape: ProbeShape) -> int:
    """Most bytes that are held when a layer has attended; a chunk attends to the past and to itself, and mixes them."""
    if shape.cuda:
        return _attended(dims, shape) + shape.step * dims.heads * dims.head_dim * dims.number
    if shape.step == shape.tokens:
        return _attended(dims, shape)
    mixed = shape.step * dims.heads * dims.head_dim * (dims.number + 3 * FLOAT32)
    mask = shape.step * shape.tokens * (1 + dims.number) if dims.seen < len(dims.windows) else 0
    return _attended(dims, shape) + max(mixed, mask)


def column_sums(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of what `kernels.column_sums` makes, its result included: a tile of weights of a KV head, and its sums.

    In half precision the tile's queries and all keys of the head are there as float32, too.
    """
    if shape.cuda:
        return dims.heads * shape.tokens * FLOAT32 * (1 if shape.step == shape.tokens else 2)
    s, group = shape.tokens, dims.heads // dims.kv_heads
    queries, keys = min(BLOCK, shape.step), min(TILE, s)
    widened = (s + group * queries) * dims.head_dim if dims.up else 0
    return (dims.heads * s + group * (queries + 1) * keys + widened) * FLOAT32


def _attended(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of embeddings, a layer's input and its normed copy; queries, keys, values, outputs, softmax sums."""
    vectors = (2 * dims.heads + 2 * dims.kv_heads) * dims.head_dim
    return shape.step * ((3 * dims.hidden + vectors) * dims.number + dims.heads * FLOAT32)


def score_bytes(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of a layer's scores (weights of the window queries, ordering keys of every token) or of its codes."""
    if shape.keeps_all:
        return 0
    each = 2 * dims.number + (20 if isinstance(shape.coding, SlotCoding) else 13)
    coded = 0 if shape.coding is None else shape.slots * dims.kv_heads * dims.head_dim * each
    half = dims.number if dims.up else 0
    window = dims.heads * min(shape.needs.window, shape.tokens) * shape.tokens * (FLOAT32 + half)
    if shape.needs.stretch:  # a KV head at a time: products, those without what is not to be seen, weights
        group = dims.heads // dims.kv_heads
        window = group * shape.tokens * (3 * min(shape.needs.stretch, shape.tokens) + dims.head_dim) * FLOAT32
    return max(window, 4 * dims.kv_heads * shape.tokens * INDEX, coded)


def logits(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of a prefill's logits, in the model's numbers and as float32, and of what log-probabilities take."""
    wanted = min(shape.needs.window + 1, shape.step) if shape.needs.logprobs else 1
    return dims.vocab * wanted * (dims.number + dims.up + (FLOAT32 if shape.needs.logprobs else 0))


def rows(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of all layers of all prompts while decoding, with all the room that the tokens to come take."""
    new = shape.new_tokens - 1
    room = dims.seen * later(dims, shape, new) + (len(dims.windows) - dims.seen) * new * dims.slot
    return shape.batch * (kept(dims, shape) + room)


def later(dims: Dims, shape: ProbeShape, new: int) -> int:
    """Bytes of the tokens that come later in a compressible layer."""
    plain, coding = new, shape.coding
    if coding is not None:
        plain = min(new, room_step(slot_bytes(dims, shape) // dims.slot), coding.step - 1)
    if coding is None or plain == new:
        return plain * dims.slot
    older = max(1, shape.slots - coding.residual)
    before, after = (coding.nbytes(n, dims.head_dim, dims.head_dim) for n in (older, older + new - plain))
    return plain * dims.slot + dims.kv_heads * (after - before - (new - plain) * POSITION_BYTES)


def batching(dims: Dims, shape: ProbeShape) -> int:
    """Most bytes that are held while the prompts' caches are copied into a batch, layer by layer."""
    before = shape.batch * kept(dims, shape)
    one = rows(dims, shape) // len(dims.windows)
    last = shape.batch * max(kept_layer(dims, shape), *windows(dims, shape), 0)
    more = moved(dims, shape) if shape.one_buffer else 0
    return max(before + one, rows(dims, shape) + last) + more + shape.batch * dims.vocab * FLOAT32


def moved(dims: Dims, shape: ProbeShape) -> int:
    """Bytes of a layer's slots on their way into one buffer, and of the numbers that say where they go."""
    slots = shape.batch * max(shape.slots, *(min(window, shape.tokens) for window in dims.windows if window), 0)
    return slots * (dims.slot + 4 * INDEX * dims.kv_heads)


def decoding(dims: Dims, shape: ProbeShape) -> int:
    """Most bytes that are held in a decode step."""
    step = dims.vocab * (dims.number + dims.up) + (4 * dims.hidden + 3 * dims.intermediate) * dims.number
    weights = dims.heads * (shape.slots + shape.new_tokens) * FLOAT32 * 2 if shape.needs.decode_attention else 0
    turned = 12 if isinstance(shape.coding, SlotCoding) else dims.number + 1
    each = 0 if shape.coding is None else shape.slots * dims.kv_heads * dims.head_dim * (2 * dims.number + turned)
    held = rows(dims, shape)
    growing = held // len(dims.windows) // 2
    if shape.one_buffer:
        more = shape.new_tokens - 1 > room_step(shape.slots)
        growing = held // len(dims.windows) + moved(dims, shape) if more else 0
        step += 2 * dims.heads * dims.head_dim * FLOAT32 * min(SPLITS, math.ceil(shape.slots / SPLIT))
    return held + shape.batch * dims.vocab * FLOAT32 + max(shape.batch * (step + each) + weights, growing)
