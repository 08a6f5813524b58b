"""The compiled score, applied again while decoding, so that a long output stays within the budget as well.

Ours; the published method acts once, at the end of prefill, and names streaming generation as its limit. Every decoded
token takes a slot and every KV head gives one up: the least worthy beyond its last `window` tokens. Worth is computed
again every `every` tokens, as the form does it: attention of the queries since then, spread over the neighbours that
are still kept, plus a share of what a token was worth before (where the form has whole-prompt attention).

Side data of a slot, paid out of the budget: `worth` and `seen`, the attention since worth was computed.
"""

import torch
from torch import Tensor

from methods.base import KV, StepView
from methods.compilerkv.form import Form

SIDE_BYTES, HEAD_BYTES = 8, 4
"""Bytes of side data. Of a slot: two float32. Of a head: how many slots it may hold, an int32."""


def affordable(kv: KV, budget: int) -> int:
    """Return how many slots fit `budget` plain slots' bytes when each carries its side data."""
    return max(1, (budget * kv.slot_bytes - HEAD_BYTES) // (kv.slot_bytes + SIDE_BYTES))


def start(kv: KV, scores: Tensor) -> KV:
    """Return `kv` with its side data. scores: [B, H, T] of the whole prompt, at the end of prefill."""
    kv.extra["worth"] = scores.gather(2, kv.positions.clamp(min=0).long()).masked_fill(kv.positions < 0, 0.0)
    kv.extra["seen"] = torch.zeros_like(kv.extra["worth"])
    kv.extra["slots"] = kv.live.to(torch.int32)  # [B, H], what each head may hold
    return kv


def after_step(step: StepView, form: Form, every: int) -> Tensor:
    """Return the slot of each head to free: [B, H] int64, -1 for none. Changes the side data in place."""
    kv = step.kv
    worth, seen, slots = kv.extra["worth"], kv.extra["seen"], kv.extra["slots"]
    assert step.attention is not None
    fresh = kv.positions == step.position  # its slot may hold a freed token's data
    worth.masked_fill_(fresh, 0.0)
    seen.masked_fill_(fresh, 0.0)
    seen += step.attention.mean(dim=2)
    if step.position % every == 0:
        worth.copy_(form.whole * worth + (1 - form.whole) * _spread(seen / every, kv.positions, form))
        seen.zero_()
    window = (slots - 1).clamp(max=form.window).unsqueeze(-1)  # [B, H, 1]
    old = (kv.positions >= 0) & (kv.positions <= step.position - window)
    victim = worth.masked_fill(~old, float("inf")).argmin(dim=-1)
    return victim.masked_fill(kv.live <= slots, -1)


def _spread(attention: Tensor, positions: Tensor, form: Form) -> Tensor:
    """Attention [B, H, S] spread over neighbours in the order of their positions; nothing on empty slots."""
    order = positions.argsort(dim=-1)
    pooled = form.pooled(attention.masked_fill(positions < 0, 0.0).gather(2, order))
    return torch.zeros_like(attention).scatter(2, order, pooled).masked_fill(positions < 0, 0.0)
