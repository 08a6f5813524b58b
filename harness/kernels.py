"""Attention kernels: PyTorch sdpa everywhere, flash-attention 2 for half-precision prefill on CUDA when it is there.

Shapes as in `methods.base`: queries [B, Hq, Q, D], keys and values [B, H, S, D], Hq = H * G.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa


def prefill_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel that prefill uses: `flash_attention_2` or `sdpa`."""
    half = dtype in (torch.float16, torch.bfloat16)
    flash = device.type == "cuda" and half and find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int | None) -> Tensor:
    """Causal attention of the last Q of S tokens over all of them; `window` limits how far back. [B, Hq, Q, D]."""
    if prefill_kernel(queries.device, queries.dtype) == "flash_attention_2":
        from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

        span = (-1, -1) if window is None else (window - 1, 0)
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        out: Tensor = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, window_size=span)
        return out.transpose(1, 2)
    tokens, new = keys.shape[2], queries.shape[2]
    if new == tokens and (window is None or window >= tokens):
        return sdpa(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
    at = torch.arange(tokens, device=keys.device)
    asked = at[tokens - new :, None]
    mask = at[None, :] <= asked
    if window is not None:
        mask &= at[None, :] > asked - window
    return sdpa(queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)


def slot_attention(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention over cached slots; the query group is folded into the query length, so nothing is repeated.

    mask: [B, H, Q, S] bool, True = attend, or None when every query sees every slot.
    """
    batch, heads, slots, dim = keys.shape
    count = queries.shape[2]
    folded = queries.reshape(batch, heads, -1, dim)  # [B, H, G * Q, D]
    if mask is not None and count > 1:
        group = folded.shape[2] // count
        mask = mask.unsqueeze(2).expand(batch, heads, group, count, slots).reshape(batch, heads, -1, slots)
    out = sdpa(folded, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(batch, -1, count, values.shape[-1])


def slot_weights(queries: Tensor, keys: Tensor, *, mask: Tensor, scaling: float) -> Tensor:
    """Softmax weights of one query per row over cached slots: [B, H, G, S] float32. mask: [B, H, 1, S] bool."""
    batch, heads, _, dim = keys.shape
    logits = (queries.reshape(batch, heads, -1, dim) @ keys.transpose(2, 3)).float() * scaling
    return logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def column_sums(queries: Tensor, keys: Tensor, *, scaling: float, block: int = 64) -> Tensor:
    """Attention each of S tokens receives from the last Q of them: [B, H, G, S] float32.

    Streamed over blocks of queries: the largest temporary is [B, Hq, block, S], never Q x S.
    """
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
