"""Bytes that a prefill and decode need above the model, from shapes alone: what `speed.one_method` keeps and when.

Letters as in `methods.base`, and Q tokens of a prefill forward, P prompts, e bytes of a number, E hidden and I
intermediate size, V vocabulary, N slots kept of every layer and KV head, R new tokens. Every cache slot of every KV
head costs c = 2 * D * e bytes, and 8 for its position once a policy has taken slots. The peak is the highest of:

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
    logits      V * (e, + 4 where e < 4), W + 1 times with 4 more where log-probabilities are wanted
    batch       KV of all prompts, and one layer of them again with room for R
    decode      KV of all prompts with room for R, P * V * 4 (first logits), P * V * (e, + 4 where e < 4)

A method that leaves codes (`methods.quant`) has the bytes of its codes, scales and residual for N * c, and more in

    compress    H * N * D * (2 e + 13) (what one layer's codes are taken from, in float32)
    decode      P * H * N * D * (3 e + 1) (one layer decoded, and its codes as they are turned)

KV(now) in the last prompt is what the earlier P - 1 prompts left, and of the prompt itself
    per layer, unchunked    L - 1 layers of N slots, and one full
    otherwise               L full layers; after it, N slots of each of them as well
What a policy observed stays with every full layer. A sliding-window layer is full until the batch is made.
Attention and column sums are those of a CPU, where one kernel serves both (`harness.engine.kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.engine.kernels import PAD
from methods.base import KVPolicy, Needs, Sizes
from methods.codes import Coding
from methods.quant import Quant

POSITION = 8  # int64
FLOAT32 = 4


@dataclass(frozen=True)
class Dims:
    """Shapes of a model. windows: sliding window of each layer, None where attention is full. number: its bytes."""

    windows: tuple[int | None, ...]
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    number: int

    @classmethod
    def of(cls, config: Any, dtype_bytes: int) -> Dims:
        """Of a transformers text config; a field that a config leaves out has the value that models take for it."""
        heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
        layers = int(config.num_hidden_layers)
        types = getattr(config, "layer_types", None) or ["full_attention"] * layers
        window = getattr(config, "sliding_window", None)
        return cls(
            windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            hidden=hidden,
            intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
            vocab=int(config.vocab_size),
            number=dtype_bytes,
        )

    @property
    def slot(self) -> int:
        """Bytes of the keys and values of a slot of all KV heads of a layer."""
        return 2 * self.kv_heads * self.head_dim * self.number

    @property
    def seen(self) -> int:
        """Layers that policies see."""
        return sum(window is None for window in self.windows)

    @property
    def up(self) -> int:
        """Bytes of a float32 copy of a number, 0 where it is one."""
        return FLOAT32 if self.number < FLOAT32 else 0


@dataclass(frozen=True)
class ProbeShape:
    """What is run. slots: kept of each compressible layer and KV head, on average. chunk: of the prefill.

    coding: how slots become codes, None where they stay as they are.
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

    @property
    def step(self) -> int:
        """Tokens of a prefill forward."""
        return min(self.chunk or self.tokens, self.tokens)


def predict(
    config: Any,
    dtype_bytes: int,
    policy: KVPolicy,
    *,
    tokens: int,
    budget: int | None,
    batch: int = 1,
    new_tokens: int = 32,
    chunk: int | None = None,
) -> int:
    """Peak bytes above the model of `batch` prompts of `tokens` under `policy`; see the head of this module.

    Args:
        config: the model's text config.
        dtype_bytes: of a weight and of a number of the cache.
        policy: with its needs; it is asked whether its layers stand alone.
        tokens: of each prompt.
        budget: slots per layer and KV head; None for a policy that keeps everything.
        batch: prompts, prefilled one at a time and decoded together.
        new_tokens: generated for each, the first by the prefill.
        chunk: tokens of a prefill forward, None for all at once.
    """
    dims, slots = Dims.of(config, dtype_bytes), tokens if budget is None else min(budget, tokens)
    sizes = Sizes(tokens, dims.seen, dims.heads, dims.kv_heads)
    alone = policy.per_layer(slots, sizes) is not None
    coding = policy.coding if isinstance(policy, Quant) else None
    if isinstance(policy, Quant) and budget is not None:
        slots = min(policy.fitting(budget, dims.head_dim, dims.head_dim, 2 * dims.head_dim * dims.number), tokens)
    work = ProbeShape(
        policy.needs, alone, budget is None and not coding, tokens, slots, batch, new_tokens, chunk, coding
    )
    return max(prefill(dims, work), batching(dims, work), decoding(dims, work))


def full_layer(dims: Dims, work: ProbeShape) -> int:
    """One layer's cache of the whole prompt."""
    return work.tokens * dims.slot


def observed(dims: Dims, work: ProbeShape) -> int:
    """Window queries and column sums that one layer holds until it is compressed."""
    window = min(work.needs.window, work.tokens) * dims.heads * dims.head_dim * dims.number
    return window + (work.tokens * dims.heads * FLOAT32 if work.needs.column_sums else 0)


def kept_layer(dims: Dims, work: ProbeShape) -> int:
    """One compressible layer of one prompt after compression."""
    return slot_bytes(dims, work) + (0 if work.keeps_all else work.slots * POSITION * dims.kv_heads)


def slot_bytes(dims: Dims, work: ProbeShape) -> int:
    """Keys and values of one compressible layer of one prompt after compression, without positions."""
    if work.coding is None:
        return work.slots * dims.slot
    older = max(0, work.slots - work.coding.residual)
    codes = dims.kv_heads * work.coding.nbytes(older, dims.head_dim, dims.head_dim)
    return min(work.slots * dims.slot, codes + (work.slots - older) * dims.slot)


def kept(dims: Dims, work: ProbeShape) -> int:
    """All layers of one prompt after compression; sliding-window layers are cut when the batch is made."""
    return dims.seen * kept_layer(dims, work) + (len(dims.windows) - dims.seen) * full_layer(dims, work)


def prefill(dims: Dims, work: ProbeShape) -> int:
    """Most that is held while the last prompt is prefilled and compressed."""
    earlier = (work.batch - 1) * (kept(dims, work) + dims.vocab * FLOAT32)
    layers, full, seen = len(dims.windows), full_layer(dims, work), observed(dims, work)
    scores, new = score_bytes(dims, work), 0 if work.keeps_all else kept_layer(dims, work)
    if work.per_layer and work.step == work.tokens and not work.keeps_all:
        now = (dims.seen - 1) * new + (layers - dims.seen + 1) * full
        held = now + max(activations(dims, work), attention(dims, work) + seen + new + scores)
        now = kept(dims, work)  # when the logits come
    else:
        now = layers * full + dims.seen * seen
        at_once = 0 if not work.per_layer else attention(dims, work)
        copies = new * (1 if work.per_layer else dims.seen)
        held = now + max(activations(dims, work), at_once + copies + scores)
    return earlier + max(held, now + logits(dims, work))


def activations(dims: Dims, work: ProbeShape) -> int:
    """Most that a layer's forward over a chunk takes, its cache apart."""
    q, e = work.step, dims.number
    rotary_tables = 2 * q * dims.head_dim * e
    norm = q * dims.hidden * (4 * e + 2 * dims.up)
    mlp = q * (4 * dims.hidden + 3 * dims.intermediate) * e
    rotary = q * e * (3 * dims.hidden + (4 * dims.heads + 2 * dims.kv_heads) * dims.head_dim)
    observing = _attended(dims, work) + (column_sums(dims, work) if work.needs.column_sums else 0)
    return rotary_tables + max(norm, mlp, rotary, attention(dims, work), observing)


def attention(dims: Dims, work: ProbeShape) -> int:
    """Most that is held when a layer has attended; a chunk attends to the past and to itself, and mixes them."""
    if work.step == work.tokens:
        return _attended(dims, work)
    mixed = work.step * dims.heads * dims.head_dim * (dims.number + 3 * FLOAT32)
    mask = work.step * work.tokens * (1 + dims.number) if dims.seen < len(dims.windows) else 0
    return _attended(dims, work) + max(mixed, mask)


def column_sums(dims: Dims, work: ProbeShape) -> int:
    """Temporaries of `kernels.column_sums`, its result included: query heads of a group one after another."""
    q, s, h = work.step, work.tokens, dims.kv_heads
    packed = 2 if dims.up else 0  # the kernel lays keys and values out anew for half-precision products
    copies = h * (s + max(3 * q, (1 + packed) * q + s)) * (dims.head_dim + PAD) * dims.number
    return copies + (dims.heads * (q + s) + 2 * h * s) * FLOAT32


def _attended(dims: Dims, work: ProbeShape) -> int:
    """Hidden states, queries, keys, values, the output and every query's softmax denominator."""
    return _asked(dims, work) + work.step * dims.heads * (dims.head_dim * dims.number + FLOAT32)


def _asked(dims: Dims, work: ProbeShape) -> int:
    """Embeddings, the layer's input, its normed copy; queries, keys and values of the chunk."""
    projected = (dims.heads + 2 * dims.kv_heads) * dims.head_dim
    return work.step * (3 * dims.hidden + projected) * dims.number


def score_bytes(dims: Dims, work: ProbeShape) -> int:
    """Temporaries of a layer's scores (weights of the window queries, ordering keys of every token) or of its codes."""
    if work.keeps_all:
        return 0
    coded = 0 if work.coding is None else work.slots * dims.kv_heads * dims.head_dim * (2 * dims.number + 13)
    half = dims.number if dims.up else 0
    window = dims.heads * min(work.needs.window, work.tokens) * work.tokens * (FLOAT32 + half)
    return max(window, 4 * dims.kv_heads * work.tokens * POSITION, coded)


def logits(dims: Dims, work: ProbeShape) -> int:
    """Logits of a prefill, in the model's numbers and as float32, and what log-probabilities take."""
    wanted = min(work.needs.window + 1, work.step) if work.needs.logprobs else 1
    return dims.vocab * wanted * (dims.number + dims.up + (FLOAT32 if work.needs.logprobs else 0))


def rows(dims: Dims, work: ProbeShape) -> int:
    """All layers of all prompts while decoding, with room for the tokens to come, positions included."""
    own = [work.slots if window is None else min(window, work.tokens) for window in dims.windows]
    slots = sum(own) + len(own) * (work.new_tokens - 1)
    smaller = dims.seen * (work.slots * dims.slot - slot_bytes(dims, work))  # 0 where slots are no codes
    return work.batch * (slots * (dims.slot + POSITION * dims.kv_heads) - smaller)


def batching(dims: Dims, work: ProbeShape) -> int:
    """Most that is held while the prompts' caches are copied into a batch, layer by layer."""
    before = work.batch * kept(dims, work)
    one = rows(dims, work) // len(dims.windows)
    last = work.batch * max(kept_layer(dims, work), full_layer(dims, work) if dims.seen < len(dims.windows) else 0)
    return max(before + one, rows(dims, work) + last) + work.batch * dims.vocab * FLOAT32


def decoding(dims: Dims, work: ProbeShape) -> int:
    """Most that is held in a decode step."""
    step = dims.vocab * (dims.number + dims.up) + (4 * dims.hidden + 3 * dims.intermediate) * dims.number
    weights = dims.heads * (work.slots + work.new_tokens) * FLOAT32 * 2 if work.needs.decode_attention else 0
    each = 0 if work.coding is None else work.slots * dims.kv_heads * dims.head_dim * (3 * dims.number + 1)
    return rows(dims, work) + work.batch * (step + dims.vocab * FLOAT32 + each) + weights
