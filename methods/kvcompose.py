"""KVCompose: every head keeps its own best tokens, as many in all heads of a layer, and layers share the slots out.

Source: https://arxiv.org/abs/2509.05165 and its press in kvpress (`kvcompose_press.py` at 8bb29b9), whose defaults are
ours. A token is worth the most attention of any observed query, averaged over the query group, plus the mean of that
over the KV heads. The i-th best tokens of all heads of a layer are one composite token, worth their mean; one top-k
over the composite tokens of all layers says how many a layer keeps, the first of which counts as the best of any at
each place, so that it keeps most. `unstructured` lets heads of all layers share the slots out instead: a top-k over
their own tokens.
Differences: the authors run prompts after the context, by default the context once more, and observe their queries;
here those of the last `recent` prompt tokens are observed, as by `snapkv`, without a second pass. Those tokens are seen
by few and always kept. So kvpress's kept tokens are others, though the same scores share the slots out alike. Slots are
of the budget exactly, and heads of `unstructured` are ragged for real, where the press masks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import KV, KVPolicy, LayerView, Needs, PromptView, Sizes, at_least, best
from methods.compilerkv.form import best_slots
from methods.device import read
from methods.registry import method

CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"


@method(
    "kvcompose",
    paper="https://arxiv.org/abs/2509.05165",
    code=CODE,
    presets={"unstructured": {"structured": False}},
)
@dataclass(frozen=True)
class KVCompose(KVPolicy):
    """Each head's own best tokens, with a layer's slots from one top-k over composite tokens.

    structured: all heads of a layer hold as many.
    """

    recent: int = 32
    structured: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "recent")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        scores = [layer.only_live(layer.memo(("most attention", self.recent), self._score)) for layer in view.layers]
        counts = self._counts(scores, min(budget, view.tokens))
        slots = [best_slots(own, count, recent=self.recent) for own, count in zip(scores, counts, strict=True)]
        return [layer.kv.take(own) for layer, own in zip(view.layers, slots, strict=True)]

    def _score(self, view: LayerView) -> Tensor:
        """The most attention of the last queries to each token: [B, H, T]."""
        most = view.attention(self.recent).amax(dim=3).mean(dim=2)
        return most + most.mean(dim=1, keepdim=True)

    def _counts(self, scores: list[Tensor], slots: int) -> list[list[int]]:
        """Return the slots of each head of each layer, from scores [1, H, T] of each; `slots` on average."""
        layers, heads, tokens = len(scores), *scores[0].shape[1:]
        fixed = min(self.recent, slots)
        if slots == fixed or tokens == fixed:
            return [[slots] * heads] * layers
        ranked = torch.cat(scores)[..., : tokens - fixed].sort(dim=-1, descending=True).values  # [L, H, P]
        shares = shares_of_rows(ranked if not self.structured else composite(ranked), slots - fixed)
        [found] = read([shares.expand(layers, heads)])
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
