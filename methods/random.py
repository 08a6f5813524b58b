"""Random eviction: the floor that every method has to beat.

A control, not a published method. Keeps the last token and a uniform draw of the others, per layer and KV head; a
larger budget keeps a superset of a smaller one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import EvictionPolicy, LayerView
from methods.registry import method


@method("random", paper="control, no paper")
@dataclass(frozen=True)
class RandomEviction(EvictionPolicy):
    """The last token and a seeded random draw of the others."""

    recent: int = 1
    seed: int = 0

    def score(self, view: LayerView) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + view.index)
        device = view.kv.keys.device
        drawn = torch.rand(view.kv.positions.shape, generator=generator, pin_memory=device.type == "cuda")
        return drawn.to(device, non_blocking=True)
