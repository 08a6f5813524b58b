"""Leverage: keep the tokens whose keys, before RoPE, the other keys of their head explain least.

Source: https://arxiv.org/abs/2507.08143 (Compactor), the half of it that reads no attention, as kvpress has it
(LeverageScorePress). Keys are centred over the prompt and multiplied by a Gaussian matrix of D x `sketch`: X. A token
is worth its statistical leverage, the diagonal of X (X'X + `ridge`)^-1 X'. The first 8 and the last 4 tokens are kept
and left out of it, as in kvpress's Compactor; `kvpress` is the bare press, which keeps neither.
Differences: the attention half is left out; `compactor` has both. Keys carry RoPE, so each is turned
forward to the end of the prompt: one turn for all, which no leverage depends on. The matrix is drawn from a seed, layer
by layer, and left out where it has as many columns as a key or more (leverage is then exact; kvpress's only lacks what
rounding costs). The solution is in float64, with 1e-9 of the trace added, where kvpress tries larger ridges in float32
until one serves. `kernel`, `pool` and `forward` are no part of it and off unless given.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.base import LayerView, PolicyError, at_least
from methods.registry import method
from methods.window import POOLINGS, PooledPolicy

PRESETS: dict[str, dict[str, Any]] = {"kvpress": {"sinks": 0, "recent": 0}}
CHOICES = {
    "sinks": (0, 4, 8),
    "recent": (0, 4, 16, 32),
    "sketch": (24, 48, 64),
    "ridge": (0.001, 0.01, 0.1),
    **POOLINGS,
}
CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"


@method("leverage", paper="https://arxiv.org/abs/2507.08143", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class Leverage(PooledPolicy):
    """Tokens of the highest leverage among the keys of their head.

    sketch: columns of the random matrix; ridge: added to the diagonal of what is inverted.
    """

    sinks: int = 8
    recent: int = 4
    sketch: int = 48
    ridge: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "sketch")
        at_least(self, 0, "ridge")

    def score(self, view: LayerView) -> Tensor:
        first, end = self.scored(view.tokens)
        return self.pooled(pad(self.leverage(view), (first, view.tokens - end)))

    def scored(self, tokens: int) -> tuple[int, int]:
        """Return the first token with a score and the end of those: what is kept anyway has none."""
        first = min(self.sinks, tokens - 1)
        return first, max(first + 1, tokens - self.recent)

    def leverage(self, view: LayerView) -> Tensor:
        """Leverage of the tokens with a score: [B, H, T'] float32."""
        first, end = self.scored(view.tokens)
        live = (view.kv.positions >= 0)[:, :, first:end, None]
        keys = upright(view)[:, :, first:end] * live
        centred = (keys - keys.sum(dim=2, keepdim=True) / live.sum(dim=2, keepdim=True).clamp(min=1)) * live
        return leverage(self._sketched(view.finite(centred, "keys"), view.index), self.ridge)

    def _sketched(self, keys: Tensor, layer: int) -> Tensor:
        """Keys [B, H, S, D] times a matrix of their head: [B, H, S, sketch]."""
        _, heads, _, dim = keys.shape
        if self.sketch >= dim:
            return keys
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        drawn = torch.randn(heads, dim, self.sketch, generator=generator, pin_memory=keys.is_cuda)
        return keys @ drawn.to(keys.device, non_blocking=True) / math.sqrt(self.sketch)


def leverage(rows: Tensor, ridge: float) -> Tensor:
    """Leverage of each of some rows [B, H, S, k] among them: [B, H, S] float32, from 0 to 1."""
    x = rows.double()
    gram = x.transpose(2, 3) @ x  # [B, H, k, k]
    added = ridge + 1e-9 * gram.diagonal(dim1=2, dim2=3).sum(dim=-1)[..., None, None] + torch.finfo(x.dtype).tiny
    factor = torch.linalg.cholesky_ex(gram + added * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).L
    whitened = torch.linalg.solve_triangular(factor, x.transpose(2, 3), upper=False)
    found: Tensor = whitened.square().sum(dim=2)
    return found.float()


def upright(view: LayerView) -> Tensor:
    """Keys of a layer as if all were at the end of the prompt: [B, H, S, D] float32."""
    if view.rotate is None:
        raise PolicyError("leverage needs rotary embeddings, which this model has not")
    return view.rotate(view.kv.keys.float(), view.seen - view.kv.positions)
