"""Scores pooled over neighbours, and what the last prompt tokens attend to: what SnapKV and its descendants share.

Source: https://arxiv.org/abs/2404.14469. Shape letters as in `methods.base`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from methods.base import EvictionPolicy, LayerView, Needs, PolicyError, Sizes, at_least
from methods.budget import quoted

Pooling = Literal["max", "avg"]
POOLINGS = {"kernel": (1, 5, 7, 13, 21), "pool": ("max", "avg"), "forward": (False, True)}
"""Values of the three that `harness tune` tries, for every method that pools."""
MOST_KERNEL = 65_536
WINDOWS = (4, 8, 16, 32, 64)
"""Values of `recent` that it tries, besides those of a method's own."""


@dataclass(frozen=True)
class PooledPolicy(EvictionPolicy):
    """Top tokens by scores >= 0, pooled over their neighbours among the tokens before the last `recent` ones.

    kernel: tokens that a score is pooled over, centred on its own; forward: the ones before it and its own instead.
    """

    kernel: int = 1
    pool: Pooling = "max"
    forward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel, self.forward)

    @property
    def redundant(self) -> bool:
        return self.kernel == 1 and (self.pool, self.forward) != ("max", False)

    def pooled(self, scores: Tensor) -> Tensor:
        """Pool scores [B, H, T] >= 0, as they are where `kernel` is 1."""
        return scores if self.kernel == 1 else pool(scores, self.kernel, self.pool, self.recent, forward=self.forward)


@dataclass(frozen=True)
class WindowPolicy(PooledPolicy):
    """Top tokens by pooled attention of the last `recent` queries, averaged over the query group of a KV head."""

    recent: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        at_least(self, 1, "recent")
        super().__post_init__()

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return () if budget > self.recent else ("its window alone: this budget holds no other token",)

    def score(self, view: LayerView) -> Tensor:
        return window_scores(view, self.recent, self.kernel, self.pool, self.forward)


def window_scores(view: LayerView, window: int, kernel: int, pooling: Pooling, forward: bool = False) -> Tensor:
    """Return pooled votes, [B, H, T] float32; computed once for all methods that choose by them."""
    key = ("window scores", window, kernel, pooling, forward)
    return view.memo(key, lambda layer: pool(votes(layer, window), kernel, pooling, window, forward=forward))


def per_query_head(sizes: Sizes) -> tuple[str, ...]:
    """Return what to note of a method whose authors store every slot once per query head; nothing without groups."""
    group = sizes.query_heads // sizes.kv_heads
    return (f"its authors' code stores slots per query head: {group} times these bytes",) if group > 1 else ()


def votes(view: LayerView, window: int) -> Tensor:
    """Average attention of the last `window` tokens over them and the query group: [B, H, T]. Computed once."""
    return view.memo(("votes", window), lambda layer: _votes(layer, window))


def _votes(layer: LayerView, window: int) -> Tensor:
    return layer.finite(layer.attention(window).mean(dim=(2, 3)), "attention weights")


def check_kernel(kernel: int, forward: bool = False) -> None:
    """Raise PolicyError for a pooling width out of range, or one that is centred and has no middle."""
    if isinstance(kernel, int) and kernel > MOST_KERNEL:
        raise PolicyError(f"kernel={quoted(kernel)} is wider than any sense; give at most {MOST_KERNEL}")
    if isinstance(kernel, int) and (kernel < 1 or (kernel % 2 == 0 and not forward)):
        raise PolicyError(f"kernel={kernel} has no middle; give an odd number, 1 for no pooling")


def pool(scores: Tensor, kernel: int, kind: Pooling, recent: int, *, forward: bool = False) -> Tensor:
    """Pool scores [B, H, T] over `kernel` neighbours among the tokens before the window; the window is left as is."""
    return before_window(scores, recent, lambda before: pooled(before, kernel, kind, forward=forward))


def pooled(scores: Tensor, kernel: int, kind: Pooling, *, forward: bool = False) -> Tensor:
    """Pool scores [B, H, T] >= 0 over `kernel` neighbours: centred, or each with the kernel - 1 before it."""
    left = kernel - 1 if forward else kernel // 2
    pooling: Callable[..., Tensor] = max_pool1d if kind == "max" else avg_pool1d
    return pooling(pad(scores, (left, kernel - 1 - left)), kernel, stride=1)


def before_window(scores: Tensor, recent: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change scores [B, H, T] of the tokens before the last `recent` ones; those of the window are left as they are."""
    before = max(0, scores.shape[-1] - recent)
    if before == 0:
        return scores
    return torch.cat([change(scores[..., :before]), scores[..., before:]], dim=-1)
