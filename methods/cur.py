"""CUR: keep the tokens whose keys and values are long beside those around them.

Source: https://arxiv.org/abs/2509.15038 (CurDKV) and its press in kvpress (`cur_press.py` at 8bb29b9), whose defaults
are ours. The approximate leverage of a token's key is its squared length, as a part of the sum over its stretch of
`local` tokens; the same of its value; the two are multiplied (`of`). No attention is read; the first tokens are kept.
`projected` multiplies keys and values by a Gaussian matrix of 20 columns first, the random leverage of the paper.
Differences: the matrix is drawn from a seed, layer by layer, where kvpress draws it anew each time. Each sum is over
the tokens of the stretch that there are. Stretches of zeros are worth 0, where kvpress divides by zero. `recent`,
`kernel`, `pool` and `forward` are no part of it and off unless given.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.base import LayerView, at_least
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, PooledPolicy

PRESETS: dict[str, dict[str, Any]] = {"kvpress": {}, "projected": {"columns": 20}}
CHOICES = {
    "sinks": (0, 4),
    "recent": (0, *WINDOWS),
    "of": ("product", "mean", "key", "value"),
    "local": (0, 16, 64),
    **POOLINGS,
}
CODE = "https://github.com/NVIDIA/kvpress at 8bb29b9"
Of = Literal["product", "mean", "key", "value"]


@method("cur", paper="https://arxiv.org/abs/2509.15038", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class CUR(PooledPolicy):
    """Tokens by the approximate leverage of their keys and values.

    local: tokens of a stretch, 0 for the whole prompt as one; columns: of the random matrix, 0 for none.
    """

    recent: int = 0
    sinks: int = 4
    of: Of = "product"
    local: int = 16
    columns: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "local", "columns")

    def score(self, view: LayerView) -> Tensor:
        keys, values = view.kv.keys.float(), view.kv.values.float()
        if self.columns:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + view.index)
            drawn = torch.randn(keys.shape[-1], self.columns, generator=generator, pin_memory=keys.is_cuda)
            drawn = drawn.to(keys.device, non_blocking=True)
            keys, values = keys @ drawn, values @ drawn
        dead = view.kv.positions < 0
        key, value = (self._parts(x.square().sum(dim=-1).masked_fill(dead, 0.0)) for x in (keys, values))
        return self.pooled({"product": key * value, "mean": (key + value) / 2, "key": key, "value": value}[self.of])

    def _parts(self, lengths: Tensor) -> Tensor:
        """Parts of the sum over each stretch of `local` tokens: [B, H, T] of the same."""
        tokens = lengths.shape[-1]
        size = self.local or tokens
        cut = pad(lengths, (0, -tokens % size)).view(*lengths.shape[:2], -1, size)
        sums = cut.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(cut.dtype).tiny)
        return (cut / sums).flatten(2)[..., :tokens]
