"""Expected attention: keep what the queries still to come will attend to, and what then moves the output most.

Source: https://arxiv.org/abs/2510.00636. Queries before RoPE are taken as Gaussian; turned to the average of the next
`future` positions, their mean m and covariance C give the log of the expected weight of a key k,
`k.m s + k.C.k s^2 / 2` (s: the factor of the attention logits). A softmax over the prompt, the mean over the query
group, times the value norm (`epsilon` added first); the first `sinks` tokens are kept and left out of all of it.
Differences: the Gaussian is that of the last `window` queries, which is what a method sees; the paper takes every query
of the prompt. They carry RoPE, so each is turned forward to the end of the prompt instead of back to zero: the same.
`kvpress` observes every query of prompts of up to 131,072 tokens, and holds them as long as the prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.base import EvictionPolicy, LayerView, Needs, PolicyError, at_least
from methods.registry import method

Rotate = Callable[[Tensor, int], Tensor]


@method("expected_attention", paper="https://arxiv.org/abs/2510.00636", presets={"kvpress": {"window": 131072}})
@dataclass(frozen=True)
class ExpectedAttention(EvictionPolicy):
    """Top tokens by the attention expected of the next `future` queries, times the norm of their values."""

    sinks: int = 4
    window: int = 128
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 0, "sinks", "epsilon")
        at_least(self, 1, "window", "future")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def score(self, view: LayerView) -> Tensor:
        first = min(self.sinks, view.tokens - 1)
        keys = view.kv.keys[:, :, first:].float().unsqueeze(2) * view.scaling  # [B, H, 1, T', D]
        queries = self._ahead(view, first)  # [B, H, G, W, D]
        mean = queries.mean(dim=3, keepdim=True)
        logits = (keys * mean).sum(dim=-1)  # [B, H, G, T']
        if self.covariance:
            apart = queries - mean
            spread = apart.transpose(3, 4) @ apart / queries.shape[3]  # [B, H, G, D, D]
            logits = logits + ((keys @ spread) * keys).sum(dim=-1) / 2
        expected = logits.softmax(dim=-1).mean(dim=2)
        if self.value_norm:
            expected = (expected + self.epsilon) * view.kv.values[:, :, first:].float().norm(dim=-1)
        return pad(expected, (first, 0))  # sinks are kept without a score

    def _ahead(self, view: LayerView, first: int) -> Tensor:
        """Window queries from token `first` on, over the next positions on average: [B, H, G, W, D] float32."""
        if view.rotate is None:
            raise PolicyError("expected_attention needs rotary embeddings, which this model has not")
        window = min(self.window, view.tokens - first)
        queries = view.last_queries(window).float().clone()
        steps = torch.arange(window, 0, -1, device=queries.device)  # from each query to the end of the prompt
        for bit in range(window.bit_length()):
            moved = (steps >> bit) % 2 == 1
            queries[:, :, moved] = view.rotate(queries[:, :, moved], 1 << bit)
        batch, heads, _, dim = view.kv.keys.shape
        turn = mean_turn(view.rotate, self.future, torch.eye(dim, device=queries.device))
        return (queries @ turn).view(batch, heads, -1, window, dim)


def mean_turn(rotate: Rotate, count: int, eye: Tensor) -> Tensor:
    """Return the mean of the turns by 0, 1, ..., count - 1 positions: [D, D], to multiply rows with. eye: [D, D]."""
    total, done = torch.zeros_like(eye), 0
    for digit in f"{count:b}":  # sums over twice as many turns, and one more where the digit says so
        total, done = total + total @ rotate(eye, done), 2 * done
        if digit == "1":
            total, done = total + rotate(eye, done), done + 1
    return total / count
