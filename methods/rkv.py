"""R-KV: keep what is attended to and not said twice, and go on so through a long output.

Source: https://arxiv.org/abs/2505.24133 and its authors' code (rkv/compression/r1_kv.py and rkv/utils.py at R-KV
d15c976: window 8, kernel 7, mix 0.07; every 128 tokens, run_math.py). A token's score is `mix` times its attention from
the last `recent` queries, a distribution over the tokens before them, pooled; less 1 - `mix` times the softmax of its
mean cosine with all keys, where a key's last like (cosine above `threshold`, the first token without one) counts 0.
Every `buffer` decoded tokens all are ranked again. Their cache grows by the buffer and then drops as much at once; here
budget and buffer share the slots: every new token drops the worst of those ranked, so that before each ranking the same
tokens are there, before that more of them, and no step holds more. At most half of the slots are buffer.
Scores are paid out of the budget, 8 bytes a slot; the authors keep the last queries instead. `prefill` acts once.
Differences: of a query group the greatest weight counts, as the logits that they take it of are not seen while
decoding. A first ranking counts the last queries of the prompt too, one of less than `recent` tokens' buffer only those
of it. What the code can do at newlines or for thoughts alone, both off, is left out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from methods.base import KV, LayerView, Needs, StepView, at_least, at_most
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, WindowPolicy, pooled

PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "prefill": {"evict": False}}
CHOICES = {"recent": WINDOWS, **POOLINGS, "mix": (0.07, 0.1, 0.3, 0.5, 0.9), "threshold": (0.5, 0.8, 0.95)}
CODE = "https://github.com/Zefan-Cai/R-KV at d15c976"
SIDE_BYTES = 8  # of a slot: its score, and the attention that it is getting, float32 both
ROWS_AT_ONCE = 512  # of a head's cosines


@method("rkv", paper="https://arxiv.org/abs/2505.24133", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class RKV(WindowPolicy):
    """Top tokens by attention less redundancy of their keys, ranked again every `buffer` decoded tokens."""

    recent: int = 8
    mix: float = 0.07
    threshold: float = 0.5
    buffer: int = 128
    evict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "mix")
        at_most(self, 1, "mix")
        at_least(self, 1, "buffer")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent, decode_attention=self.evict)

    def score(self, view: LayerView) -> Tensor:
        votes = view.memo(("greatest votes", self.recent), self._votes)
        return self._mixed(self.pooled(votes), view.kv.keys, view.kv.positions >= 0)

    def _votes(self, view: LayerView) -> Tensor:
        """Attention of the window's queries to the tokens before it, each query's a distribution: [1, H, T]."""
        attention = view.finite(view.attention(self.recent), "attention weights")
        before = max(0, view.tokens - self.recent)
        return pad(_distributions(attention[..., :before].amax(dim=2)).mean(dim=2), (0, view.tokens - before))

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        if not self.evict:
            return super().compress_layer(view, budget)
        slots = self.select(view, _slots(view.kv, budget))
        kv = view.kv.take(slots)
        worth = view.memo((type(self), self), self.score).gather(2, slots)
        kv.extra["worth"] = worth.masked_fill(kv.positions >= view.seen - self.recent, torch.inf)
        votes = view.memo(("greatest votes", self.recent), self._votes)
        kv.extra["seen"] = votes.gather(2, slots) * self.recent
        return kv

    def after_step(self, step: StepView) -> Tensor:
        kv, slots = step.kv, _slots(step.kv, step.budget)
        window = min(self.recent, slots - 1)
        every = max(1, min(self.buffer, (slots - window) // 2))
        asked, left = max(1, min(window, every)), -step.position % every  # queries that vote; steps to the next ranking
        worth, seen, fresh = kv.extra["worth"], kv.extra["seen"], kv.positions == step.position
        worth.masked_fill_(fresh, torch.inf)  # its slot may hold a freed token's data
        seen.masked_fill_(fresh, 0.0)
        old = (kv.positions >= 0) & (kv.positions <= step.position + left - window)
        if left < asked:
            assert step.attention is not None
            seen += _distributions(step.attention.amax(dim=2) * old)
        if left == 0:
            worth.copy_(self._ranked(kv, seen).masked_fill_(~old, torch.inf))
            seen.zero_()
        victim = worth.masked_fill(kv.positions < 0, torch.inf).argmin(dim=-1)
        return victim.masked_fill(kv.live <= slots, -1)

    def _ranked(self, kv: KV, seen: Tensor) -> Tensor:
        """Scores of slots in any order, from the attention that they got: [B, H, S]."""
        dead = kv.positions < 0
        order = kv.positions.masked_fill(dead, torch.iinfo(kv.positions.dtype).max).argsort(dim=-1)
        keys = kv.keys.gather(2, order.unsqueeze(-1).expand(kv.keys.shape))
        votes = _distributions(seen.masked_fill(dead, 0.0)).gather(2, order)
        votes = pooled(votes, self.kernel, self.pool, forward=self.forward)
        return torch.zeros_like(seen).scatter_(2, order, self._mixed(votes, keys, ~dead.gather(2, order)))

    def _mixed(self, votes: Tensor, keys: Tensor, live: Tensor) -> Tensor:
        return self.mix * votes - (1 - self.mix) * redundancy(keys, live, self.threshold)


def redundancy(keys: Tensor, live: Tensor, threshold: float) -> Tensor:
    """Softmax of the mean cosine of keys [B, H, S, D], in the order of tokens, with all of a head: [B, H, S] float32.

    live: [B, H, S]. Of each key, its cosine with itself and with the last key that is more like it than `threshold`
    count 0; where none is, that with the first key.
    """
    unit = normalize(keys.float(), dim=-1) * live.unsqueeze(-1)
    place, first = torch.arange(keys.shape[2], device=keys.device), live.int().argmax(dim=-1)[..., None, None]
    total = torch.zeros_like(unit[..., 0])
    for rows in torch.split(place, ROWS_AT_ONCE):
        cosine = (unit.index_select(2, rows) @ unit.transpose(2, 3)).masked_fill_(rows[:, None] == place, 0.0)
        last = torch.where(cosine > threshold, place, first).amax(dim=-1, keepdim=True)
        total += cosine.scatter_(3, last, 0.0).sum(dim=2)
    mean = total / live.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~live, -torch.inf).softmax(dim=-1)


def _distributions(weights: Tensor) -> Tensor:
    """Weights [..., S] >= 0 as shares of their sum; of nothing, 0."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _slots(kv: KV, budget: int) -> int:
    """Slots that fit `budget` plain slots' bytes when each carries its side data."""
    return max(1, budget * kv.slot_bytes // (kv.slot_bytes + SIDE_BYTES))
