"""ChunkKV: keep whole chunks of neighbouring tokens, the same ones in every head of a layer.

Source: https://arxiv.org/abs/2502.00299 (chunks of 10). A chunk is worth the attention of the last `recent` queries to
its tokens, over all heads of the layer; the window itself is always kept.
Differences: a shorter last chunk is compared by its mean, as in `kvpress`, not by its sum; slots that no whole chunk
fits into take the best tokens of the next one, so that the budget is spent exactly (`kvpress` gives them up). The
re-use of one layer's choice by the next, which saves time and no bytes, is left out. The window is that of our
`snapkv`. `kvpress` pools first and cuts chunks of 20 across the window, so the chunk on its edge is always kept; else
`kernel`, `pool`, `forward` and `sinks` are no part of it and off unless given.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.base import LayerView, Needs, at_least, best
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, PooledPolicy, votes

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"chunk": 10},
    "kvpress": {"recent": 64, "kernel": 5, "pool": "avg", "chunk": 20, "across": True},
}
CHOICES = {"recent": WINDOWS, **POOLINGS, "chunk": (5, 10, 20), "across": (False, True)}


@method("chunkkv", paper="https://arxiv.org/abs/2502.00299", presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class ChunkKV(PooledPolicy):
    """Whole chunks of `chunk` tokens by the attention of the last queries, one set per layer."""

    recent: int = 32
    chunk: int = 10
    sinks: int = 0
    across: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "recent", "chunk")
        super().__post_init__()

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent)

    def score(self, view: LayerView) -> Tensor:
        """Return minus the place of each token: best chunk first, then best token of a chunk. The window is 0."""
        pooled = self.pooled(votes(view, self.recent))
        before, heads = max(0, view.tokens - self.recent), view.kv.keys.shape[1]
        end = view.tokens if self.across else before
        attention = pooled.mean(dim=1)[:, :end]  # [B, E]
        attention[:, before:] = 2.0  # above any attention, as the window is kept
        chunks = pad(attention, (0, -end % self.chunk)).view(len(attention), -1, self.chunk)  # [B, C, chunk]
        sizes = torch.full(chunks.shape[1:2], self.chunk, device=attention.device)
        sizes[-1:] -= -end % self.chunk
        rank = _places(chunks.sum(dim=-1) / sizes).repeat_interleave(self.chunk, dim=-1)[:, :end]
        order = rank * end + _places(attention)  # no two are equal
        places = torch.zeros(pooled.shape[0], view.tokens, device=attention.device)
        places[:, :end] = -order.argsort(dim=-1).argsort(dim=-1).float()
        return places.unsqueeze(1).expand(-1, heads, -1)


def _places(scores: Tensor) -> Tensor:
    """Place of each entry of scores [B, n] when the best comes first: [B, n] int64. Equal ones: the earlier first."""
    return best(scores, scores.shape[-1]).argsort(dim=-1)
