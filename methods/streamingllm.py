"""StreamingLLM: keep the first few tokens, which act as attention sinks, and the most recent ones.

Source: https://arxiv.org/abs/2309.17453 (4 sinks; positions counted inside the cache; evicts while decoding).
Plain `streamingllm` compresses once, at the end of prefill, with true positions, as KVCache-Factory and kvpress do;
`reassign` adds the position re-assignment and `paper` also goes on evicting while decoding.
Differences: re-assignment turns the sinks' keys forward until they touch the recent tokens, instead of turning the
recent keys back; RoPE sees only differences of positions, so the attention is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import KV, EvictionPolicy, LayerView, PolicyError, StepView
from methods.registry import method
from methods.views import Rotate

PRESETS = {"paper": {"reassign": True, "evict": True}, "reassign": {"reassign": True}, "kvcf": {}, "kvpress": {}}


@method("streamingllm", paper="https://arxiv.org/abs/2309.17453", presets=PRESETS)
@dataclass(frozen=True)
class StreamingLLM(EvictionPolicy):
    """The first 4 tokens and the most recent ones."""

    sinks: int = 4
    reassign: bool = False
    evict: bool = False

    @property
    def turns_keys(self) -> bool:
        return self.reassign

    def score(self, view: LayerView) -> Tensor:
        return view.kv.positions.float()

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        kv = super().compress_layer(view, budget)
        if not self.reassign or budget >= view.tokens:
            return kv
        if view.rotate is None:
            raise PolicyError("re-assigning positions needs rotary embeddings, which this model has not")
        sinks, shift = min(self.sinks, budget), view.tokens - budget
        turn = (sinks, shift, view.seen - shift, view.rotate)
        moved = ReassignedKV(kv.keys, kv.values, kv.positions, {}, *turn)
        return moved if self.evict else KV(*moved.load(), kv.positions)

    def after_step(self, step: StepView) -> Tensor:
        kv = step.kv
        kept = (kv.positions < 0) | (kv.positions < self.sinks)
        victim = kv.positions.masked_fill(kept, torch.iinfo(kv.positions.dtype).max).argmin(dim=-1)
        full = kv.live > step.budget
        if isinstance(kv, ReassignedKV):
            kv.shift = max(kv.shift, step.position + 1 - kv.start)
        return victim.masked_fill(~full, -1)


@dataclass
class ReassignedKV(KV):
    """Slots whose first `sinks` are read `shift` positions later than they were; what is stored is never turned.

    start: tokens that there are, less the shift, which is as many more as come beyond them.
    """

    sinks: int = 0
    shift: int = 0
    start: int = 0
    rotate: Rotate | None = None

    def load(self) -> tuple[Tensor, Tensor]:
        assert self.rotate is not None
        turned = self.rotate(self.keys[:, :, : self.sinks], self.shift)
        return torch.cat([turned, self.keys[:, :, self.sinks :]], dim=2), self.values
