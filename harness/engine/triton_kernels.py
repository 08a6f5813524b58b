"""Attention kernels in Triton, for what neither sdpa nor flash-attention gives.

Whole-prompt attention that tells its denominators under soft caps, sinks and windows; column sums in one pass; one call
for streams of unlike lengths. Imported only where Triton is installed. Under TRITON_INTERPRET=1 they run on a CPU,
which is how they are tested. Shapes as in `methods.base`: queries [B, Hq, Q, D], keys and values [B, H, S, D].
Products of float32 are exact (no TF32); half precision multiplies as it is and sums in float32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.coded_streams import CodedStreams
from harness.engine.triton_parts import (
    LEAST,
    add,
    blocks,
    coded_parts,
    logits_of,
    packed,
    padded,
    power,
    rows_of,
    tell,
)
from methods.views import Form

SPLIT = 128  # slots of a stream that one program reads at least
SPLITS = 64  # programs of a stream at most
NONE = 2**30  # window of a layer without one


# fmt: off
@triton.jit
def _forward(
    q, k, v, out, lse, sinks, qb, qh, qm, kb, kh, kn, vb, vh, vn, ob, oh, om,
    tokens, new, heads, group, scale, cap, window, dim,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
# fmt: on
    first, row = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    entry, head = row // heads, row % heads
    m, d, before = first + tl.arange(0, BM), tl.arange(0, DIM), tokens - new
    asking = rows_of(q + entry * qb + head * qh, m, qm, d, m < new, dim)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    if SINKS:  # a column that takes its share and brings no value
        top, total = tl.zeros([BM], tl.float32) + tl.load(sinks + head).to(tl.float32), total + 1.0
    mixed = tl.zeros([BM, DIM], tl.float32)
    start, end = tl.maximum(before + first - window + 1, 0) // BN * BN, tl.minimum(before + first + BM, tokens)
    for at in range(start, end, BN):
        n = at + tl.arange(0, BN)
        keys = rows_of(k + entry * kb + (head // group) * kh, n, kn, d, n < tokens, dim)
        behind = (before + m)[:, None] - n[None, :]
        seen = (behind >= 0) & (behind < window)
        logits = tl.where(seen, logits_of(asking, keys, scale, cap, CAPPED), float("-inf"))
        values = rows_of(v + entry * vb + (head // group) * vh, n, vn, d, n < tokens, dim)
        top, total, mixed = add(logits, values, top, total, mixed)
    told = (m < new)[:, None] & (d < dim)[None, :]
    at_out = out + entry * ob + head * oh + m[:, None] * om + d[None, :]
    tl.store(at_out, (mixed / total[:, None]).to(out.dtype.element_ty), told)
    tl.store(lse + row * new + m, top + tl.log(total), m < new)


# fmt: off
@triton.jit
def _sums(
    q, k, lse, out, qb, qh, qm, kb, kh, kn, tokens, new, heads, group, scale, cap, dim,
    CAPPED: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
# fmt: on
    at, row = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    entry, head, before = row // heads, row % heads, tokens - new
    n, d = at + tl.arange(0, BN), tl.arange(0, DIM)
    keys = rows_of(k + entry * kb + (head // group) * kh, n, kn, d, n < tokens, dim)
    found = tl.zeros([BN], tl.float32)
    for first in range(tl.maximum(at - before, 0) // BM * BM, new, BM):
        m = first + tl.arange(0, BM)
        asking = rows_of(q + entry * qb + head * qh, m, qm, d, m < new, dim)
        whole = tl.load(lse + row * new + m, m < new, float("inf"))
        weights = tl.exp(logits_of(asking, keys, scale, cap, CAPPED) - whole[:, None])
        found += tl.sum(tl.where((before + m)[:, None] >= n[None, :], weights, 0.0), 0)
    tl.store(out + row * tokens + n, found, n < tokens)


# fmt: off
@triton.jit
def _ragged(
    q, k, v, out, lse, starts, lengths, qs, qg, kn, vn, splits, most, group, scale, cap, dim,
    CAPPED: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):
# fmt: on
    stream, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(starts + stream).to(tl.int64), tl.load(lengths + stream)
    share = tl.cdiv(tl.cdiv(length, splits), BN) * BN
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    asking = rows_of(q + stream * qs, g, qg, d, g < group, dim)
    top, total = tl.full([GROUP], float("-inf"), tl.float32), tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, DIM], tl.float32)
    end = tl.minimum(length, (split + 1) * share)
    for at in range(split * share, end, BN):
        n = at + tl.arange(0, BN)
        keys = rows_of(k + start * kn, n, kn, d, n < end, dim)
        logits = tl.where((n < end)[None, :], logits_of(asking, keys, scale, cap, CAPPED), float("-inf"))
        top, total, mixed = add(logits, rows_of(v + start * vn, n, vn, d, n < end, dim), top, total, mixed)
    tell(out, lse, (stream * most + split) * group + g, g < group, d, dim, top, total, mixed)


@triton.jit
def _join(parts, lse, sinks, out, splits, group, dim, SINKS: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr):
    """A stream's attention of its parts by their denominators."""
    stream, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, d = tl.arange(0, MOST), tl.arange(0, DIM)
    row = (stream * splits + split) * group + g
    own = tl.load(lse + row, split < splits, float("-inf"))
    top = tl.max(own, 0)
    if SINKS:
        sink = tl.load(sinks + stream * group + g).to(tl.float32)
        top = tl.maximum(top, sink)
    share = tl.exp(own - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(share, 0)
    if SINKS:
        total += tl.exp(sink - top)
    mixed = tl.sum(rows_of(parts, row, dim, d, own != float("-inf"), dim) * share[:, None], 0)
    at = out + (stream * group + g) * dim + d
    tl.store(at, (mixed / tl.where(total == 0, 1.0, total)).to(out.dtype.element_ty), d < dim)


def causal_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q of S tokens: [B, Hq, Q, D], and log denominators [B, Hq, Q] float32, sinks in."""
    (batch, heads, new, dim), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    q, k, v = (packed(x) for x in (queries, keys, values))
    out = torch.empty(batch, heads, new, dim, dtype=queries.dtype, device=queries.device)
    lse = torch.empty(batch, heads, new, device=queries.device)
    rows, columns = blocks(dim, queries.dtype)
    _forward[(triton.cdiv(new, rows), batch * heads)](
        *(q, k, v, out, lse, lse if form.sinks is None else form.sinks.contiguous()),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *(tokens, new, heads, heads // kv_heads, form.scaling, form.softcap or 1.0, form.window or NONE, dim),
        **{"CAPPED": form.softcap is not None, "SINKS": form.sinks is not None},
        **{"DIM": padded(dim), "BM": rows, "BN": columns},
    )
    return out, lse


def column_sums(queries: Tensor, keys: Tensor, lse: Tensor, form: Form) -> Tensor:
    """Attention each of S tokens receives from the last Q of them: [B, H, G, S] float32, in one pass over the queries.

    lse: [B, Hq, Q], of `causal_forward`.
    """
    (batch, heads, new, dim), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    q, k = packed(queries), packed(keys)
    out = torch.empty(batch, heads, tokens, device=queries.device)
    rows, columns = blocks(dim, queries.dtype)
    _sums[(triton.cdiv(tokens, columns), batch * heads)](
        *(q, k, lse.contiguous(), out, *q.stride()[:3], *k.stride()[:3]),
        *(tokens, new, heads, heads // kv_heads, form.scaling, form.softcap or 1.0, dim),
        **{"CAPPED": form.softcap is not None, "DIM": padded(dim), "BM": rows, "BN": columns},
    )
    return out.view(batch, kv_heads, heads // kv_heads, tokens)


def ragged_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    form: Form,
    *,
    longest: int,
    new: int = 1,
    coded: Sequence[CodedStreams] = (),
) -> Tensor:
    """Attention of one query group per stream over its own slots: [N, G, D]. Nothing of it waits for the device.

    A launch for parts of streams, one for those of each kind of codes, and one for their sum; how many parts there are
    follows `longest`.

    queries: [N, G, D]. keys, values: [slots, D], all streams in one buffer. starts, lengths: [N] integers of that
    device, the first slot of a stream and how many there are; a stream of none gives zeros. form: its sinks are [N, G].
    longest: at least every length that will come, which fixes the launch, so that a captured step may be replayed as
    streams grow. coded: slots before those, as codes; `new` queries after each other ask the same ones.
    """
    count, group, dim = queries.shape
    shares = [min(SPLITS, triton.cdiv(slots, SPLIT)) for slots in (longest, *(max(own.counts) for own in coded))]
    splits, most, columns = shares[0], sum(shares), blocks(dim, queries.dtype)[1]
    q = queries.contiguous()
    parts = torch.empty(count, most, group, dim, device=q.device)
    lse = torch.full((count, most, group), -math.inf, device=q.device)
    for own, first, share in zip(coded, accumulate(shares), shares[1:], strict=False):
        coded_parts(q, own, parts, lse, form, new=new, first=first, splits=share)
    _ragged[(count, splits)](
        *(q, keys, values, parts, lse, starts, lengths, q.stride(0), q.stride(1), keys.stride(0), values.stride(0)),
        *(splits, most, group, form.scaling, form.softcap or 1.0, dim),
        **{"CAPPED": form.softcap is not None, "DIM": padded(dim), "GROUP": max(LEAST, power(group)), "BN": columns},
    )
    out = torch.empty_like(q)
    _join[(count, group)](
        *(parts, lse, lse if form.sinks is None else form.sinks.contiguous(), out, most, group, dim),
        **{"SINKS": form.sinks is not None, "DIM": padded(dim), "MOST": power(most)},
    )
    return out
