"""PyramidKV: SnapKV's scores, with more slots in low layers than in high ones.

Source: https://arxiv.org/abs/2406.02069 and its LongBench runner (window 8, kernel 7, max pool, beta 20).
Differences: the budget is spent exactly (whole slots by largest remainder, where the runner's floors overspend), and a
record says when the pyramid is flat. `kvpress` builds the pyramid over the whole budget, window included, and is flat
whenever its smallest layer would be smaller than the window.
"""

from dataclasses import dataclass

from methods.base import Sizes, at_least, spread
from methods.registry import method
from methods.window import WindowPolicy, per_query_head

PRESETS = {
    "paper": {"recent": 8, "kernel": 7, "pool": "max", "beta": 20},
    "kvcf": {"recent": 8, "kernel": 7, "pool": "max", "beta": 20},
    "kvpress": {"recent": 64, "kernel": 5, "pool": "avg", "beta": 20, "window_on_top": False},
}


@method("pyramidkv", paper="https://arxiv.org/abs/2406.02069", presets=PRESETS)
@dataclass(frozen=True)
class PyramidKV(WindowPolicy):
    """SnapKV with a budget that falls linearly from the first layer to the last."""

    recent: int = 8
    beta: int = 20
    window_on_top: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "beta")

    def layer_budgets(self, budget: int, tokens: int, layers: int) -> list[int]:
        base = self.recent if self.window_on_top else 0
        mean = min(budget, tokens) - base
        top = tokens - self.recent  # the most that a layer can hold outside the window
        low = mean / self.beta
        high = 2 * mean - low
        if high >= top:
            high, low = top, 2 * mean - top
        flat = mean <= 0 or low > high or layers == 1 or (not self.window_on_top and low < self.recent)
        if flat:
            return [min(budget, tokens)] * layers
        weights = [high - (high - low) * i / (layers - 1) for i in range(layers)]
        nearest = [round(slots) for slots in weights]  # as kvpress; the line is symmetric, so roundings cancel
        if not self.window_on_top and sum(nearest) == layers * mean:
            return nearest
        return [base + slots for slots in spread(layers * mean, weights, tokens - base)]

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        flat = len(set(self.layer_budgets(budget, sizes.tokens, sizes.layers))) == 1
        return per_query_head(sizes) + (("pyramid is flat at this budget",) if flat else ())
