"""HeadKV: SnapKV's choice of tokens, with more slots for heads that look at what answers come from.

Source: https://arxiv.org/abs/2410.19258 and its LongBench runner (window 8, kernel 7, max pool, beta 1.005 first). A
head's slots outside the window are an even base and its share of a common pool, 1 / beta of all of them, by its
importance: how much attention the tokens of an answer pay to the sentence that holds it, with the full cache.
Differences: importance comes from CompilerKV's calibration prompts and travels with its tables (the authors': needle
tests of their own); it is all attention mass on the sentence, where the code takes that of the tokens among as many top
ones as the sentence has, of tests that were answered right; it is per KV head, so that slots are stored once per KV
head (the authors' code stores them once per query head). The budget is spent exactly (whole slots by largest remainder,
what a head has no room for goes to the others), where the code rounds each head and may over- or underspend. Heads of a
model without tables share evenly.
"""

from dataclasses import dataclass

from torch import Tensor

from methods.base import at_least
from methods.compilerkv.head_budgets import HeadBudgets
from methods.compilerkv.policy import AUTO
from methods.compilerkv.tables import Tables, one_pass
from methods.registry import method
from methods.window import POOLINGS, WINDOWS

BETAS = (1.005, 1.01, 1.1, 1.2, 1.5, 2.0, 5.0, 10.0)
"""Those that the authors' runner names."""
PRESETS = {"paper": {"recent": 8, "kernel": 7, "pool": "max", "beta": 1.005}}
CHOICES = {"recent": WINDOWS, **POOLINGS, "beta": BETAS}


@method(
    "headkv",
    paper="https://arxiv.org/abs/2410.19258",
    code="https://github.com/FYYFU/HeadKV at 0862a09",
    presets=PRESETS,
    choices=CHOICES,
)
@dataclass(frozen=True)
class HeadKV(HeadBudgets):
    """SnapKV with a slot budget for each layer and KV head by its importance.

    tables: as in `compilerkv`. beta: one part in beta of the slots outside the window is given out by importance.
    """

    recent: int = 8
    tables: str = AUTO
    beta: float = 1.005

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "beta")

    def multiples(self, tables: Tables, budget: int) -> Tensor:
        return one_pass(tables.importance[0], 1 / self.beta)
