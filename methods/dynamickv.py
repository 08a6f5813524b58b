"""DynamicKV: SnapKV's tokens, with the slots of the prompt shared out between layers by one top-k over all of them.

Source: https://arxiv.org/abs/2412.14838 and its released code. Every layer may hold up to `ratio` times the mean
budget; it gets slots in proportion to how many of the best scores of all layers and heads are its own, so budgets
follow the task. All heads of a layer have the same number. `paper`: window 8 and ratio 10 as the code defaults, kernel
7, max pool as in its published example; `runner`: the defaults of its LongBench script (window 16, average, ratio 5).
Two of its four scripts, those of Mistral and Qwen2, pool by maximum; two, those of Llama 3 and InternLM 2.5, by average
(`pool=avg`).
Differences: shares are counted once, over all layers. The code also counts after every fourth layer, to free memory
while the prompt is read, and cuts the layers read so far to their shares of that count; what it has cut, a later count
that gives a layer more does not bring back, so its results can differ. A prefill shared by all methods cannot do so.
The budget is spent exactly (largest remainder; slots that no layer earned go evenly to those with room), where the code
floors and gives the rest to the last layer. A budget within the window is shared evenly. Scores of a query group are
averaged, so that slots are stored once per KV head, where the code stores them once per query head.
"""

from dataclasses import dataclass
from typing import Any

import torch

from methods.base import KV, KVPolicy, Needs, PromptView, Sizes, at_least, best, spread
from methods.device import read
from methods.registry import method
from methods.window import Pooling, WindowPolicy, check_kernel, per_query_head, window_scores

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"recent": 8, "kernel": 7, "pool": "max", "ratio": 10.0},
    "runner": {"recent": 16, "kernel": 7, "pool": "avg", "ratio": 5.0},
}
CODE = "https://github.com/DreamMr/DynamicKV at 8ab3c08"
LEAST = 1e-6  # of a layer with no score among the best; it fills only what the others have no room for


@method("dynamickv", paper="https://arxiv.org/abs/2412.14838", code=CODE, presets=PRESETS)
@dataclass(frozen=True)
class DynamicKV(KVPolicy):
    """SnapKV with a layer's budget from its part of the prompt's best scores."""

    recent: int = 8
    kernel: int = 7
    pool: Pooling = "max"
    ratio: float = 10.0

    def __post_init__(self) -> None:
        at_least(self, 1, "recent", "ratio")
        check_kernel(self.kernel)

    @property
    def needs(self) -> Needs:
        return Needs(window=self.recent)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        budgets = self.budgets(view, budget)
        plain = WindowPolicy(recent=self.recent, kernel=self.kernel, pool=self.pool)
        return [plain.compress_layer(layer, own) for layer, own in zip(view.layers, budgets, strict=True)]

    def budgets(self, view: PromptView, budget: int) -> list[int]:
        """Return the slots per KV head of each layer; they sum to L * min(budget, T)."""
        layers, before = len(view.layers), view.tokens - self.recent
        mean = min(budget, view.tokens) - self.recent  # slots outside the window, on average over the layers
        if mean <= 0 or before <= 0:
            return [min(budget, view.tokens)] * layers
        scores = [layer.only_live(window_scores(layer, self.recent, self.kernel, self.pool)) for layer in view.layers]
        pooled = torch.cat(scores)[..., :before]  # [L, H, T - W]
        owner = best(pooled.flatten(), mean * layers * pooled.shape[1]) // pooled[0].numel()
        live = torch.stack([layer.kv.live[0, 0] for layer in view.layers])
        shares = torch.zeros_like(live).scatter_add_(0, owner, torch.ones_like(owner))
        found, held = read([shares, live])
        weights = [max(float(count), LEAST) for count in found]
        room = [min(int(self.ratio * mean), own - self.recent) for own in held]
        return [self.recent + n for n in spread(mean * layers, weights, room)]

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        even = ("layers share evenly at this budget: it holds the window alone",)
        return per_query_head(sizes) + (() if budget > self.recent else even)
