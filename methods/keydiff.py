"""KeyDiff: keep the keys that differ most from the others.

Source: https://arxiv.org/abs/2504.15364. The anchor is the mean of a head's keys of length one; a token is worth the
more, the smaller its cosine with the anchor. `block` goes through the prompt as the paper does, with kvpress's block of
128: from the first N tokens on, each block joins those kept so far, and the best N of both are kept.
Differences: the prompt is prefilled whole for every method, so `block` bounds no memory, and later tokens have attended
to what is dropped. Plain `keydiff` and `kvpress` score the whole prompt once. `kernel`, `pool`, `forward`, `sinks` and
`recent` are no part of the paper and off unless given; what is pooled is 1 - cosine.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods.base import LayerView, at_least
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, PooledPolicy

PRESETS: dict[str, dict[str, Any]] = {"block": {"block": 128}, "kvpress": {}}
CHOICES = {"recent": (0, *WINDOWS), "sinks": (0, 4), **POOLINGS, "block": (0, 128)}


@method("keydiff", paper="https://arxiv.org/abs/2504.15364", presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class KeyDiff(PooledPolicy):
    """Tokens whose keys are least like the mean key of their head.

    block: tokens that join those kept so far at a time; 0 scores the whole prompt at once.
    """

    recent: int = 0
    sinks: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "block")

    def score(self, view: LayerView) -> Tensor:
        return self._unlikeness(normalize(view.kv.keys.float(), dim=-1))

    def select(self, view: LayerView, budget: int) -> Tensor:
        tokens = view.tokens
        if self.block == 0 or budget >= tokens:
            return super().select(view, budget)
        keys = normalize(view.kv.keys.float(), dim=-1)
        order = torch.arange(tokens, device=keys.device).expand(view.kv.positions.shape)
        kept = order[..., :budget]
        for start in range(budget, tokens, self.block):
            joined = torch.cat([kept, order[..., start : start + self.block]], dim=-1)
            scores = self._unlikeness(keys.gather(2, joined.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])))
            kept = joined.gather(2, self.keep(view.finite(scores, "scores"), budget))
        return kept

    def _unlikeness(self, keys: Tensor) -> Tensor:
        """Minus the cosine of keys of length one [B, H, S, D] with their mean, or 1 more, pooled: [B, H, S]."""
        anchor = normalize(keys.mean(dim=2, keepdim=True), dim=-1)
        cosine = (keys * anchor).sum(dim=-1)
        return -cosine if self.kernel == 1 else self.pooled(1 - cosine)
