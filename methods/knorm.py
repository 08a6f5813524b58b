"""Knorm: keep the keys of smallest norm, which collect most attention in most layers.

Source: https://arxiv.org/abs/2406.11430 (L2 norm of the cached key, no queries needed). `paper` leaves the first two
layers whole, as its released code does, because norm and attention do not go together there.
Differences: the whole layers are paid for by the others, so that the bytes are those asked for; where they cannot be,
every layer is compressed alike and the record says so. `kvpress` is plain `knorm`: no layer is left out.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.linalg import vector_norm

from methods.base import EvictionPolicy, LayerView, Sizes, at_least, spread
from methods.registry import method


@method("knorm", paper="https://arxiv.org/abs/2406.11430", presets={"paper": {"skip": 2}, "kvpress": {}})
@dataclass(frozen=True)
class Knorm(EvictionPolicy):
    """Tokens of the smallest key norms; the first `skip` layers whole."""

    skip: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "skip")

    def score(self, view: LayerView) -> Tensor:
        norms: Tensor = vector_norm(view.kv.keys.float(), dim=-1)
        return -norms

    def layer_budgets(self, budget: int, tokens: int, layers: int) -> list[int]:
        left = layers * budget - self.skip * tokens
        if budget >= tokens or left < layers - self.skip or self.skip >= layers:
            return [min(budget, tokens)] * layers
        return [tokens] * self.skip + spread(left, [1] * (layers - self.skip), tokens)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        tokens = sizes.tokens
        whole = not self.skip or budget >= tokens or self.layer_budgets(budget, tokens, sizes.layers)[0] == tokens
        return () if whole else ("the first layers are not left whole: the budget does not pay for them",)
