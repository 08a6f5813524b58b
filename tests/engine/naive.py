"""Attention in float64 with all n x n weights at once, which kernels are tested against."""

import math

import torch
from torch import Tensor


def naive(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log denominators and column sums, in float64, with all n x n weights at once."""
    q, k, v = (x.double() for x in (q, k, v))
    group, (new, tokens) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    logits = q @ k.repeat_interleave(group, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    behind = torch.arange(tokens - new, tokens)[:, None] - torch.arange(tokens)[None]
    logits = logits.masked_fill(((behind < 0) | (behind >= (window or math.inf))).to(q.device), -math.inf)
    columns = [] if sinks is None else [sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)]
    lse = torch.cat([logits, *columns], dim=-1).logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    return weights @ v.repeat_interleave(group, 1), lse, weights.sum(2).unflatten(1, (-1, group))
