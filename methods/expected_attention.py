"""Expected attention: keep what the queries still to come will attend to, and what then moves the output most.

Source: https://arxiv.org/abs/2510.00636. Queries before RoPE are taken as Gaussian; turned to the average of the next
`future` positions, their mean m and covariance C give the log of the expected weight of a key k,
`k.m s + k.C.k s^2 / 2` (s: the factor of the attention logits). A softmax over the prompt, the mean over the query
group, times the value norm (`epsilon` added first); the first `sinks` tokens are kept and left out of all of it.
Heads hold the same number of slots, or, with a `safeguard`, as AdaKVPress shares them out: the best scores of all heads
together, after each head's own best `safeguard`, sinks included. `paper` is how its authors evaluate it in kvpress
(`evaluate_registry.py` and `adakv_press.py` at 8bb29b9): safeguard 0.2, epsilon 0.01, every query of the prompt.
Differences: plain `expected_attention` takes the Gaussian of the last `window` queries; `paper` and `kvpress`, the bare
press, observe every query of prompts of up to 131,072 tokens, and hold them as long as the prompt. Queries carry RoPE,
so each is turned forward to the end of the prompt instead of back to zero: the same. What a head gives up is freed,
where AdaKVPress masks it, and a budget within the sinks keeps the same of them in every head. `kernel`, `pool` and
`forward` are no part of the paper and off unless given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.adakv import ragged_slots
from methods.base import KV, LayerView, Needs, PolicyError, PromptView, at_least, at_most
from methods.registry import method
from methods.views import Rotate
from methods.window import POOLINGS, PooledPolicy

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"window": 131072, "epsilon": 0.01, "safeguard": 0.2},
    "kvpress": {"window": 131072},
}
CHOICES = {
    "window": (64, 128, 131072),
    "future": (64, 512),
    "value_norm": (True, False),
    "epsilon": (0.0, 0.01),
    "safeguard": (None, 0.0, 0.2, 0.5),
    **POOLINGS,
}
CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"
NUMBERS_AT_ONCE = 2**25  # of keys as the queries of a group see them; a long prompt's are taken head by head


@method("expected_attention", paper="https://arxiv.org/abs/2510.00636", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class ExpectedAttention(PooledPolicy):
    """Top tokens by the attention expected of the next `future` queries, times the norm of their values.

    safeguard: part of a head's slots that are its own whatever the others' scores; None shares slots evenly.
    """

    sinks: int = 4
    window: int = 128
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    safeguard: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "epsilon", "safeguard")
        at_most(self, 1, "safeguard")
        at_least(self, 1, "window", "future")

    @property
    def redundant(self) -> bool:
        return super().redundant or (self.epsilon > 0 and not self.value_norm)

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        return super().compress(view, budget) if self.safeguard is None else self._ragged(view.layers, budget)

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        return super().compress_layer(view, budget) if self.safeguard is None else self._ragged([view], budget)[0]

    def _ragged(self, layers: Sequence[LayerView], budget: int) -> list[KV]:
        assert self.safeguard is not None
        scores = [layer.only_live(layer.memo((type(self), self), self.score)) for layer in layers]
        slots = ragged_slots(scores, budget, safeguard=self.safeguard, floor=True, sinks=self.sinks)
        return [layer.kv.take(own) for layer, own in zip(layers, slots, strict=True)]

    def score(self, view: LayerView) -> Tensor:
        first = min(self.sinks, view.tokens - 1)
        keys = view.kv.keys[:, :, first:].float().unsqueeze(2) * view.scaling  # [B, H, 1, T', D]
        queries = self._ahead(view, first)  # [B, H, G, W, D]
        size = max(1, NUMBERS_AT_ONCE // (queries.shape[2] * keys[0, 0].numel()))  # heads at once
        heads = zip(torch.split(keys, size, dim=1), torch.split(queries, size, dim=1), strict=True)
        logits = torch.cat([self._logits(*own) for own in heads], dim=1)  # [B, H, G, T']
        dead = view.kv.positions[:, :, None, first:] < 0
        expected = logits.masked_fill(dead, -torch.inf).softmax(dim=-1).mean(dim=2)
        if self.value_norm:
            expected = (expected + self.epsilon) * view.kv.values[:, :, first:].float().norm(dim=-1)
        return pad(self.pooled(expected), (first, 0))  # sinks are kept without a score

    def _logits(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Log of the expected weight of scaled keys [B, H, 1, T', D] for queries like these [B, H, G, W, D]."""
        mean = queries.mean(dim=3, keepdim=True)
        logits = (keys * mean).sum(dim=-1)  # [B, H, G, T']
        if not self.covariance:
            return logits
        apart = queries - mean
        spread = apart.transpose(3, 4) @ apart / queries.shape[3]  # [B, H, G, D, D]
        return logits + ((keys @ spread) * keys).sum(dim=-1) / 2

    def _ahead(self, view: LayerView, first: int) -> Tensor:
        """Window queries from token `first` on, over the next positions on average: [B, H, G, W, D] float32."""
        window = min(self.window, view.seen - first)
        queries, rotate = turned_to_the_end(view, window)
        batch, heads, _, dim = view.kv.keys.shape
        turn = mean_turn(rotate, self.future, torch.eye(dim, device=queries.device))
        return (queries @ turn).view(batch, heads, -1, window, dim)


def turned_to_the_end(view: LayerView, window: int) -> tuple[Tensor, Rotate]:
    """Queries of the last `window` tokens as at the position after the prompt: [B, Hq, W, D] float32; and what turns.

    Raises PolicyError for a model without rotary embeddings.
    """
    if view.rotate is None:
        raise PolicyError("queries to come need rotary embeddings, which this model has not; name another method")
    queries = view.last_queries(window).float().clone()
    for bit in range(window.bit_length()):
        moved = window - with_bit(bit, window, queries.device)  # the i-th is window - i positions before the end
        queries.index_copy_(2, moved, view.rotate(queries.index_select(2, moved), 1 << bit))
    return queries, view.rotate


def with_bit(bit: int, most: int, device: torch.device) -> Tensor:
    """Return the numbers from 1 to `most` that have a bit set, ascending; how many they are is known without them."""
    size = 1 << bit  # of a run of such numbers, and of what is left out before each
    whole, rest = divmod(most + 1, 2 * size)
    count = torch.arange(whole * size + max(0, rest - size), device=device)
    return (count & -size) + count + size


def mean_turn(rotate: Rotate, count: int, eye: Tensor) -> Tensor:
    """Return the mean of the turns by 0, 1, ..., count - 1 positions: [D, D], to multiply rows with. eye: [D, D]."""
    total, done = torch.zeros_like(eye), 0
    for digit in f"{count:b}":  # sums over twice as many turns, and one more where the digit says so
        total, done = total + total @ rotate(eye, done), 2 * done
        if digit == "1":
            total, done = total + rotate(eye, done), done + 1
    return total / count
