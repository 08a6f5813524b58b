"""H2O: keep the heavy hitters, the tokens that collected most attention, and the most recent ones.

Source: https://arxiv.org/abs/2306.14048. Half of the budget is heavy hitters, half recent tokens; scores are the
attention a token received from every query so far, summed. Plain `h2o` compresses once, at the end of prefill, like the
methods it is compared with; `paper` goes on evicting while decoding, with its running sums paid out of the budget
(when the last prompt token is held back and fed again, its query is counted twice in those sums).
Differences: sums over the query group of a KV head, so that slots are stored once per KV head; column sums are streamed
over query blocks, so no T x T matrix exists. `kvcf` keeps 8 recent tokens; `kvpress` is ObservedAttention: mean instead
of sum, no recent part. `kernel`, `pool`, `forward` and `sinks` are no part of the paper and off unless given.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from methods.base import KV, LayerView, Needs, PolicyError, StepView, at_least, at_most
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, PooledPolicy

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"evict": True},
    "kvcf": {"recent": 8, "recent_share": 0.0},
    "kvpress": {"recent_share": 0.0, "mean": True},
}
CHOICES = {
    "recent": (0, *WINDOWS),
    "recent_share": (0.0, 0.1, 0.25, 0.5, 0.75, 0.9),
    "mean": (False, True),
    "sinks": (0, 4),
    **POOLINGS,
}
SUM_BYTES = 4  # a running sum is float32


@method("h2o", paper="https://arxiv.org/abs/2306.14048", presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class H2O(PooledPolicy):
    """Half the slots to the most attended tokens, half to the most recent ones."""

    recent: int = 0
    sinks: int = 0
    recent_share: float = 0.5
    mean: bool = False
    evict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "recent_share")
        at_most(self, 1, "recent_share")

    @property
    def redundant(self) -> bool:
        return super().redundant or (self.recent > 0 and self.recent_share > 0)  # the greater one counts

    @property
    def needs(self) -> Needs:
        return Needs(column_sums=True, decode_attention=self.evict)

    def recent_slots(self, budget: int) -> int:
        return min(budget, max(self.recent, budget - int(budget * (1 - self.recent_share))))

    def score(self, view: LayerView) -> Tensor:
        return self.pooled(self._received(view))

    def _received(self, view: LayerView) -> Tensor:
        return view.memo(("received", self.mean), self._sums)

    def _sums(self, view: LayerView) -> Tensor:
        if view.column_sums is None:
            raise PolicyError("h2o needs column sums; declare them in needs")
        sums = view.finite(view.column_sums.sum(dim=2), "column sums")  # [B, H, T]
        queries = view.seen - view.kv.positions
        return sums / queries / view.column_sums.shape[2] if self.mean else sums

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        if not self.evict:
            return super().compress_layer(view, budget)
        slots = self.select(view, _slots(view.kv, budget))
        kv = view.kv.take(slots)
        kv.extra["sums"] = self._received(view).gather(2, slots)
        return kv

    def after_step(self, step: StepView) -> Tensor:
        kv, budget = step.kv, _slots(step.kv, step.budget)
        assert step.attention is not None
        sums = kv.extra["sums"]
        sums.masked_fill_(kv.positions == step.position, 0.0)  # the new token's slot may hold an old sum
        sums += step.attention.sum(dim=2)
        heavy = (kv.positions >= self.sinks) & (kv.positions <= step.position - self.recent_slots(budget))
        victim = sums.masked_fill(~heavy, float("inf")).argmin(dim=-1)
        return victim.masked_fill(kv.live <= budget, -1)


def _slots(kv: KV, budget: int) -> int:
    """Slots that fit `budget` plain slots' bytes when each carries a running sum."""
    return max(1, budget * kv.slot_bytes // (kv.slot_bytes + SUM_BYTES))
