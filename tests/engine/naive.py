"""Attention with all weights at once, which kernels are tested against."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.engine.coded_streams import CodedStreams
from methods.views import Form

DISCARDED = pytest.mark.filterwarnings(  # numbers that Triton's interpreter, as a GPU, computes and throws away
    "ignore:(divide by zero|invalid value) encountered in (log|divide):RuntimeWarning:triton.runtime.interpreter"
)


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


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    form: Form,
    *,
    longest: int,
    new: int = 1,
    coded: Sequence[CodedStreams] = (),
) -> Tensor:
    """What `ragged_attention` computes but for codes, in milliseconds; Triton's interpreter takes ten for a stream."""
    assert not coded
    run = torch.arange(longest)
    at = (starts[:, None] + run).clamp(max=len(k) - 1)
    logits = form.capped((q.float() @ k[at].float().transpose(1, 2)) * form.scaling)
    there = run < lengths[:, None]
    logits = logits.masked_fill(~there.unsqueeze(1), -math.inf)
    if form.sinks is not None:
        logits = torch.cat([logits, form.sinks.float().unsqueeze(-1)], dim=-1)
    weights = logits.softmax(-1).nan_to_num()[..., :longest]
    return (weights @ v[at].float().masked_fill(~there.unsqueeze(2), 0.0)).to(q.dtype)
