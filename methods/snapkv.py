"""SnapKV: keep what the last prompt tokens attend to, pooled so that whole phrases survive.

Source: https://arxiv.org/abs/2404.14469, defaults as in the official LongBench configs (window 32, kernel 7, max pool).
Differences: scores are averaged over the query group of a KV head, so that slots are stored once per KV head
(the official code stores them once per query head). A budget within the window keeps the last tokens of it, where the
code stops. `kvcf` is KVCache-Factory's window of 8 under the same rule, `kvpress` the defaults of kvpress. `compiled`
shares slots out by CompilerKV's compiled budgets, which tells those apart from CompilerKV's score. `w8k13` is nobody's:
it was found on LongBench rows in early experiments, so it is not independent of boards that resemble them.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from methods.compilerkv.head_budgets import HeadBudgets
from methods.compilerkv.tables import Tables
from methods.registry import method
from methods.window import POOLINGS, WINDOWS

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"recent": 32, "kernel": 7, "pool": "max"},
    "kvcf": {"recent": 8, "kernel": 7, "pool": "max"},
    "kvpress": {"recent": 64, "kernel": 5, "pool": "avg"},
    "w8k13": {"recent": 8, "kernel": 13, "pool": "avg"},
    "compiled": {"tables": "auto"},
}
CHOICES = {"recent": WINDOWS, **POOLINGS}
CODE = "https://github.com/FasterDecoding/SnapKV at e216ddc"


@method("snapkv", paper="https://arxiv.org/abs/2404.14469", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class SnapKV(HeadBudgets):
    """Top tokens by pooled attention of the last `recent` queries; one set per KV head.

    tables: as in `compilerkv`, whose compiled budgets it takes; empty for even ones.
    """

    def multiples(self, tables: Tables, budget: int) -> Tensor:
        return tables.multiples(budget, "compiled")
