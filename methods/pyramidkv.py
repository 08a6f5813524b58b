"""PyramidKV: SnapKV's scores, with more slots in low layers than in high ones.

Source: https://arxiv.org/abs/2406.02069 and its LongBench runner (window 8, kernel 7, max pool, beta 20). A layer's
slots outside the window fall from 2 - 1 / beta times their mean to 1 / beta times it; the first layer's are at most the
prompt's. A prompt shorter than twice the mean gets a flat pyramid, every layer the same, and the record says so.
Differences: the budget is spent exactly (whole slots by largest remainder, where the runner's floors overspend). A
budget within the window is flat, where the runner stops. Scores of a query group are averaged, so that slots are stored
once per KV head, as the runner does where asked for (`kv_cache_granularity`). `kvpress` builds the pyramid over the
whole budget, window included, for prompts of any length, and is flat whenever its smallest layer would be smaller than
the window.
"""

from dataclasses import dataclass

from methods.base import Sizes, at_least, spread
from methods.registry import method
from methods.window import POOLINGS, WINDOWS, WindowPolicy, per_query_head

PRESETS = {
    "paper": {"recent": 8, "kernel": 7, "pool": "max", "beta": 20},
    "kvcf": {"recent": 8, "kernel": 7, "pool": "max", "beta": 20},
    "kvpress": {"recent": 64, "kernel": 5, "pool": "avg", "beta": 20, "window_on_top": False},
}
CHOICES = {"recent": WINDOWS, **POOLINGS, "beta": (5, 10, 20, 40)}
CODE = "https://github.com/Zefan-Cai/KVCache-Factory at c97f9d7"


@method("pyramidkv", paper="https://arxiv.org/abs/2406.02069", code=CODE, presets=PRESETS, choices=CHOICES)
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
        short = tokens < 2 * mean if self.window_on_top else low < self.recent
        flat = mean <= 0 or low > high or layers == 1 or short
        if flat:
            return [min(budget, tokens)] * layers
        weights = [high - (high - low) * i / (layers - 1) for i in range(layers)]
        nearest = [round(slots) for slots in weights]  # as kvpress; the line is symmetric, so roundings cancel
        if not self.window_on_top and sum(nearest) == layers * mean:
            return nearest
        return [base + slots for slots in spread(layers * mean, weights, tokens - base)]

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        flat = len(set(self.layer_budgets(budget, sizes.tokens, sizes.layers))) == 1
        shape = ("pyramid is flat at this budget",) if flat else ()
        return per_query_head(sizes) + super().notes(budget, sizes) + shape
