"""FullKV: the uncompressed cache, the reference every other method is compared with."""

from dataclasses import dataclass

from methods.base import KV, Kind, LayerPolicy, LayerView
from methods.registry import method


@method("fullkv", paper="https://arxiv.org/abs/1706.03762", presets={"paper": {}})
@dataclass(frozen=True)
class FullKV(LayerPolicy):
    """Keeps every token."""

    @property
    def kind(self) -> Kind:
        return "whole"

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        return view.kv
