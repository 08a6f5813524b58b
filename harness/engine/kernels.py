"""Attention kernels: what each device computes attention by, and its weights and their sums.

On a CPU by PyTorch's sdpa and its fused kernel, on a GPU by `harness.engine.gpu`; in blocks of queries where a form has
no kernel, and never by n x n numbers at once.

Shapes as in `methods.base`: queries [B, Hq, Q, D], keys and values [B, H, S, D], Hq = H * G.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from harness.engine import gpu
from harness.engine.layer_cache import visible
from methods.views import Form, wide

BLOCK, TILE, GPU_BLOCK = 64, 1024, 512  # queries, and keys, whose weights a CPU computes at once; queries of a GPU


def prefill_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel that prefill uses where a layer has no soft cap or window."""
    if not gpu.is_gpu(device):
        return "sdpa"
    if dtype in gpu.HALF:
        return "flash_attention_2"
    return "triton" if gpu.fused(device) else "blocks"


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last Q of S tokens over all of them.

    Returns:
        [B, Hq, Q, D], and the logarithm of every query's softmax denominator [B, Hq, Q] float32, its sink's share in
        it, for `column_sums`, or None where the kernel does not tell it.
    """
    tokens, new, window = keys.shape[2], queries.shape[2], form.window
    if window is not None and window >= tokens:
        form, window = replace(form, window=None), None
    alike = keys.shape[-1] == values.shape[-1]
    if gpu.is_gpu(keys.device):
        return _on_gpu(queries, keys, values, form)
    if form.softcap is None and window is None and alike:  # sdpa's own kernel tells them
        return _with_sinks(*_causal_lse(queries, keys, values, scaling=form.scaling), form.sinks)
    if form.softcap is not None or form.sinks is not None:
        return _streamed_attention(queries, keys, values, form)
    if new == tokens and window is None:
        return sdpa(queries, keys, values, is_causal=True, scale=form.scaling, enable_gqa=True), None
    at = torch.arange(tokens, device=keys.device)
    mask = visible(at[None, None], at[tokens - new :], window)
    return sdpa(queries, keys, values, attn_mask=mask, scale=form.scaling, enable_gqa=True), None


def _on_gpu(queries: Tensor, keys: Tensor, values: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """`causal_attention` on a GPU. sdpa is never given a mask: with grouped heads it would fall to n x n numbers."""
    if gpu.flash_takes(queries, values, form):
        return _with_sinks(*gpu.flash(queries, keys, values, form), form.sinks)
    if gpu.fused(keys.device) and keys.shape[-1] == values.shape[-1]:
        found: tuple[Tensor, Tensor] = _own().causal_forward(queries, keys, values, form)
        return found
    return _streamed_attention(queries, keys, values, form)


def _own() -> ModuleType:
    """Our own kernels, imported where they are wanted: Triton need not be there."""
    from harness.engine import triton_kernels

    return triton_kernels


def slot_attention(queries: Tensor, keys: Tensor, values: Tensor, form: Form, *, mask: Tensor | None) -> Tensor:
    """Attention over cached slots; the query group is folded into the query length, so nothing is repeated.

    mask: [B, H, Q, S] bool, True = attend, or [B, H, G, Q, S] where the queries of a group differ, or None when every
    query sees every slot. The form's window is the mask's.
    """
    (batch, heads, _, dim), count = keys.shape, queries.shape[2]
    if form.softcap is not None or form.sinks is not None:
        weights = _weights(queries, keys, form, mask=mask).to(values.dtype)  # [B, H, G, Q, S]
        out = weights.flatten(2, 3) @ values
    else:
        folded = queries.reshape(batch, heads, -1, dim)  # [B, H, G * Q, D]
        if mask is not None and mask.dim() > 4:
            mask = mask.flatten(2, 3)
        elif mask is not None and count > 1:
            mask = mask.repeat(1, 1, folded.shape[2] // count, 1)
        out = sdpa(folded, keys, values, attn_mask=mask, scale=form.scaling)
    return out.reshape(batch, -1, count, values.shape[-1])


def slot_weights(queries: Tensor, keys: Tensor, form: Form, *, mask: Tensor) -> Tensor:
    """Softmax weights of one query per row over cached slots: [B, H, G, S] float32. mask: [B, H, 1, S] bool."""
    return _weights(queries, keys, form, mask=mask).squeeze(3)


def weighed_attention(
    queries: Tensor, keys: Tensor, values: Tensor, form: Form, *, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """`slot_attention` of one query per row, and its `slot_weights`; a GPU makes both of one product."""
    weights = slot_weights(queries, keys, form, mask=mask)
    if gpu.is_gpu(keys.device):
        out = (weights.to(values.dtype) @ values).view(queries.shape[0], -1, 1, values.shape[-1])
    else:
        out = slot_attention(queries, keys, values, form, mask=mask)
    return out, weights


def _weights(queries: Tensor, keys: Tensor, form: Form, *, mask: Tensor | None) -> Tensor:
    """Softmax weights of queries over slots: [B, H, G, Q, S] float32. mask: bool, so, or [B, H, Q, S], or [Q, S]."""
    (batch, heads, slots, dim), count = keys.shape, queries.shape[2]
    products = wide(queries).reshape(batch, heads, -1, dim) @ wide(keys).transpose(2, 3)
    logits = form.capped(products.float().mul_(form.scaling)).view(batch, heads, -1, count, slots)
    if mask is not None:
        logits.masked_fill_(~(mask.unsqueeze(2) if mask.dim() == 4 else mask), float("-inf"))
    return form.softmax(logits)


def column_sums(queries: Tensor, keys: Tensor, lse: Tensor | None, form: Form) -> Tensor:
    """Attention each of S tokens receives from the last Q of them: [B, H, G, S] float32; never Q x S numbers at once.

    With `lse` of `causal_attention` that is sum_q exp(logit_qk - lse_q) of each column: products, but no softmax. On a
    GPU our own kernel sums.
    """
    if lse is not None and gpu.fused(keys.device):
        found: Tensor = _own().column_sums(queries, keys, lse, form)
        return found
    if lse is None or form.softcap is not None or gpu.is_gpu(keys.device):
        return _streamed_sums(queries, keys, form)
    return _told_sums(queries, keys, lse, form)


def _told_sums(queries: Tensor, keys: Tensor, lse: Tensor, form: Form) -> Tensor:
    """`column_sums` of logits whose log denominators are known; a tile of weights [G, BLOCK, TILE] stays in a cache."""
    (batch, heads, tokens, _), new = keys.shape, queries.shape[2]
    before = tokens - new
    grouped, told = (x.view(batch, heads, -1, new, x.shape[-1]) for x in (queries, lse.unsqueeze(-1)))
    sums = torch.zeros(*grouped.shape[:3], tokens, device=keys.device)
    for own in product(range(batch), range(heads)):
        asked = keys[own].float().t().expand(grouped.shape[2], -1, -1)
        for start in range(0, new, BLOCK):
            rows = slice(start, min(start + BLOCK, new))
            asking, shift, end = grouped[own][:, rows].float(), told[own][:, rows], before + rows.stop
            for left in range(0, end, TILE):
                seen = slice(left, min(left + TILE, end))
                weights = torch.baddbmm(shift, asking, asked[..., seen], beta=-1, alpha=form.scaling).exp_()
                sums[own][:, seen] += weights.tril_(before + start - left).sum(dim=1)
                del weights  # or it would be held beside the next one
    return sums


def column_peaks(queries: Tensor, keys: Tensor, form: Form, *, rows: Tensor | None = None) -> Tensor:
    """Most attention that each of S tokens receives from one of the last Q of them: [B, H, G, S] float32.

    rows: [B, Q] float32, what the weights of each query are multiplied by; None for 1.
    """
    (batch, heads, tokens, _), group = keys.shape, queries.shape[1] // keys.shape[1]
    peaks = torch.zeros(batch, heads, group, tokens, device=keys.device)
    for own, seen, weights in _blocks(queries, keys, form):
        if rows is not None:
            weights.mul_(rows[:, None, None, own, None])
        peaks[..., seen] = torch.maximum(peaks[..., seen], weights.amax(dim=3))
    return peaks


def _blocks(queries: Tensor, keys: Tensor, form: Form) -> Iterator[tuple[slice, slice, Tensor]]:
    """The last Q of S tokens, block after block: which they are of Q, slots that they see, weights [B, H, G, b, s]."""
    block = GPU_BLOCK if gpu.is_gpu(keys.device) else BLOCK
    tokens, new = keys.shape[2], queries.shape[2]
    at = torch.arange(tokens, device=keys.device)
    for start in range(tokens - new, tokens, block):
        end = min(start + block, tokens)
        seen = slice(0 if form.window is None else max(0, start - form.window + 1), end)
        own = slice(start - tokens + new, end - tokens + new)
        mask = visible(at[None, None, seen], at[start:end], form.window)
        yield own, seen, _weights(queries[:, :, own], keys[:, :, seen], form, mask=mask)


def _streamed_sums(queries: Tensor, keys: Tensor, form: Form) -> Tensor:
    """`column_sums` without help: the largest temporary is [B, Hq, BLOCK, S]."""
    (batch, heads, tokens, _), group = keys.shape, queries.shape[1] // keys.shape[1]
    sums = torch.zeros(batch, heads, group, tokens, device=keys.device)
    for _, seen, weights in _blocks(queries, keys, form):
        sums[..., seen] += weights.sum(dim=3)
    return sums


def _streamed_attention(queries: Tensor, keys: Tensor, values: Tensor, form: Form) -> tuple[Tensor, None]:
    """`causal_attention` of any form without help: the largest temporary is [B, Hq, BLOCK, S]."""
    out = values.new_empty(*queries.shape[:3], values.shape[-1])
    for own, seen, weights in _blocks(queries, keys, form):
        mixed = weights.to(values.dtype).flatten(2, 3) @ values[:, :, seen]  # [B, H, G * b, D]
        out[:, :, own] = mixed.view(*weights.shape[:4], -1).flatten(1, 2)
    return out, None


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What sinks leave of attention [B, Hq, Q, D] with log denominators [B, Hq, Q]."""
    if sinks is None:
        return out, lse
    with_sinks = torch.logaddexp(lse, sinks.float().flatten(1, 2).unsqueeze(-1))
    return (out * (lse - with_sinks).exp_().unsqueeze(-1)).to(out.dtype), with_sinks


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
