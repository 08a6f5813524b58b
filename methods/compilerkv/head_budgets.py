"""Window scores with a slot budget for each layer and KV head: what HeadKV, and SnapKV with compiled budgets, share.

The budgets are of the tables of `compilerkv`, whose calibration prompts decided them. Shape letters as in
`methods.base`.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from methods.base import KV, LayerView, PromptView, Sizes
from methods.compilerkv.form import best_slots, slot_counts
from methods.compilerkv.policy import CompilerKV
from methods.compilerkv.tables import Tables
from methods.window import WindowPolicy, per_query_head


@dataclass(frozen=True)
class HeadBudgets(WindowPolicy):
    """Top tokens by pooled attention of the last `recent` queries, as many for each head as its tables say.

    tables: folder of compiled tables, name of packaged ones, `auto` for those of the model at hand, `neutral` for none
    that know anything; empty for even budgets.
    """

    tables: str = ""

    @abstractmethod
    def multiples(self, tables: Tables, budget: int) -> Tensor:
        """Return slot multiples [L, H], mean 1."""

    def for_model(self, revision: str) -> Self:
        return replace(self, tables=self._lookup().for_model(revision).tables) if self.tables else self

    def provenance(self) -> dict[str, Any]:
        return self._lookup().provenance() if self.tables else {}

    def fitted_on(self) -> frozenset[str]:
        return self._lookup().fitted_on() if self.tables else frozenset()

    def check(self, view: PromptView) -> None:
        if self.tables:
            self._lookup().check(view)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return per_query_head(sizes) + ((self.lacks,) if self.lacks else ()) + super().notes(budget, sizes)

    @property
    def lacks(self) -> str:
        return "no tables for this model: uniform budgets" if self.tables and self._lookup().lacks else ""

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]]:
        if not self.tables:
            return super().per_layer(budget, sizes)
        shares = self.multiples(self._lookup().tables_for(sizes, budget), budget).tolist()
        return [partial(self._kept, own) for own in slot_counts(shares, budget, sizes, window=self.recent)]

    def _kept(self, counts: list[int], layer: LayerView) -> KV:
        return layer.kv.take(best_slots(layer.only_live(self.score(layer)), counts, recent=self.recent))

    def _lookup(self) -> CompilerKV:
        return CompilerKV(tables=self.tables)
