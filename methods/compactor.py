"""Compactor: leverage of a token's key, and the attention that it gets from the tokens before and after it.

Source: https://arxiv.org/abs/2507.08143 and its press in kvpress (`compactor_press.py` at 8bb29b9), whose defaults are
ours. The second half: the prompt is cut into stretches of `chunk` tokens; within one every query attends to every key,
later ones too, by the plain product of the two; the weights that a key gets are summed, averaged over the query group,
multiplied by the length of its value and averaged over 3 tokens (`kernel`). Both halves are brought to mean 0 and
deviation 1 over a layer, and `blend` times the leverage of `leverage` is added to the attention; without a `blend` it
is the part of the prompt that is dropped, kvpress's default. The first 8 and the last 4 tokens are kept and left out of
both.
Differences: those of `leverage`. `engine` is its authors' own (compactor-vllm at 8bbac3a): stretches of 128, a blend of
.5; that it cuts the leverage into stretches of as many is left out. In a shorter last stretch the weights are of the
tokens that there are; kvpress counts those it is filled up with. Every query is observed, and held as long as the
prompt, which may have up to 131,072 tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.base import LayerView, Needs, at_least
from methods.leverage import Leverage
from methods.registry import method
from methods.window import Pooling, pooled

CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"
PRESETS = {"kvpress": {}, "engine": {"chunk": 128, "blend": 0.5}}
CHOICES = {
    "sinks": (0, 4, 8),
    "recent": (4, 16, 32),
    "chunk": (128, 256),
    "blend": (None, 0.25, 0.5, 1.0),
    "kernel": (1, 3, 5, 7, 13),
    "pool": ("max", "avg"),
    "forward": (False, True),
}
WINDOW = 131072


@method("compactor", paper="https://arxiv.org/abs/2507.08143", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class Compactor(Leverage):
    """Tokens by leverage and by attention from both sides.

    blend: factor of the leverage; None for the part of the prompt that is dropped. chunk: tokens of a stretch.
    """

    kernel: int = 3
    pool: Pooling = "avg"
    chunk: int = 256
    blend: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "chunk")
        at_least(self, 0, "blend")

    @property
    def needs(self) -> Needs:
        return Needs(window=WINDOW, stretch=self.chunk)

    def score(self, view: LayerView) -> Tensor:
        """Return the worth of every token where half of the prompt is dropped, or by the `blend` that is given."""
        halves = self.halves(view)
        return (0.5 if self.blend is None else self.blend) * halves[0] + halves[1]

    def halves(self, view: LayerView) -> Tensor:
        """Return leverage and attention: [2, B, H, T] float32."""
        first, end = self.scored(view.tokens)
        live = (view.kv.positions >= 0)[:, :, first:end]
        halves = [standard(half, live) for half in (self.leverage(view), self._attention(view, first, end))]
        return pad(torch.stack(halves), (first, view.tokens - end))

    def select(self, view: LayerView, budget: int) -> Tensor:
        if budget >= view.tokens:
            return super().select(view, budget)
        halves = view.memo((type(self), self), self.halves)
        blend = 1 - budget / view.tokens if self.blend is None else self.blend
        return self.keep(view.only_live(blend * halves[0] + halves[1]), budget)

    def _attention(self, view: LayerView, first: int, end: int) -> Tensor:
        """What tokens get within their stretches, by the lengths of their values: [B, H, T'] float32."""
        at = view.kv.positions[:, :, first:end].long()
        batch, heads, count = at.shape
        queries = view.last_queries(view.seen)
        queries = queries.reshape(batch, heads, -1, *queries.shape[2:])  # [B, H, G, W, D]
        keys, values = (x[:, :, first:end].float() for x in (view.kv.keys, view.kv.values))
        sums = []
        for head in range(heads):  # all at once would be G x H x chunk numbers a token
            index = at[:, head].clamp(min=0)[:, None, :, None].expand(-1, queries.shape[2], -1, keys.shape[-1])
            own = self._cut(queries[:, head].gather(2, index).float())  # [B, G, C, chunk, D]
            logits = own @ self._cut(keys[:, head, None]).transpose(3, 4)  # [B, G, C, chunk, chunk]
            dead = self._cut((at[:, head, None, :, None] >= 0).float())[..., 0] == 0  # [B, 1, C, chunk]
            weights = logits.masked_fill_(dead.unsqueeze(3), torch.finfo(logits.dtype).min).softmax(dim=-1)
            received = weights.masked_fill_(dead.unsqueeze(4), 0.0).sum(dim=3)
            sums.append(received.flatten(2)[..., :count].mean(dim=1))
        worth = torch.stack(sums, dim=1) * values.norm(dim=-1)
        return pooled(view.finite(worth, "attention sums"), self.kernel, self.pool, forward=self.forward)

    def _cut(self, x: Tensor) -> Tensor:
        """Rows [B, G, S, D], filled up with 0, as stretches: [B, G, C, chunk, D]."""
        return pad(x, (0, 0, 0, -x.shape[2] % self.chunk)).view(*x.shape[:2], -1, self.chunk, x.shape[3])


def standard(x: Tensor, live: Tensor) -> Tensor:
    """Numbers [B, H, S] at mean 0 and deviation 1 over those that are live."""
    count = live.sum()
    apart = x - (x * live).sum() / count.clamp(min=1)
    return apart / ((apart * live).square().sum() / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-6)
