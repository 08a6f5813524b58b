"""DuoAttention: retrieval heads keep the whole prompt, streaming heads the first and the most recent tokens.

Source: https://arxiv.org/abs/2410.10819 and its runners (64 sinks and 256 recent tokens, scripts/longbench.sh at
duo-attention fe93c31); `kvpress` has the 128 sinks that gates were trained with. As many heads are whole as the budget
pays for, the most important first; the next one holds what is left, in recent tokens.
Differences: the authors train a gate for each head, for six models; here the importance of heads in CompilerKV's
tables ranks them, as in `headkv`: how much attention the tokens of an answer pay to the sentence that holds it. Theirs
has no budget, so no streaming head is shorter; here one holds `share` of the budget at most, sinks and recent tokens in
the same proportion, or a small one would leave no head whole. Of .1 to .75 this share lost least on calibration
prompts. Streaming heads are cut once, after the prefill, as in kvpress, and grow from there; the prefill sees all
tokens in every head. Without tables heads share evenly, and all of them stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from methods.base import KV, KVPolicy, LayerView, PromptView, Sizes, at_least, at_most
from methods.compilerkv.form import best_slots
from methods.compilerkv.policy import AUTO, CompilerKV
from methods.registry import method

PRESETS: dict[str, dict[str, Any]] = {"paper": {"sinks": 64, "recent": 256}, "kvpress": {"sinks": 128, "recent": 256}}
CHOICES = {"sinks": (4, 16, 64, 128), "recent": (32, 64, 128, 256, 512), "share": (0.1, 0.25, 0.5, 0.75, 0.9)}
CODE = "https://github.com/mit-han-lab/duo-attention at fe93c31"


@method("duoattention", paper="https://arxiv.org/abs/2410.10819", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class DuoAttention(KVPolicy):
    """The whole prompt in the most important heads, its first and last tokens in the others.

    share: the part of the budget that a streaming head holds at most. tables: as in `compilerkv`, whose importance of
    heads it takes.
    """

    sinks: int = 64
    recent: int = 256
    share: float = 0.25
    tables: str = AUTO

    def __post_init__(self) -> None:
        at_least(self, 0, "sinks", "share")
        at_least(self, 1, "recent")
        at_most(self, 1, "share")

    def for_model(self, revision: str) -> Self:
        return replace(self, tables=self._lookup().for_model(revision).tables)

    def provenance(self) -> dict[str, Any]:
        return self._lookup().provenance()

    def fitted_on(self) -> frozenset[str]:
        return self._lookup().fitted_on()

    def check(self, view: PromptView) -> None:
        self._lookup().check(view)

    @property
    def lacks(self) -> str:
        return "no tables for this model: every head streams" if self._lookup().lacks else ""

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        whole = sum(own >= sizes.tokens for row in self.counts(budget, sizes) for own in row)
        told = f"{whole} of {sizes.layers * sizes.kv_heads} heads are whole"
        return (self.lacks,) if self.lacks else (told,)

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]]:
        return [partial(self._kept, own, budget) for own in self.counts(budget, sizes)]

    def counts(self, budget: int, sizes: Sizes) -> list[list[int]]:
        """Return the slots of each layer and KV head, [L][H]; budget * L * H in all, none above the prompt."""
        tokens, heads = sizes.tokens, sizes.layers * sizes.kv_heads
        budget = min(budget, tokens)
        if self.lacks:
            return [[budget] * sizes.kv_heads] * sizes.layers
        importance = self._lookup().tables_for(sizes, budget).importance[0].flatten().tolist()
        stream = min(self._stream(budget), tokens)
        slots, spare = [stream] * heads, (budget - stream) * heads
        for head in sorted(range(heads), key=lambda head: (-importance[head], head)):
            more = min(spare, tokens - stream)
            slots[head], spare = stream + more, spare - more
        return [slots[i : i + sizes.kv_heads] for i in range(0, heads, sizes.kv_heads)]

    def _stream(self, budget: int) -> int:
        """Slots of a streaming head."""
        return budget if self.lacks else min(self.sinks + self.recent, max(1, int(self.share * budget)))

    def _kept(self, counts: list[int], budget: int, layer: LayerView) -> KV:
        sinks = min(self.sinks, self._stream(budget) * self.sinks // (self.sinks + self.recent))
        places = layer.kv.positions.float()
        scores = layer.only_live(places + (places < sinks) * float(layer.seen))
        return layer.kv.take(best_slots(scores, [min(own, layer.tokens) for own in counts], recent=0))

    def _lookup(self) -> CompilerKV:
        return CompilerKV(tables=self.tables)
