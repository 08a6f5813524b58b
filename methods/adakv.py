"""Ada-KV: SnapKV's scores, with the slots of a layer shared out between its heads by one top-k over all of them.

Source: https://arxiv.org/abs/2407.11550 and its released code (window 32, kernel 7, max pool, safeguard 0.2). A head's
slots outside the window are `1 - safeguard` times its part of the layer-wide top-k, plus `safeguard` times an even
share. Heads are ragged for real: what a head gives up is freed, not masked.
Differences: scores of a query group are averaged, so that slots are stored once per KV head; whole slots by largest
remainder, where the code rounds and may over- or underspend. `kvpress` sets aside each head's own best `safeguard`
instead, counted with the window, and masks keys where this frees them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.base import KV, LayerView, PolicyError, Sizes, at_least, best, spread
from methods.compilerkv.form import best_slots
from methods.registry import method
from methods.window import WindowPolicy

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"recent": 32, "kernel": 7, "pool": "max", "safeguard": 0.2},
    "kvcf": {"recent": 8, "kernel": 7, "pool": "max", "safeguard": 0.2},
    "kvpress": {"recent": 64, "kernel": 5, "pool": "avg", "safeguard": 0.2, "floor": True},
}


@method("adakv", paper="https://arxiv.org/abs/2407.11550", presets=PRESETS)
@dataclass(frozen=True)
class AdaKV(WindowPolicy):
    """SnapKV with a layer's slots shared out between its KV heads by their scores."""

    safeguard: float = 0.2
    floor: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "safeguard")
        if isinstance(self.safeguard, int | float) and self.safeguard > 1:
            raise PolicyError(f"AdaKV.safeguard={self.safeguard} is more than a whole share; give 0 to 1")

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        scores = self.score(view)
        return view.kv.take(best_slots(scores, self.counts(scores, budget), recent=self.recent))

    def counts(self, scores: Tensor, budget: int) -> list[int]:
        """Return the slots of each KV head, budget * H in all. scores: [1, H, T]."""
        heads, before = scores.shape[1], scores.shape[2] - self.recent
        mean = min(budget, scores.shape[2]) - self.recent  # slots of a head outside the window, on average
        if before <= 0 or mean <= 0:
            return [min(budget, scores.shape[2])] * heads
        past = scores[0, :, :before]
        if self.floor:
            past = past.clone().scatter_(1, best(past, max(0, int(self.safeguard * budget) - self.recent)), torch.inf)
        owner = best(past.reshape(-1), mean * heads) // before
        shares = torch.bincount(owner, minlength=heads).tolist()
        if not self.floor:
            shares = spread(mean * heads, [(1 - self.safeguard) * n + self.safeguard * mean for n in shares], before)
        return [self.recent + n for n in shares]

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return () if budget > self.recent else ("heads share evenly at this budget: it holds the window alone",)
