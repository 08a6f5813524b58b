"""LagKV: keep the tokens whose keys and values stand out most against the range of the tokens that follow.

Source: https://arxiv.org/abs/2504.04704 and its released code. After the sinks the prompt is cut into partitions of
`lag` tokens. Each channel of a token's key is measured in the next partition's range, (x - min) / (max - min); the
token's worth is the deviation of these over the channels, as a softmax over its partition, added to the same of its
value. Every partition keeps as many of its best; the last whole one, which has none to be measured by, and what follows
it are kept. No attention is read. `paper` are the defaults of the released code (16 sinks, partitions of 1024); plain
`lagkv` has the partitions of 128 of its example for prompts, `kvpress` those of kvpress.
Differences: compressed once after the prefill, where the code goes on while decoding. Slots that do not divide evenly
go to the earlier partitions (kvpress leaves it to its top-k). A budget within the sinks and the last partitions, which
neither goes below, keeps the sinks and the most recent tokens. A channel that is constant in the next partition is left
out, where the code divides by zero. kvpress's `cross_scoring`, which its authors call experimental, is left out.
`kernel`, `pool` and `forward` are no part of the paper and off unless given; what is pooled is the worth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import LayerView, Sizes, at_least, best
from methods.registry import method
from methods.window import POOLINGS, PooledPolicy, pooled

PRESETS = {"paper": {"lag": 1024}, "kvpress": {"sinks": 4}}
CHOICES = {"sinks": (0, 4, 16), "lag": (8, 16, 32, 64, 128, 1024), **POOLINGS}
CODE = "https://github.com/AI-Lab-China-Merchants-Bank/LagKV at 2a9d19e"


@method("lagkv", paper="https://arxiv.org/abs/2504.04704", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class LagKV(PooledPolicy):
    """As many tokens of each partition of `lag`, by their deviation within the range of the next one."""

    sinks: int = 16
    lag: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "lag")

    def score(self, view: LayerView) -> Tensor:
        """Return each token's rank in its partition, and above any rank the place of those behind all partitions."""
        measured = self._measured(view.tokens)
        places = torch.arange(view.tokens, device=view.kv.keys.device)
        scores = (self.lag + places).float().repeat(*view.kv.positions.shape[:2], 1)
        if measured:
            worth = self._worth(view.kv.keys, measured) + self._worth(view.kv.values, measured)  # [B, H, P, lag]
            spread = pooled(worth.flatten(2), self.kernel, self.pool, forward=self.forward).view(worth.shape)
            order = best(view.finite(spread, "scores"), self.lag)
            ranks = self.lag - 1 - order.argsort(dim=-1)
            scores[..., self.sinks : self.sinks + measured] = ranks.flatten(2).float()
        return scores

    def _measured(self, tokens: int) -> int:
        """How many tokens, behind the sinks, are in partitions that another follows."""
        return max(0, (tokens - self.sinks) // self.lag - 1) * self.lag

    def _worth(self, states: Tensor, measured: int) -> Tensor:
        """Softmax over each partition of its tokens' deviations in the next one's range: [B, H, P, lag] float32."""
        cut = states[:, :, self.sinks : self.sinks + measured + self.lag].float()
        cut = cut.reshape(*states.shape[:2], -1, self.lag, states.shape[-1])  # [B, H, P + 1, lag, D]
        low, high = cut[:, :, 1:].amin(dim=3, keepdim=True), cut[:, :, 1:].amax(dim=3, keepdim=True)
        inside = torch.where(high > low, (cut[:, :, :-1] - low) / (high - low), 0.0)
        return inside.std(dim=-1).softmax(dim=-1)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        fixed = sizes.tokens - self._measured(sizes.tokens)
        return (
            () if budget > fixed else (f"sinks and recent tokens alone: {fixed} slots are kept whatever their score",)
        )
