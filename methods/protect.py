"""Protect: spans that the prompt's author marks are kept in every layer and KV head, and paid out of the budget.

Ours, no published method: the cure for instructions that compression forgets (the ill is told in
https://arxiv.org/abs/2510.00231). The method `over` shares out what P protected tokens leave of a budget of N, N - P
slots per layer and KV head, among the other tokens, as though the protected ones were not there: they take no slots,
no pooling and no place among its first or last tokens. What attention the others got is the whole prompt's. So a method
that ranks tokens by attention keeps the best of the others by its own scores. Both together are `over` at N slots.
A prompt that marks nothing is compressed as by `over` alone; a budget that leaves `over` no slot is skipped.
Not for methods that evict while decoding, which could drop a protected token then, nor for those that turn the keys
that they keep; codes go around it (`quant.over=protect@snapkv`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from methods.around import Around
from methods.base import KV, KVPolicy, LayerView, PolicyError, PromptView, Sizes
from methods.budget import BudgetTooSmall
from methods.device import placed
from methods.registry import method

PRESETS: dict[str, dict[str, Any]] = {
    "adakv": {"over": "adakv"},
    "chunkkv": {"over": "chunkkv"},
    "compilerkv": {"over": "compilerkv"},
    "dynamickv": {"over": "dynamickv"},
    "expected_attention": {"over": "expected_attention"},
    "h2o": {"over": "h2o"},
    "headkv": {"over": "headkv"},
    "keydiff": {"over": "keydiff"},
    "knorm": {"over": "knorm"},
    "pyramidkv": {"over": "pyramidkv"},
    "random": {"over": "random"},
    "snapkv": {"over": "snapkv"},
    "streamingllm": {"over": "streamingllm"},
    "tova": {"over": "tova"},
}


@method("protect", paper="control, no paper", presets=PRESETS)
@dataclass(frozen=True)
class Protect(Around):
    """What the prompt marks, always; the rest of the budget as the method `over` chooses."""

    over: str = "snapkv"

    def suits(self, policy: KVPolicy) -> None:
        if isinstance(policy, Protect):
            raise PolicyError(f"{self.asked} protects already; name the method that it goes around")
        if policy.kind == "whole":
            raise PolicyError(f"{self.asked} evicts nothing, so everything is kept; name a method that evicts")
        if policy.kind == "own":
            raise PolicyError(
                f"{self.asked} has no budget that protected tokens could be paid from; name a method with one"
            )
        if policy.evicts_while_decoding:
            raise PolicyError(
                f"{self.asked} evicts while decoding, protected tokens too; name another preset or method"
            )
        if policy.turns_keys:
            raise PolicyError(
                f"{self.asked} moves the keys that it keeps past protected ones; name another preset or method"
            )

    def check(self, view: PromptView) -> None:
        if self.needs.hidden_states:
            raise PolicyError(f"{self.asked} reads hidden states, of protected tokens too; name another")
        super().check(view)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        if not view.protected or budget >= view.tokens:
            return self.chooser.compress(view, budget)
        kept = self.chooser.compress(view.others, _left(budget, len(view.protected)))
        at = placed(view.protected, kept[0].keys.device)
        return [self._joined(layer, own, at) for layer, own in zip(view.layers, kept, strict=True)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        return None if sizes.protected else self.chooser.per_layer(budget, sizes)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        if not sizes.protected:
            return (f"this prompt marks nothing to protect: {self.over} alone", *self.chooser.notes(budget, sizes))
        others = replace(sizes, tokens=sizes.tokens - sizes.protected, protected=0)
        return self.chooser.notes(_left(budget, sizes.protected), others)

    def _joined(self, layer: LayerView, kept: KV, at: Tensor) -> KV:
        """The protected slots of a layer, `at` these places, and those kept of the others, in the order of tokens."""
        self.plain(kept)
        whole = layer.kv
        both = KV(
            torch.cat([whole.keys[:, :, at], kept.keys], dim=2),
            torch.cat([whole.values[:, :, at], kept.values], dim=2),
            torch.cat([whole.positions[:, :, at], kept.positions], dim=2),
        )
        return both.take(both.positions.masked_fill(both.positions < 0, layer.tokens).argsort(dim=-1))


def _left(budget: int, protected: int) -> int:
    """Slots of a budget that `protected` tokens leave. Raises BudgetTooSmall when there are none."""
    if budget <= protected:
        raise BudgetTooSmall(
            f"budget {budget} leaves no slot beside the {protected} protected tokens; ask for {protected + 1} or more"
        )
    return budget - protected
