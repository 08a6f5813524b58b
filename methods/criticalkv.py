"""CriticalKV: half of a head's slots by a method's scores, the others by those times what a value adds to the output.

Source: https://arxiv.org/abs/2502.03805, which wraps any method that scores tokens by attention: `over` says how many
slots each head has and which tokens are always kept. The first `share` of a head's slots, those tokens among them, are
the best by its scores; the rest are the best of the others by (score + `epsilon`) times the L1 norm of W_o v, averaged
over the query group. Its authors' code is that of kvpress (criticalkv_press.py:24-105 at kvpress 8bb29b9), whose
defaults are these; `kvpress` is over its SnapKV, `kvzip` over KVzip, which kvpress does not wrap. `criticaladakv` is
over a method that shares slots out between heads.
Differences: a window that is longer than a head's first part is kept all the same, where kvpress ranks the rest of it
by norm. Scores below zero, which a factor turns round, are refused, and so are models whose W_o is no `o_proj`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from methods.around import Around
from methods.base import (
    KV,
    KVPolicy,
    LayerView,
    Needs,
    PolicyError,
    PromptView,
    Ranking,
    Sizes,
    at_least,
    at_most,
    best,
)
from methods.registry import method

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"over": "snapkv"},
    "kvpress": {"over": "snapkv@kvpress"},
    "kvzip": {"over": "kvzip"},
}
CHOICES = {
    "over": ("snapkv", "snapkv@kvcf", "snapkv@kvpress", "snapkv@w8k13", "h2o", "tova", "kvzip"),
    "share": (0.0, 0.25, 0.5, 0.75),
    "epsilon": (1e-5, 1e-4, 1e-3, 1e-2),
}
TOKENS_AT_ONCE = 8192  # of a head's values, each as wide as the layer
CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"


@method("criticalkv", paper="https://arxiv.org/abs/2502.03805", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class CriticalKV(Around):
    """As many slots as the method `over` keeps; those beyond its best by score times the norm of W_o v."""

    over: str = "snapkv"
    share: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        at_least(self, 0, "share", "epsilon")
        at_most(self, 1, "share")
        super().__post_init__()

    def suits(self, policy: KVPolicy) -> None:
        if not policy.ranks_tokens:
            raise PolicyError(f"{self.asked} has no scores of single tokens; name a method that has, as snapkv")
        if policy.evicts_while_decoding:
            raise PolicyError(f"{self.asked} evicts while decoding, without these norms; name another preset or method")
        if policy.turns_keys:
            raise PolicyError(f"{self.asked} turns the keys that it keeps; name another preset or method")

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(module=True)

    def check(self, view: PromptView) -> None:
        for layer in view.layers:
            output_weights(layer)
        super().check(view)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return self.chooser.notes(budget, sizes)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        kept = self.chooser.compress(view, budget)
        return [self._chosen(*own, budget) for own in zip(view.layers, kept, strict=True)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        acts = self.chooser.per_layer(budget, sizes)
        return None if acts is None else [partial(self._after, act, budget) for act in acts]

    def _after(self, act: Callable[[LayerView], KV], budget: int, layer: LayerView) -> KV:
        return self._chosen(layer, act(layer), budget)

    def sure(self, budget: int) -> int:
        """Slots that are every head's best by score at least."""
        return 0

    def _chosen(self, layer: LayerView, kept: KV, budget: int) -> KV:
        """The slots of a layer in which every head holds as many as `kept` does."""
        if kept.positions.shape[2] >= layer.tokens and budget >= layer.tokens:
            return kept
        counts = kept.live.unsqueeze(-1)  # [1, H, 1]
        ranking = cast(Ranking, self.inner)
        raw = layer.memo((type(ranking), ranking), ranking.score)
        scores, live = layer.only_live(raw), layer.kv.positions >= 0
        layer.refuse(((scores < 0) & live).count_nonzero(), partial(_negative, self.asked, layer.index))
        place = torch.arange(layer.tokens, device=scores.device)
        first_kept, last_kept = ranking.ends(layer, budget)
        recent = counts.clamp(max=last_kept)
        fixed = (place >= layer.tokens - recent) | (place < (counts - recent).clamp(max=first_kept))
        first = torch.maximum((counts * self.share).long(), fixed.sum(dim=-1, keepdim=True)).clamp(
            min=self.sure(budget)
        )
        sure = _ranks(scores.masked_fill(fixed, torch.inf)) < first
        worth = layer.only_live((raw + self.epsilon) * layer.memo(("output norms",), output_norms))
        ranks = _ranks(worth.masked_fill(sure, torch.inf))
        slots = torch.where(ranks < counts, place, layer.tokens).sort(dim=-1).values[..., : kept.positions.shape[2]]
        return layer.kv.take(slots.masked_fill(slots == layer.tokens, -1))


def output_norms(layer: LayerView) -> Tensor:
    """L1 norm of what each value adds to the layer's output, averaged over the query group: [1, H, T] float32."""
    values = layer.kv.values  # [1, H, T, D]
    heads, dim = values.shape[1], values.shape[3]
    weights = output_weights(layer)
    grouped = weights.view(len(weights), heads, -1, dim)  # [E, H, G, D]
    norms = [
        torch.stack([_norm(values[0, head], grouped[:, head, own]) for own in range(grouped.shape[2])]).mean(dim=0)
        for head in range(heads)
    ]
    return torch.stack(norms).unsqueeze(0)


def _norm(values: Tensor, weights: Tensor) -> Tensor:
    """L1 norms of values [T, D] times weights [E, D]: [T] float32."""
    turned = weights.float().T
    return torch.cat([(own.float() @ turned).norm(p=1, dim=-1) for own in torch.split(values, TOKENS_AT_ONCE)])


def output_weights(layer: LayerView) -> Tensor:
    """W_o of a layer: [E, Hq * D]. Raises PolicyError for a model whose attention has none of that name and shape."""
    if layer.module is None:
        raise PolicyError("criticalkv needs the layer's output projection, which was not observed; use `harness run`")
    weights = getattr(getattr(layer.module, "o_proj", None), "weight", None)
    width = layer.queries.shape[1] * layer.kv.values.shape[3]
    if not (isinstance(weights, Tensor) and weights.is_floating_point() and weights.shape[1:] == (width,)):
        name = type(layer.module).__name__
        raise PolicyError(f"criticalkv needs `o_proj` of {width} inputs, which {name} has not; name another method")
    return weights.detach()


def _ranks(scores: Tensor) -> Tensor:
    """Place of each of scores [1, H, T] when the best comes first; of equal ones the earlier."""
    return best(scores, scores.shape[-1]).argsort(dim=-1)


def _negative(named: str, index: int, count: int) -> str:
    return f"{named}: {count} scores of layer {index} are below 0; name one that scores attention"
