"""FINCH: keep what the question at the end attends to, and move what is kept together.

Source: https://arxiv.org/abs/2408.00167 (TACL 2024), by its authors' press in kvpress (finch_press.py:58-129 at kvpress
8bb29b9). SnapKV's votes without pooling, but a query at position p counts p times, as an attention over more tokens is
thinner. `chunk` shares the slots beside the window out evenly over the prompt: the best of every so many tokens. What
is kept is turned (RoPE) to follow one another, without gaps where tokens were dropped.
Differences: the window is the whole question there, told apart by a delimiter that no prompt here has; here it is the
last `recent` tokens. The authors compress chunk after chunk, the next one reading what is left of those before; here as
in kvpress all votes are of the whole prompt, and `chunk` is off unless given. kvpress counts the window among the slots
of its last chunk. Keys are turned forward to the end of the prompt, where kvpress turns them back to its start: RoPE
sees only differences. `kernel`, `pool` and `forward` are no part of it and off unless given.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.base import KV, LayerView, PolicyError, at_least, best, spread
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, WindowPolicy

PRESETS: dict[str, dict[str, Any]] = {"kvpress": {}}
CHOICES = {"recent": WINDOWS, **POOLINGS, "chunk": (0, 128, 256)}
CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"


@method("finch", paper="https://arxiv.org/abs/2408.00167", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class Finch(WindowPolicy):
    """Top tokens by the normalised attention of the last `recent` queries, with keys turned to close the gaps.

    chunk: tokens that the best are taken from at a time; 0 takes them from the whole prompt.
    """

    kernel: int = 1
    chunk: int = 0
    rerotate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "chunk")

    @property
    def turns_keys(self) -> bool:
        return self.rerotate

    def score(self, view: LayerView) -> Tensor:
        attention = view.finite(view.attention(self.recent), "attention weights")  # [1, H, G, W, T]
        counts = torch.arange(view.seen - attention.shape[3], view.seen, device=attention.device)
        return self.pooled((attention * counts[:, None]).mean(dim=(2, 3)))

    def keep(self, scores: Tensor, budget: int) -> Tensor:
        before, slots = scores.shape[-1] - self.recent, budget - self.recent
        if self.chunk == 0 or slots <= 0:
            return super().keep(scores, budget)
        parts = torch.split(scores[..., :before], self.chunk, dim=-1)
        own = spread(slots, [part.shape[-1] for part in parts], [part.shape[-1] for part in parts])
        found = [best(part, count) + at * self.chunk for at, (part, count) in enumerate(zip(parts, own, strict=True))]
        window = torch.arange(before, scores.shape[-1], device=scores.device).expand(*scores.shape[:2], -1)
        return torch.cat([*found, window], dim=-1).sort(dim=-1).values

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        slots = self.select(view, budget)
        kv = view.kv.take(slots)
        if not self.rerotate or budget >= view.tokens:
            return kv
        if view.rotate is None:
            raise PolicyError("turning keys together needs rotary embeddings, which this model has not")
        gaps = _after(view.kv.positions).gather(2, slots) - _after(kv.positions)  # dropped tokens behind each slot
        return KV(view.rotate(kv.keys.float(), gaps).to(kv.keys.dtype), kv.values, kv.positions)


def _after(positions: Tensor) -> Tensor:
    """Live slots from each one on, itself among them: [B, H, S] int64."""
    live = (positions >= 0).long()
    return live.flip(-1).cumsum(dim=-1).flip(-1)
