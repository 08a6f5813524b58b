"""Attention kernels: PyTorch sdpa everywhere, flash-attention 2 for half-precision prefill on CUDA when it is there.

Shapes as in `methods.base`: queries [B, Hq, Q, D], keys and values [B, H, S, D], Hq = H * G.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from harness.engine.layer_cache import visible
from methods.views import wide

LSE_PARTS = 3  # bfloat16 has 8 bits: three of them hold a float32
PAD = 8  # columns added to the head dimension, so that it stays a multiple of 8


def prefill_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel that prefill uses: `flash_attention_2` or `sdpa`."""
    half = dtype in (torch.float16, torch.bfloat16)
    flash = device.type == "cuda" and half and find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last Q of S tokens over all of them; `window` limits how far back.

    Returns:
        [B, Hq, Q, D], and the logarithm of every query's softmax denominator [B, Hq, Q] float32 for `column_sums`, or
        None where the kernel does not tell it.
    """
    tokens, new = keys.shape[2], queries.shape[2]
    whole = window is None or window >= tokens
    if whole and keys.device.type == "cpu" and keys.shape[-1] == values.shape[-1]:  # sdpa's own kernel tells them
        return _causal_lse(queries, keys, values, scaling=scaling)
    if prefill_kernel(queries.device, queries.dtype) == "flash_attention_2":
        from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

        span = (-1, -1) if window is None else (window - 1, 0)
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        out: Tensor = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, window_size=span)
        return out.transpose(1, 2), None
    if new == tokens and whole:
        return sdpa(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True), None
    at = torch.arange(tokens, device=keys.device)
    mask = visible(at[None, None], at[tokens - new :], window)
    return sdpa(queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True), None


def slot_attention(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention over cached slots; the query group is folded into the query length, so nothing is repeated.

    mask: [B, H, Q, S] bool, True = attend, or None when every query sees every slot.
    """
    (batch, heads, _, dim), count = keys.shape, queries.shape[2]
    folded = queries.reshape(batch, heads, -1, dim)  # [B, H, G * Q, D]
    if mask is not None and count > 1:
        mask = mask.repeat(1, 1, folded.shape[2] // count, 1)
    out = sdpa(folded, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(batch, -1, count, values.shape[-1])


def slot_weights(queries: Tensor, keys: Tensor, *, mask: Tensor, scaling: float) -> Tensor:
    """Softmax weights of one query per row over cached slots: [B, H, G, S] float32. mask: [B, H, 1, S] bool."""
    batch, heads, _, dim = keys.shape
    logits = (wide(queries).reshape(batch, heads, -1, dim) @ wide(keys).transpose(2, 3)).float() * scaling
    return logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def column_sums(queries: Tensor, keys: Tensor, lse: Tensor | None, *, scaling: float) -> Tensor:
    """Attention each of S tokens receives from the last Q of them: [B, H, G, S] float32; never Q x S numbers at once.

    With `lse` of `causal_attention` a column's sum over its queries, sum_q exp(logit_qk - lse_q), is itself a softmax
    denominator: that of attention in which keys ask queries. So the fused kernel computes it, at the price of one more
    attention. The lse travels as columns of the queries which the keys multiply by 1.
    """
    queries, keys = wide(queries), wide(keys)
    if lse is None:
        return _streamed_sums(queries, keys, scaling=scaling)
    (batch, heads, tokens, dim), new = keys.shape, queries.shape[2]
    before = tokens - new
    grouped, shift = queries.view(batch, heads, -1, new, dim), (lse / -scaling).view(batch, heads, -1, new)
    sums = torch.empty(*grouped.shape[:3], tokens, device=keys.device)
    asked = _widened(keys, [torch.ones_like(keys[..., 0])] * LSE_PARTS)
    asked = torch.cat([asked[:, :, :before], asked[:, :, before:].flip(2)], dim=2)  # causal: the last key asks first
    for member in range(grouped.shape[2]):
        asking = _widened(grouped[:, :, member], _parts(shift[:, :, member], queries.dtype)).flip(2)
        found = _flash(asked[:, :, before:], asking, asking, causal=True, scaling=scaling)[1]
        sums[:, :, member, before:] = found.flip(2)
        if before:
            sums[:, :, member, :before] = _flash(asked[:, :, :before], asking, asking, causal=False, scaling=scaling)[1]
    return sums.exp_()


def _streamed_sums(queries: Tensor, keys: Tensor, *, scaling: float, block: int = 64) -> Tensor:
    """`column_sums` without help: block after block of queries, the largest temporary is [B, Hq, block, S]."""
    batch, heads, tokens, dim = keys.shape
    new = queries.shape[2]
    grouped = queries.view(batch, heads, -1, new, dim)
    sums = torch.zeros((*grouped.shape[:3], tokens), device=keys.device)
    future = torch.full((block, block), float("-inf"), device=keys.device).triu_(1)
    before = tokens - new
    for start in range(before, tokens, block):
        end = min(start + block, tokens)
        size = end - start
        folded = grouped[:, :, :, start - before : end - before].reshape(batch, heads, -1, dim)  # [B, H, G * size, D]
        logits = (folded @ keys[:, :, :end].transpose(2, 3)).float().mul_(scaling)
        logits = logits.view(batch, heads, -1, size, end)
        logits[..., start:end].add_(future[:size, :size])
        sums[..., :end] += logits.softmax(dim=-1).sum(dim=3)
    return sums


def _causal_lse(queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """`causal_attention` by the fused kernel: the square of the last Q tokens, and all before them unmasked."""
    (batch, heads, tokens, _), new = keys.shape, queries.shape[2]
    group, before = queries.shape[1] // heads, tokens - new
    asked = queries.view(batch, heads, group, new, -1).transpose(1, 2).flatten(0, 1)  # [B * G, H, Q, D]; B = 1: no copy
    k, v = (x.unsqueeze(1).expand(-1, group, -1, -1, -1).flatten(0, 1) for x in (keys, values))
    out, lse = _flash(asked, k[:, :, before:], v[:, :, before:], causal=True, scaling=scaling)
    if before:
        past, past_lse = _flash(asked, k[:, :, :before], v[:, :, :before], causal=False, scaling=scaling)
        both = torch.logaddexp(lse, past_lse)
        mixed = out * (lse - both).exp_().unsqueeze(-1) + past * (past_lse - both).exp_().unsqueeze(-1)
        out, lse = mixed.to(out.dtype), both
    out = out.view(batch, group, heads, new, -1).permute(0, 3, 2, 1, 4).reshape(batch, new, heads * group, -1)
    return out.transpose(1, 2), lse.view(batch, group, heads, new).transpose(1, 2).reshape(batch, -1, new)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention [B, H, Q, D] and the logarithm of its denominators [B, H, Q] float32."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, scale=scaling
    )
    return found


def _widened(x: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """Tensor x [..., D] with columns [...] beside it and zeros up to D + PAD."""
    more = x.new_zeros(*x.shape[:-1], PAD)
    for i, column in enumerate(columns):
        more[..., i] = column
    return torch.cat([x, more], dim=-1)


def _parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of `dtype` that sum to the float32 x."""
    parts = []
    for _ in range(LSE_PARTS):
        parts.append(x.to(dtype))
        x = x - parts[-1]
    return parts
