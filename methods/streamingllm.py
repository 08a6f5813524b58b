"""StreamingLLM: keep the first few tokens, which act as attention sinks, and the most recent ones.

Source: https://arxiv.org/abs/2309.17453 (4 sinks; positions counted inside the cache; evicts while decoding).
Plain `streamingllm` compresses once, at the end of prefill, with true positions, as KVCache-Factory and kvpress do;
`reassign` adds the position re-assignment and `paper` also goes on evicting while decoding.
Difference: re-assignment turns the sinks' keys forward until they touch the recent tokens, instead of turning the
recent keys back; RoPE sees only differences of positions, so the attention is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import KV, EvictionPolicy, LayerView, PolicyError, StepView
from methods.registry import method

PRESETS = {
    "paper": {"reassign": True, "evict": True},
    "reassign": {"reassign": True},
    "kvcf": {},
    "kvpress": {},
}


@method("streamingllm", paper="https://arxiv.org/abs/2309.17453", presets=PRESETS)
@dataclass(frozen=True)
class StreamingLLM(EvictionPolicy):
    """The first 4 tokens and the most recent ones."""

    sinks: int = 4
    reassign: bool = False
    evict: bool = False

    @property
    def evicts_while_decoding(self) -> bool:
        return self.evict

    def score(self, view: LayerView) -> Tensor:
        return view.kv.positions.float()

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        kv = super().compress_layer(view, budget)
        if self.reassign and budget < view.tokens:
            sinks = min(self.sinks, budget)
            if view.rotate is None:
                raise PolicyError("re-assigning positions needs rotary embeddings, which this model has not")
            kv.keys[:, :, :sinks] = view.rotate(kv.keys[:, :, :sinks], view.tokens - budget)
        return kv

    def after_step(self, step: StepView) -> Tensor:
        kv = step.kv
        sink = (kv.positions >= 0) & (kv.positions < self.sinks)
        old = kv.positions.masked_fill(sink | (kv.positions < 0), torch.iinfo(torch.int64).max)
        victim = old.argmin(dim=-1)
        full = kv.live > step.budget
        if self.reassign and bool(full.any()):
            assert step.rotate is not None
            turned = step.rotate(kv.keys, 1)
            kv.keys.copy_(torch.where((sink & full.unsqueeze(-1)).unsqueeze(-1), turned, kv.keys))
        return victim.masked_fill(~full, -1)
