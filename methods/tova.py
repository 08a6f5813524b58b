"""TOVA: keep what the last query attends to, the same tokens in every head of a layer.

Source: https://arxiv.org/abs/2401.06104: scores are the last query's attention, averaged over all query heads of the
layer. Plain `tova` compresses once, at the end of prefill; `paper` goes on after every decoded token, which drops the
one that the new query attends to least (it may be the new token itself).
Differences: when the last prompt token is held back and fed again, its query has voted already. `kvpress` always keeps
the last token. `kernel`, `pool`, `forward` and `sinks` are no part of the paper and off unless given.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from methods.base import LayerView, Needs, StepView
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, PooledPolicy

PRESETS: dict[str, dict[str, Any]] = {"paper": {"evict": True}, "kvpress": {"recent": 1}}
CHOICES = {"recent": (0, 1, *WINDOWS), "sinks": (0, 4), **POOLINGS}


@method("tova", paper="https://arxiv.org/abs/2401.06104", presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class TOVA(PooledPolicy):
    """Top tokens by the attention of the last query, one set per layer."""

    recent: int = 0
    sinks: int = 0
    evict: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(window=1, decode_attention=self.evict)

    def score(self, view: LayerView) -> Tensor:
        attention = view.finite(view.attention(1), "attention weights")
        mean = attention.mean(dim=(1, 2, 3)).unsqueeze(1)  # [B, 1, T]
        return self.pooled(mean).expand(-1, view.kv.keys.shape[1], -1)

    def after_step(self, step: StepView) -> Tensor:
        kv = step.kv
        assert step.attention is not None
        mean = step.attention.mean(dim=(1, 2)).unsqueeze(1)  # [B, 1, S]: heads hold the same tokens in the same slots
        kept = (kv.positions < self.sinks) | (kv.positions > step.position - self.recent)
        victim = mean.expand(kv.positions.shape).masked_fill(kept, float("inf")).argmin(dim=-1)
        return victim.masked_fill(kv.live <= step.budget, -1)
