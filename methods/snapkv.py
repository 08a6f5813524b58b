"""SnapKV: keep what the last prompt tokens attend to, pooled so that whole phrases survive.

Source: https://arxiv.org/abs/2404.14469, defaults as in the official LongBench configs (window 32, kernel 7, max pool).
Differences: scores are averaged over the query group of a KV head, so that slots are stored once per KV head
(the official code stores them once per query head); `kvcf` is KVCache-Factory's window of 8 under the same rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from methods.base import EvictionPolicy, LayerView, Needs, PolicyError, at_least
from methods.registry import method

PRESETS = {
    "paper": {"recent": 32, "kernel": 7, "pool": "max"},
    "kvcf": {"recent": 8, "kernel": 7, "pool": "max"},
    "kvpress": {"recent": 64, "kernel": 5, "pool": "avg"},
    "w8k13": {"recent": 8, "kernel": 13, "pool": "avg"},
}


@method("snapkv", paper="https://arxiv.org/abs/2404.14469", presets=PRESETS)
@dataclass(frozen=True)
class SnapKV(EvictionPolicy):
    """Top tokens by pooled attention of the last `recent` queries; one set per KV head."""

    recent: int = 32
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"

    def __post_init__(self) -> None:
        at_least(self, 1, "recent")
        check_kernel(self.kernel)

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent)

    def score(self, view: LayerView) -> Tensor:
        return pool(votes(view, self.recent), self.kernel, self.pool, self.recent)


def plain_scores(view: LayerView, recent: int, kernel: int, pooling: Literal["max", "avg"] = "max") -> Tensor:
    """Return the scores of plain SnapKV, [B, H, T] float32; computed once for all methods that choose by them."""
    plain = SnapKV(recent, kernel, pooling)
    return view.memo((SnapKV, plain), plain.score)


def votes(view: LayerView, window: int) -> Tensor:
    """Average attention of the last `window` tokens over them and the query group: [B, H, T]. Computed once."""
    return view.memo(("votes", window), lambda layer: layer.attention(window).mean(dim=(2, 3)))


def check_kernel(kernel: int) -> None:
    """Raise PolicyError for a pooling width that has no middle."""
    if isinstance(kernel, int) and (kernel < 1 or kernel % 2 == 0):
        raise PolicyError(f"kernel={kernel} has no middle; give an odd number, 1 for no pooling")


def pool(attention: Tensor, kernel: int, kind: str, recent: int) -> Tensor:
    """Pool scores [B, H, T] over `kernel` neighbours among the tokens before the window; the window is left as is."""
    pooling = max_pool1d if kind == "max" else avg_pool1d
    return before_window(attention, recent, lambda scores: pooling(scores, kernel, stride=1, padding=kernel // 2))


def before_window(attention: Tensor, recent: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change scores [B, H, T] of the tokens before the last `recent` ones; those of the window are left as they are."""
    before = max(0, attention.shape[-1] - recent)
    if before == 0:
        return attention
    return torch.cat([change(attention[..., :before]), attention[..., before:]], dim=-1)
