"""What our Triton kernels share, and the one that reads codes. On Triton see `harness.engine.triton_kernels`.

Codes are those of `methods.codes`: a number is its group's zero and a code's worth of its scale.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.coded_streams import CodedStreams
from methods.views import Form

LEAST = 16  # rows and columns that a product of tensor cores takes
WIDE = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter multiplies no bfloat16


@triton.jit
def rows_of(base, at, stride, columns, wanted, dim):
    """Rows `at` of a matrix: [rows, columns], 0 where they are not wanted."""
    return tl.load(base + at[:, None] * stride + columns[None, :], wanted[:, None] & (columns < dim)[None, :], 0.0)


@triton.jit
def product(a, b):
    """The product a [M, K] @ b [K, N] in float32."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def logits_of(queries, keys, scale, cap, CAPPED: tl.constexpr):
    """Logits [M, N] float32 of queries [M, D] and keys [N, D]."""
    logits = product(queries, tl.trans(keys)) * scale
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # the tanh of a cap
    return logits


@triton.jit
def add(logits, values, top, total, mixed):
    """One more block of a softmax: its highest logit [M], denominator [M] and numerator [M, D] so far."""
    higher = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights, keep = tl.exp(logits - base[:, None]), tl.exp(top - base)
    mixed = mixed * keep[:, None] + product(weights.to(values.dtype), values)
    return higher, total * keep + tl.sum(weights, 1), mixed


@triton.jit
def tell(out, lse, row, wanted, d, dim, top, total, mixed):
    """Store a part of a stream: its attention and log denominator, which is minus infinity for one of no slots."""
    told = wanted[:, None] & (d < dim)[None, :]
    tl.store(out + row[:, None] * dim + d[None, :], mixed / tl.where(total == 0, 1.0, total)[:, None], told)
    tl.store(lse + row, tl.where(total == 0, float("-inf"), top + tl.log(total)), wanted)


@triton.jit
def _decoded(codes, at, scale, zero, place, d, wanted, dim, BITS: tl.constexpr):
    """Numbers [rows, dim] of codes in rows `at`, whose scales lie at `place`; 0 where they are not wanted."""
    width, there = dim * BITS // 8, wanted[:, None] & (d < dim)[None, :]
    packed = tl.load(codes + at[:, None] * width + (d % width)[None, :], there, 0).to(tl.int32)
    code = (packed >> (d // width * BITS)[None, :]) & (2**BITS - 1)
    return code * tl.load(scale + place, there, 0.0).to(tl.float32) + tl.load(zero + place, there, 0.0).to(tl.float32)


# fmt: off
@triton.jit
def _coded(
    q, k, ks, kz, v, vs, vz, out, lse, index, count, new, qs, qg, first, splits, own, group, scale, cap, dim,
    CAPPED: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    BITS: tl.constexpr, SPAN: tl.constexpr, CHANNELS: tl.constexpr,
):
# fmt: on
    entry, split = tl.program_id(0) // new, tl.program_id(1)
    stream = tl.load(index + entry).to(tl.int64) * new + tl.program_id(0) % new
    start, groups = (tl.load(index + count + entry).to(tl.int64), tl.load(index + 2 * count + entry).to(tl.int64))
    length = tl.load(index + 3 * count + entry)
    share = tl.cdiv(tl.cdiv(length, own), BN) * BN
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    asking = rows_of(q + stream * qs, g, qg, d, g < group, dim)
    top, total = tl.full([GROUP], float("-inf"), tl.float32), tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, DIM], tl.float32)
    end = tl.minimum(length, (split + 1) * share)
    for at in range(split * share, end, BN):
        n = at + tl.arange(0, BN)
        place = (groups + n // SPAN)[:, None] * dim + d[None, :]
        keys = _decoded(k, start + n, ks, kz, place, d, n < end, dim, BITS).to(asking.dtype)
        logits = tl.where((n < end)[None, :], logits_of(asking, keys, scale, cap, CAPPED), float("-inf"))
        place = (start + n)[:, None] * (dim // CHANNELS) + (d // CHANNELS)[None, :]
        values = _decoded(v, start + n, vs, vz, place, d, n < end, dim, BITS).to(asking.dtype)
        top, total, mixed = add(logits, values, top, total, mixed)
    tell(out, lse, (stream * splits + first + split) * group + g, g < group, d, dim, top, total, mixed)


def coded_parts(
    q: Tensor, coded: CodedStreams, parts: Tensor, lse: Tensor, form: Form, *, new: int, first: int, splits: int
) -> None:
    """Put the attention of queries [N * new, G, D] over codes into parts `first` to `first + splits` of their streams.

    parts: [N * new, P, G, D]; lse: [N * new, P, G], log denominators.
    """
    keys, key_scale, key_zero, values, value_scale, value_zero = coded.tensors
    (_, group, dim), count, coding = q.shape, len(coded.streams), coded.coding
    _coded[(count * new, splits)](
        *(q, keys, key_scale, key_zero, values, value_scale, value_zero, parts, lse, coded.index, count, new),
        *(q.stride(0), q.stride(1), first, lse.shape[1], splits, group, form.scaling, form.softcap or 1.0, dim),
        **{"CAPPED": form.softcap is not None, "DIM": padded(dim), "GROUP": max(LEAST, power(group))},
        **{"BN": blocks(dim, q.dtype)[1], "BITS": coding.bits, "SPAN": coding.group, "CHANNELS": coding.channels(dim)},
    )


def packed(x: Tensor) -> Tensor:
    """The tensor with its last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power(n: int) -> int:
    """The power of two that is n or next to it."""
    return 1 << (n - 1).bit_length()


def padded(dim: int) -> int:
    return max(LEAST, power(dim))


def blocks(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys of a block: what fits into the shared memory of a multiprocessor."""
    side = 64 >> (dtype == torch.float32) >> (dim > 128)
    return side, side
