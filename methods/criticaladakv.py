"""CriticalAdaKV: CriticalKV's choice of tokens, with the slots of a layer shared out between its heads as in Ada-KV.

Source: https://arxiv.org/abs/2502.03805; its authors' code is that of kvpress (criticalkv_press.py:108-200 at kvpress
8bb29b9). The scores of `over` alone say how many slots each head has; `criticalkv` tells the rest. Where `over` sets
each head's own best `safeguard` aside, these are kept by score, as kvpress does: `kvpress` is over its SnapKV. Plain
`criticaladakv` shares out by the rule of Ada-KV's paper.
Differences: those of `criticalkv` and of `adakv`; what a head gives up is freed, where kvpress masks it.
"""

from dataclasses import dataclass
from typing import Any

from methods.criticalkv import CODE, CriticalKV
from methods.registry import method

PRESETS: dict[str, dict[str, Any]] = {"paper": {"over": "adakv"}, "kvpress": {"over": "adakv@kvpress"}}
CHOICES = {
    "over": ("adakv", "adakv@kvcf", "adakv@kvpress"),
    "share": (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75),
    "epsilon": (1e-5, 1e-4, 1e-3, 1e-2),
}


@method("criticaladakv", paper="https://arxiv.org/abs/2502.03805", code=CODE, presets=PRESETS, choices=CHOICES)
@dataclass(frozen=True)
class CriticalAdaKV(CriticalKV):
    """As many slots as Ada-KV gives a head; those beyond its best by score times the norm of W_o v."""

    over: str = "adakv"

    def sure(self, budget: int) -> int:
        own_best = getattr(self.inner, "floor", True)  # not by an even share of what the others get
        return int((getattr(self.inner, "safeguard", None) or 0) * budget) if own_best else 0
