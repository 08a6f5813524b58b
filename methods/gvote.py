"""GVote: the prompt itself says how much is kept: what its last query needs, and what queries drawn like its own need.

Source: https://arxiv.org/abs/2509.03136; no code of its authors is known. There is no budget. In each layer and query
head the last query's attention gives k, the fewest keys whose weights reach `p_nuc` of all. Hidden states are near
Gaussian: `samples` of them are drawn, projected to queries and turned to the next positions, and each names its k best
keys. A KV head keeps what any of its queries named, the last one included, so heads hold as many slots as they need.
Differences: the Gaussian is that of the prompt's queries before RoPE, all heads together, with every correlation: equal
in law to hidden states of that covariance, which the paper takes to have none between channels; a model that
normalises its queries, and one without a plain projection, so need no other way. What query heads of a group name is
joined, since they share slots. Draws follow from `seed`, the layer and the prompt: runs are repeatable.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import KV, Kind, KVPolicy, LayerView, Needs, PromptView, at_least, at_most
from methods.device import read
from methods.expected_attention import turned_to_the_end
from methods.registry import method

PRESETS = {"p90": {"p_nuc": 0.9}, "p95": {"p_nuc": 0.95}, "p99": {"p_nuc": 0.99}}


@method("gvote", paper="https://arxiv.org/abs/2509.03136", presets=PRESETS)
@dataclass(frozen=True)
class GVote(KVPolicy):
    """As many keys as the last query and `samples` queries like the prompt's need for `p_nuc` of their attention.

    window: of how many last queries the Gaussian is; the paper's are all. seed: of the draws.
    """

    p_nuc: float = 0.95
    samples: int = 8
    seed: int = 0
    window: int = 131072

    def __post_init__(self) -> None:
        at_least(self, 0, "samples", "seed")
        at_least(self, 0.01, "p_nuc")
        at_most(self, 1, "p_nuc")
        at_least(self, 1, "window")

    @property
    def kind(self) -> Kind:
        return "own"

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window if self.samples else 1)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        named = [self.named(layer) for layer in view.layers]
        most = read([own.sum(dim=-1).amax().view(1) for own in named])
        return [layer.kv.take(places(own, n)) for layer, own, (n,) in zip(view.layers, named, most, strict=True)]

    def named(self, view: LayerView) -> Tensor:
        """Whether some query needs each slot: [B, H, S] bool."""
        live = view.kv.positions >= 0
        if self.p_nuc == 1:  # sums of weights are rounded
            return live
        now = view.attention(1)  # [B, H, G, 1, S]
        count = nucleus(now, self.p_nuc)
        scores = torch.cat([view.finite(now, "attention weights"), self._logits(view)], dim=3)
        order = scores.masked_fill(~live[:, :, None, None], -torch.inf).sort(dim=-1, descending=True, stable=True)
        chosen = torch.arange(live.shape[2], device=live.device) < count.unsqueeze(-1)
        found = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order.indices, chosen.expand(scores.shape))
        return found.flatten(2, 3).any(dim=2) & live

    def _logits(self, view: LayerView) -> Tensor:
        """Products of the drawn queries and the keys: [B, H, G, samples, S] float32."""
        batch, heads, slots, dim = view.kv.keys.shape
        if not self.samples:
            return view.kv.keys.new_zeros(batch, heads, view.queries.shape[1] // heads, 0, slots, dtype=torch.float32)
        drawn = self._drawn(view).view(batch, heads, -1, dim)  # [B, H, G * samples, D]
        products = drawn @ view.kv.keys.float().transpose(2, 3)
        return view.finite(products.view(batch, heads, -1, self.samples, slots), "products of drawn queries")

    def _drawn(self, view: LayerView) -> Tensor:
        """Queries as the prompt's, at the positions after it: [B, Hq, samples, D]. One draw weighs all heads' alike."""
        queries, rotate = turned_to_the_end(view, min(self.window, view.queries.shape[2]))
        generator, device = torch.Generator().manual_seed(self.seed * 1_000_003 + view.index), queries.device
        weights = torch.randn(self.samples, queries.shape[2], generator=generator, pin_memory=device.type == "cuda")
        mean = queries.mean(dim=2, keepdim=True)
        spread = weights.to(device, non_blocking=True) @ (queries - mean) / queries.shape[2] ** 0.5
        drawn = (mean + spread).split(1, dim=2)
        return torch.cat([rotate(own, ahead) for ahead, own in enumerate(drawn)], dim=2)


def nucleus(weights: Tensor, part: float) -> Tensor:
    """The fewest of weights [..., S] whose sum is at least `part` < 1 of all: [...] int64."""
    ranked = weights.sort(dim=-1, descending=True).values
    sums = ranked.cumsum(dim=-1)
    return (sums - ranked < part * sums[..., -1:]).sum(dim=-1)


def places(named: Tensor, most: int) -> Tensor:
    """Return the places of what is named [B, H, S], ascending, -1 behind them where fewer: [B, H, most] int64."""
    all_ = torch.arange(named.shape[2], device=named.device)
    found = torch.where(named, all_, named.shape[2]).sort(dim=-1).values[..., :most]
    return found.masked_fill(found == named.shape[2], -1)
