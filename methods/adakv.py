"""Ada-KV: SnapKV's scores, with the slots of a layer shared out between its heads by one top-k over all of them.

Source: https://arxiv.org/abs/2407.11550 and its released code (window 32, kernel 7, max pool, safeguard 0.2). A head's
slots outside the window are `1 - safeguard` times its part of the layer-wide top-k, plus `safeguard` times an even
share. Heads are ragged for real: what a head gives up is freed, not masked. A budget within the window is even.
Differences: scores of a query group are averaged, so that slots are stored once per KV head, as the code does where
asked for (`gqa_support`); whole slots by largest remainder, where the code rounds and may over- or underspend.
`kvpress` sets aside each head's own best `safeguard` instead, counted with the window, and masks keys where this frees
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.base import KV, LayerView, PromptView, Sizes, at_least, at_most, best, spread
from methods.compilerkv.form import best_slots
from methods.device import read
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

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        return self._left(view.layers, budget)

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        return self._left([view], budget)[0]

    def _left(self, layers: Sequence[LayerView], budget: int) -> list[KV]:
        scores = [layer.only_live(self.score(layer)) for layer in layers]
        slots = ragged_slots(scores, budget, safeguard=self.safeguard, floor=self.floor, recent=self.recent)
        return [layer.kv.take(own) for layer, own in zip(layers, slots, strict=True)]

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return () if budget > self.recent else ("heads share evenly at this budget: it holds the window alone",)


def ragged_slots(
    scores: Sequence[Tensor],
    budget: int,
    *,
    safeguard: float,
    floor: bool,
    sinks: int = 0,
    recent: int = 0,
    across: bool = False,
) -> list[Tensor]:
    """Return the slots of each head of some layers, budget * H in a layer, as `best_slots` does.

    scores: [1, H, T] of each layer. The first `sinks` and the last `recent` tokens are kept by every head, as far as
    `budget` goes. across: slots are shared out between the heads of all layers, budget * H in a layer on average.
    """
    tokens = scores[0].shape[-1]
    slots = min(budget, tokens)
    recent = min(recent, slots)
    sinks = min(sinks, slots - recent)
    between = [own[0, :, sinks : tokens - recent] for own in scores]
    heads = len(between[0])
    if across:
        between = [torch.cat([own.to(between[0].device) for own in between])]
    counts = head_counts(between, slots, fixed=sinks + recent, safeguard=safeguard, floor=floor)
    if across:
        counts = [counts[0][at : at + heads] for at in range(0, len(counts[0]), heads)]
    found = []
    for own, count in zip(scores, counts, strict=True):
        forced = own.clone()
        forced[..., :sinks] = torch.inf
        found.append(best_slots(forced, count, recent=recent))
    return found


def head_counts(scores: Sequence[Tensor], slots: int, *, fixed: int, safeguard: float, floor: bool) -> list[list[int]]:
    """Return the slots of each head of some layers, slots * H in a layer, by one top-k over the scores of its heads.

    scores: [H, P] of each layer's tokens beside the `fixed` ones that every head keeps. safeguard: the part of the
    other slots that is shared evenly; floor: the part of all slots that is each head's own best instead. The device is
    read once.
    """
    heads, mean = len(scores[0]), slots - fixed  # of a head, on average, beside the fixed ones
    if mean == 0:
        return [[fixed] * heads] * len(scores)
    sure = max(0, int(safeguard * slots) - fixed) if floor else 0
    counts = []
    for told in read([_shares(own, mean * heads, sure) for own in scores]):
        shares, room = told[:heads], told[heads:]
        if not floor:
            shares = spread(mean * heads, [(1 - safeguard) * n + safeguard * mean for n in shares], room)
        counts.append([fixed + n for n in shares])
    return counts


def _shares(scores: Tensor, count: int, sure: int) -> Tensor:
    """Of each head: its part of the `count` best scores [H, P], its `sure` best first, and its live ones: [2, H]."""
    dead = scores == -torch.inf
    if sure:
        scores = scores.scatter(1, best(scores, sure), torch.inf).masked_fill_(dead, -torch.inf)
    owner = best(scores.reshape(-1), count) // scores.shape[1]
    found = torch.zeros_like(dead[:, 0], dtype=torch.int64).scatter_add_(0, owner, torch.ones_like(owner))
    return torch.stack([found, (~dead).sum(dim=1)])
