"""Layer-shared SnapKV: SnapKV's scores averaged over all heads, so that one set of tokens serves a whole layer.

A control, not a published method: methods that share one set per layer (CompilerKV) must beat this, not SnapKV.
Source: https://arxiv.org/abs/2404.14469 for the scores and presets, as in `snapkv`.
Differences: all query heads of a layer are averaged, where SnapKV averages none and our `snapkv` a query group.
"""

from dataclasses import dataclass

from torch import Tensor

from methods.base import LayerView
from methods.registry import method
from methods.snapkv import PRESETS
from methods.window import WindowPolicy, votes


@method("snapkv_shared", paper="https://arxiv.org/abs/2404.14469", presets=PRESETS)
@dataclass(frozen=True)
class SnapKVShared(WindowPolicy):
    """SnapKV with one kept set per layer, its heads averaged."""

    def score(self, view: LayerView) -> Tensor:
        attention = votes(view, self.recent).mean(dim=1, keepdim=True)  # [B, 1, T]
        return self.pooled(attention).expand(-1, view.kv.keys.shape[1], -1)
