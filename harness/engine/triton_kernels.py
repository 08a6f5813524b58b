"""Attention kernels in Triton, for what neither sdpa nor flash-attention gives.

Whole-prompt attention that tells its denominators under soft caps, sinks and windows; column sums in one pass; one call
for streams of unlike lengths. Imported only where Triton is installed. Under TRITON_INTERPRET=1 they run on a CPU,
which is how they are tested. Shapes as in `methods.base`: queries [B, Hq, Q, D], keys and values [B, H, S, D].
Products of float32 are exact (no TF32); half precision multiplies as it is and sums in float32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from methods.views import Form

SPLIT = 512  # slots of a stream that one program reads at least
SPLITS = 64  # programs of a stream at most
LEAST = 16  # rows and columns that a product of tensor cores takes
NONE = 2**30  # window of a layer without one
WIDE = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter multiplies no bfloat16


@triton.jit
def _rows(base, at, stride, columns, wanted, dim):
    """Rows `at` of a matrix: [rows, columns], 0 where they are not wanted."""
    return tl.load(base + at[:, None] * stride + columns[None, :], wanted[:, None] & (columns < dim)[None, :], 0.0)


@triton.jit
def _product(a, b):
    """The product a [M, K] @ b [K, N] in float32."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _logits(queries, keys, scale, cap, CAPPED: tl.constexpr):  # noqa: N803
    """Logits [M, N] float32 of queries [M, D] and keys [N, D]."""
    logits = _product(queries, tl.trans(keys)) * scale
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # the tanh of a cap
    return logits


@triton.jit
def _add(logits, values, top, total, mixed):
    """One more block of a softmax: its highest logit [M], denominator [M] and numerator [M, D] so far."""
    higher = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights, keep = tl.exp(logits - base[:, None]), tl.exp(top - base)
    mixed = mixed * keep[:, None] + _product(weights.to(values.dtype), values)
    return higher, total * keep + tl.sum(weights, 1), mixed


# fmt: off
@triton.jit
def _forward(
    q, k, v, out, lse, sinks, qb, qh, qm, kb, kh, kn, vb, vh, vn, ob, oh, om,
    tokens, new, heads, group, scale, cap, window, dim,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,  # noqa: N803
):
# fmt: on
    first, row = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    entry, head = row // heads, row % heads
    m, d, before = first + tl.arange(0, BM), tl.arange(0, DIM), tokens - new
    asking = _rows(q + entry * qb + head * qh, m, qm, d, m < new, dim)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    if SINKS:  # a column that takes its share and brings no value
        top, total = tl.zeros([BM], tl.float32) + tl.load(sinks + head).to(tl.float32), total + 1.0
    mixed = tl.zeros([BM, DIM], tl.float32)
    start, end = tl.maximum(before + first - window + 1, 0) // BN * BN, tl.minimum(before + first + BM, tokens)
    for at in range(start, end, BN):
        n = at + tl.arange(0, BN)
        keys = _rows(k + entry * kb + (head // group) * kh, n, kn, d, n < tokens, dim)
        behind = (before + m)[:, None] - n[None, :]
        seen = (behind >= 0) & (behind < window)
        logits = tl.where(seen, _logits(asking, keys, scale, cap, CAPPED), float("-inf"))
        values = _rows(v + entry * vb + (head // group) * vh, n, vn, d, n < tokens, dim)
        top, total, mixed = _add(logits, values, top, total, mixed)
    told = (m < new)[:, None] & (d < dim)[None, :]
    at_out = out + entry * ob + head * oh + m[:, None] * om + d[None, :]
    tl.store(at_out, (mixed / total[:, None]).to(out.dtype.element_ty), told)
    tl.store(lse + row * new + m, top + tl.log(total), m < new)


# fmt: off
@triton.jit
def _sums(
    q, k, lse, out, qb, qh, qm, kb, kh, kn, tokens, new, heads, group, scale, cap, dim,
    CAPPED: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,  # noqa: N803
):
# fmt: on
    at, row = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    entry, head, before = row // heads, row % heads, tokens - new
    n, d = at + tl.arange(0, BN), tl.arange(0, DIM)
    keys = _rows(k + entry * kb + (head // group) * kh, n, kn, d, n < tokens, dim)
    found = tl.zeros([BN], tl.float32)
    for first in range(tl.maximum(at - before, 0) // BM * BM, new, BM):
        m = first + tl.arange(0, BM)
        asking = _rows(q + entry * qb + head * qh, m, qm, d, m < new, dim)
        whole = tl.load(lse + row * new + m, m < new, float("inf"))
        weights = tl.exp(_logits(asking, keys, scale, cap, CAPPED) - whole[:, None])
        found += tl.sum(tl.where((before + m)[:, None] >= n[None, :], weights, 0.0), 0)
    tl.store(out + row * tokens + n, found, n < tokens)


# fmt: off
@triton.jit
def _ragged(
    q, k, v, out, lse, starts, lengths, qs, qg, kn, vn, splits, group, scale, cap, dim,
    CAPPED: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,  # noqa: N803
):
# fmt: on
    stream, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(starts + stream).to(tl.int64), tl.load(lengths + stream)
    share = tl.cdiv(tl.cdiv(length, splits), BN) * BN
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    asking = _rows(q + stream * qs, g, qg, d, g < group, dim)
    top, total = tl.full([GROUP], float("-inf"), tl.float32), tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, DIM], tl.float32)
    end = tl.minimum(length, (split + 1) * share)
    for at in range(split * share, end, BN):
        n = at + tl.arange(0, BN)
        keys = _rows(k + start * kn, n, kn, d, n < end, dim)
        logits = tl.where((n < end)[None, :], _logits(asking, keys, scale, cap, CAPPED), float("-inf"))
        top, total, mixed = _add(logits, _rows(v + start * vn, n, vn, d, n < end, dim), top, total, mixed)
    row = (stream * splits + split) * group + g
    told = (g < group)[:, None] & (d < dim)[None, :]
    tl.store(out + row[:, None] * dim + d[None, :], mixed / tl.where(total > 0, total, 1.0)[:, None], told)
    tl.store(lse + row, tl.where(total > 0, top + tl.log(total), float("-inf")), g < group)


def causal_forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q of S tokens: [B, Hq, Q, D], and log denominators [B, Hq, Q] float32, sinks in."""
    (batch, heads, new, dim), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    q, k, v = (_packed(x) for x in (queries, keys, values))
    out = torch.empty(batch, heads, new, dim, dtype=queries.dtype, device=queries.device)
    lse = torch.empty(batch, heads, new, device=queries.device)
    rows, columns = _blocks(dim, queries.dtype)
    _forward[(triton.cdiv(new, rows), batch * heads)](
        *(q, k, v, out, lse, lse if form.sinks is None else form.sinks.contiguous()),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *(tokens, new, heads, heads // kv_heads, form.scaling, form.softcap or 1.0, form.window or NONE, dim),
        **{"CAPPED": form.softcap is not None, "SINKS": form.sinks is not None},
        **{"DIM": _dim(dim), "BM": rows, "BN": columns},
    )
    return out, lse


def column_sums(queries: Tensor, keys: Tensor, lse: Tensor, form: Form) -> Tensor:
    """Attention each of S tokens receives from the last Q of them: [B, H, G, S] float32, in one pass over the queries.

    lse: [B, Hq, Q], of `causal_forward`.
    """
    (batch, heads, new, dim), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    q, k = _packed(queries), _packed(keys)
    out = torch.empty(batch, heads, tokens, device=queries.device)
    rows, columns = _blocks(dim, queries.dtype)
    _sums[(triton.cdiv(tokens, columns), batch * heads)](
        *(q, k, lse.contiguous(), out, *q.stride()[:3], *k.stride()[:3]),
        *(tokens, new, heads, heads // kv_heads, form.scaling, form.softcap or 1.0, dim),
        **{"CAPPED": form.softcap is not None, "DIM": _dim(dim), "BM": rows, "BN": columns},
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
) -> Tensor:
    """Attention of one query group per stream over its own slots: [N, G, D]. Nothing of it waits for the device.

    queries: [N, G, D]. keys, values: [slots, D], all streams in one buffer. starts, lengths: [N] integers of that
    device, the first slot of a stream and how many there are; a stream of none gives zeros. form: its sinks are [N, G].
    longest: at least every length that will come, which fixes the launch, so that a captured step may be replayed as
    streams grow.
    """
    (count, group, dim), splits = queries.shape, min(SPLITS, triton.cdiv(longest, SPLIT))
    q = queries.contiguous()
    parts = torch.empty(count, splits, group, dim, device=q.device)
    lse = torch.empty(count, splits, group, device=q.device)
    _ragged[(count, splits)](
        *(q, keys, values, parts, lse, starts, lengths, q.stride(0), q.stride(1), keys.stride(0), values.stride(0)),
        *(splits, group, form.scaling, form.softcap or 1.0, dim),
        **{"CAPPED": form.softcap is not None, "DIM": _dim(dim), "GROUP": max(LEAST, _power(group)), "BN": 64},
    )
    if form.sinks is not None:
        lse = torch.cat([lse, form.sinks.unsqueeze(1).float()], dim=1)
    share = torch.nan_to_num(lse.softmax(dim=1))[:, :splits]  # a stream of no slots has no share anywhere
    return (parts * share.unsqueeze(-1)).sum(dim=1).to(queries.dtype)


def _packed(x: Tensor) -> Tensor:
    """The tensor with its last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(n: int) -> int:
    """The power of two that is n or next to it."""
    return 1 << (n - 1).bit_length()


def _dim(dim: int) -> int:
    return max(LEAST, _power(dim))


def _blocks(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys of a block: what fits into the shared memory of a multiprocessor."""
    if dtype == torch.float32 or dim > 128:
        return 32, 32
    return 64, 64
