"""HeadKV-style budgets: SnapKV's choice of tokens, with more slots for heads that look at what answers come from.

Source: https://arxiv.org/abs/2410.19258. A head's budget is an even base plus its share of a common pool, by how much
attention the tokens of an answer pay to the sentence that holds it, on calibration prompts with the full cache.
Differences: importance is the attention mass itself instead of hits among the top tokens, per KV head; the share of the
pool is chosen on calibration prompts (`harness.compiler.retrieval_heads`). The budgets travel with CompilerKV's tables,
whose calibration prompts they come from.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from methods.base import KV, KVPolicy, LayerView, Needs, PromptView, Sizes, at_least
from methods.compilerkv.form import best_slots, slot_counts
from methods.compilerkv.policy import AUTO, CompilerKV
from methods.registry import method
from methods.window import check_kernel, per_query_head, window_scores


@method("headkv", paper="https://arxiv.org/abs/2410.19258")
@dataclass(frozen=True)
class HeadKV(KVPolicy):
    """SnapKV with a slot budget for each layer and KV head. tables: as in `compilerkv`; uniform budgets without any."""

    recent: int = 32
    kernel: int = 7
    tables: str = AUTO

    def __post_init__(self) -> None:
        at_least(self, 1, "recent")
        check_kernel(self.kernel)

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent)

    def for_model(self, revision: str) -> "HeadKV":
        return replace(self, tables=self._lookup().for_model(revision).tables)

    def provenance(self) -> dict[str, Any]:
        return self._lookup().provenance()

    def fitted_on(self) -> frozenset[str]:
        return self._lookup().fitted_on()

    def check(self, view: PromptView) -> None:
        self._lookup().check(view)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return per_query_head(sizes) + self._lookup().notes(budget, sizes)

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]]:
        counts = slot_counts(self._lookup().shares(sizes, budget), budget, sizes, window=self.recent)
        return [partial(self._kept, own) for own in counts]

    def _kept(self, counts: list[int], layer: LayerView) -> KV:
        scores = window_scores(layer, self.recent, self.kernel, "max")
        return layer.kv.take(best_slots(scores, counts, recent=self.recent))

    def _lookup(self) -> CompilerKV:
        return CompilerKV(tables=self.tables, budgets="retrieval")
