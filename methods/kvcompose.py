"""KVCompose: every head keeps its own best tokens, as many in all heads of a layer, and layers share the slots out.

Source: https://arxiv.org/abs/2509.05165 and its press in kvpress (`kvcompose_press.py` at 8bb29b9), whose defaults are
ours. The prompt runs through the model once more, after itself. A token is worth the most attention of any query of
that second pass, averaged over the query group, plus the mean of that over the KV heads (`across`); `lengths`
multiplies it by the length of its value first. The i-th best tokens of all heads of a layer are one composite token,
worth their mean; one top-k over the composite tokens of all layers says how many a layer keeps, `least` at any rate.
The first layer's count as the best of any at each place, so that it keeps most. `unstructured` lets heads of all layers
share the slots out instead: a top-k over their own tokens. The pass costs what the prefill does or more, and is counted
as observation.
Differences: prompts of a task that the authors may run instead of the context again are left out, and so are means in
place of the most attention. Slots are of the budget exactly, and heads of `unstructured` are ragged for real, where the
press masks. `window` is no second pass: the queries of the last `recent` prompt tokens are observed, as by `snapkv`;
those tokens, seen by few, are always kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.base import KV, KVPolicy, LayerView, Needs, PromptView, Sizes, at_least, best
from methods.compilerkv.form import best_slots
from methods.device import read
from methods.registry import method
from methods.repeat import WHOLE, Repeat, repeated

CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"
PRESETS: dict[str, dict[str, Any]] = {
    "kvpress": {},
    "unstructured": {"structured": False},
    "window": {"recent": 32},
}
CHOICES = {
    "recent": (0, 8, 16, 32),
    "structured": (True, False),
    "across": (True, False),
    "lengths": (False, True),
    "least": (0, 16, 32),
}
AGAIN = Repeat(words=False, chunk=WHOLE, apart=False)


@method("kvcompose", paper="https://arxiv.org/abs/2509.05165", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class KVCompose(KVPolicy):
    """Each head's own best tokens, with a layer's slots from one top-k over composite tokens.

    recent: queries that are observed instead of a second pass; 0 for the pass. structured: all heads of a layer hold as
    many. least: slots of each head.
    """

    recent: int = 0
    structured: bool = True
    across: bool = True
    lengths: bool = False
    least: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "recent", "least")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent) if self.recent else Needs(repeat=frozenset({AGAIN}))

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        key = ("composed", self.recent, self.across, self.lengths)
        scores = [layer.only_live(layer.memo(key, self._score)) for layer in view.layers]
        counts = self._counts(scores, min(budget, view.tokens))
        slots = [best_slots(own, count, recent=self.recent) for own, count in zip(scores, counts, strict=True)]
        return [layer.kv.take(own) for layer, own in zip(view.layers, slots, strict=True)]

    def _score(self, view: LayerView) -> Tensor:
        """The most attention of the observed queries to each token, among heads: [B, H, T]."""
        most = view.attention(self.recent).amax(dim=3) if self.recent else repeated(view, AGAIN).received
        worth = most.mean(dim=2)
        if self.lengths:
            worth = worth * view.kv.values.float().norm(dim=-1)
        return worth + worth.mean(dim=1, keepdim=True) if self.across else worth

    def _counts(self, scores: list[Tensor], slots: int) -> list[list[int]]:
        """Return the slots of each head of each layer, from scores [1, H, T] of each; `slots` on average."""
        layers, heads, tokens = len(scores), *scores[0].shape[1:]
        fixed = min(self.recent, slots)
        if slots == fixed or tokens == fixed:
            return [[slots] * heads] * layers
        ranked = torch.cat(scores)[..., : tokens - fixed].sort(dim=-1, descending=True).values  # [L, H, P]
        rows = composite(ranked) if self.structured else ranked
        rows[..., : min(self.least, slots - fixed)] = torch.inf
        [found] = read([shares_of_rows(rows, slots - fixed).expand(layers, heads)])
        return [[fixed + n for n in found[at : at + heads]] for at in range(0, len(found), heads)]

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return () if budget > self.recent else ("layers share evenly at this budget: it holds the window alone",)


def composite(ranked: Tensor) -> Tensor:
    """Worth of the composite tokens of scores [L, H, P], best first: [L, 1, P]. The first layer has the best of any."""
    found = ranked.mean(dim=1, keepdim=True)
    return torch.cat([found.amax(dim=0, keepdim=True), found[1:]])


def shares_of_rows(rows: Tensor, mean: int) -> Tensor:
    """How many of the best of all rows [L, R, P] are each row's, `mean` on average: [L, R] int64."""
    owner = best(rows.flatten(), mean * rows.shape[0] * rows.shape[1]) // rows.shape[2]
    found = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device).flatten()
    return found.scatter_add_(0, owner, torch.ones_like(owner)).view(rows.shape[:2])
