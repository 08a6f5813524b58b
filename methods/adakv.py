"""Ada-KV: SnapKV's scores, with the slots of a layer shared out between its heads by one top-k over all of them.

Source: https://arxiv.org/abs/2407.11550 and its released code (window 32, kernel 7, max pool, safeguard 0.2). A head's
slots outside the window are `1 - safeguard` times its part of the layer-wide top-k, plus `safeguard` times an even
share. Heads are ragged for real: what a head gives up is freed, not masked. A budget within the window is even.
Differences: scores of a query group are averaged, so that slots are stored once per KV head, as the code does where
asked for (`gqa_support`); whole slots by largest remainder, where the code rounds and may over- or underspend.
`kvpress` sets aside each head's own best `safeguard` instead, counted with the window, and masks keys where this frees
them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.base import KV, LayerView, Sizes, at_least, at_most, best, spread
from methods.compilerkv.form import best_slots
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, WindowPolicy

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"recent": 32, "kernel": 7, "pool": "max", "safeguard": 0.2},
    "kvcf": {"recent": 8, "kernel": 7, "pool": "max", "safeguard": 0.2},
    "kvpress": {"recent": 64, "kernel": 5, "pool": "avg", "safeguard": 0.2, "floor": True},
}
CHOICES = {"recent": WINDOWS, **POOLINGS, "safeguard": (0.0, 0.1, 0.2, 0.5), "floor": (False, True)}
CODE = "https://github.com/FFY0/AdaKV at efe4e2e"


@method("adakv", paper="https://arxiv.org/abs/2407.11550", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class AdaKV(WindowPolicy):
    """SnapKV with a layer's slots shared out between its KV heads by their scores."""

    safeguard: float = 0.2
    floor: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "safeguard")
        at_most(self, 1, "safeguard")

    @property
    def redundant(self) -> bool:
        return super().redundant or (self.floor and self.safeguard == 0)

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        scores, recent = view.only_live(self.score(view)), self.recent
        return view.kv.take(ragged_slots(scores, budget, safeguard=self.safeguard, floor=self.floor, recent=recent))

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return () if budget > self.recent else ("heads share evenly at this budget: it holds the window alone",)


def ragged_slots(
    scores: Tensor, budget: int, *, safeguard: float, floor: bool, sinks: int = 0, recent: int = 0
) -> Tensor:
    """Return the slots of each head, budget * H in all: [1, H, most] int64, ascending, -1 behind a head's own number.

    scores: [1, H, T]. The first `sinks` and the last `recent` tokens are kept by every head, as far as `budget` goes.
    """
    tokens = scores.shape[-1]
    slots = min(budget, tokens)
    recent = min(recent, slots)
    sinks = min(sinks, slots - recent)
    fixed = sinks + recent
    counts = head_counts(scores[0, :, sinks : tokens - recent], slots, fixed=fixed, safeguard=safeguard, floor=floor)
    forced = scores.clone()
    forced[..., :sinks] = torch.inf
    return best_slots(forced, counts, recent=recent)


def head_counts(scores: Tensor, slots: int, *, fixed: int, safeguard: float, floor: bool) -> list[int]:
    """Return the slots of each head, slots * H in all, by one top-k over the scores of all of them.

    scores: [H, P] of the tokens beside the `fixed` ones that every head keeps. safeguard: the part of the other slots
    that is shared evenly; floor: the part of all slots that is each head's own best instead.
    """
    heads, before = scores.shape
    mean = slots - fixed  # of a head, on average, beside the fixed ones
    if mean == 0:
        return [fixed] * heads
    dead = scores == -torch.inf
    if floor:
        own = best(scores, max(0, int(safeguard * slots) - fixed))
        scores = scores.scatter(1, own, torch.inf).masked_fill_(dead, -torch.inf)
    owner = best(scores.reshape(-1), mean * heads) // before
    shares = torch.bincount(owner, minlength=heads).tolist()
    if not floor:
        room = (~dead).sum(dim=1).tolist()
        shares = spread(mean * heads, [(1 - safeguard) * n + safeguard * mean for n in shares], room)
    return [fixed + n for n in shares]
