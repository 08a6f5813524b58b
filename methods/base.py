"""The three nouns of a method: a policy is frozen parameters, a view is what it sees, a KV is what it leaves.

Shape letters, used everywhere in this package:
    B prompts (1 in a view), or rows of a decode step
    L layers          H KV heads          G query heads per KV head (Hq = H * G)
    T prompt tokens   S slots of a KV     W window queries    D head dimension
    N budget: slots per layer and KV head, on average over both

A slot holds the key and the value of one token; `positions` says which token. Keys carry RoPE.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, Self, final

import torch
from torch import Tensor

from methods.budget import Budget as Budget
from methods.budget import PolicyError as PolicyError
from methods.budget import spread as spread
from methods.views import KV as KV
from methods.views import LayerView as LayerView
from methods.views import Needs as Needs
from methods.views import PromptView as PromptView
from methods.views import Sizes as Sizes
from methods.views import StepView as StepView

Kind = Literal["budgeted", "whole", "own"]
"""Of a method: it is given a budget; it keeps every token; or how much it keeps is what it finds in the prompt."""


class KVPolicy:
    """Frozen parameters of a method. Subclasses are frozen dataclasses; they hold no tensors and no state."""

    @property
    def kind(self) -> Kind:
        """Whether it is run once a budget, or once; `compress` is then told the number of tokens as its budget."""
        return "budgeted"

    @final
    @property
    def budgeted(self) -> bool:
        """Whether it is given a budget."""
        return self.kind == "budgeted"

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def redundant(self) -> bool:
        """Whether a value that means nothing beside the others is not the plainest: `harness tune` leaves it out."""
        return False

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether `after_step` is to be called; such a cache stays at its budget while it grows."""
        return False

    reads_a_part: ClassVar[bool] = False
    """Whether a decoded token reads only those slots of the cache that are chosen for it."""

    @property
    def ranks_tokens(self) -> bool:
        """Whether it is a `Ranking`: its scores say which tokens of a layer are kept."""
        return False

    @property
    def turns_keys(self) -> bool:
        """Whether keys that it keeps are moved to other positions than their tokens'; others' cannot join them then."""
        return False

    def least_share(self, bits: int) -> float:
        """Return the least part of a plain slot, of numbers of so many bits, that a slot which it keeps can take."""
        return 1.0

    @property
    def memory(self) -> Literal["physical", "simulated"]:
        """simulated: dropped tokens are only hidden from attention and their bytes stay."""
        return "physical"

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        """Return what is left of every layer of `view`, in its order. budget: N >= 1. `view` must not be changed."""
        acts = self.per_layer(budget, view.sizes)
        if acts is None:
            raise PolicyError(f"{type(self).__name__} says how to compress neither a prompt nor each layer of one")
        return [act(layer) for act, layer in zip(acts, view.layers, strict=True)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        """Return what `compress` does to each layer, to act on one once it is prefilled; None where it needs all."""
        return None

    def for_model(self, revision: str) -> Self:
        """Return this policy for a model's revision (content hash or commit); PolicyError where it is of another."""
        return self

    @property
    def method_bytes(self) -> int:
        """Bytes of the model's constants that it reads, such as bases: like weights, no part of a prompt's cache."""
        return 0

    @property
    def lacks(self) -> str:
        """What it would need for this model and has not, so that it is less than its name says; empty for nothing."""
        return ""

    def fitted_on(self) -> frozenset[str]:
        """Return the SHA-256 of the token ids of every prompt that decided its parameters; they are not for scoring."""
        return frozenset()

    def check(self, view: PromptView) -> None:
        """Raise PolicyError when this policy cannot serve the model of `view`, a view of some tokens of it."""

    def after_step(self, step: StepView) -> Tensor:
        """Return the slot of each head to free after a decoded token: [B, H] int64, -1 for none."""
        raise PolicyError(f"{type(self).__name__} does not evict while decoding")

    def provenance(self) -> dict[str, Any]:
        """Return what decides the results besides the parameters, such as the hash of a file they name. JSON values."""
        return {}

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        """Return what a reader of the record must know about this budget, such as a degenerate allocation."""
        return ()


class Ranking(Protocol):
    """What tells the worth of single tokens of a layer, and which are kept whatever it is."""

    def score(self, view: LayerView) -> Tensor:
        """Return the worth of every token: [B, H, T] float, higher is kept. Must not depend on the budget."""

    def ends(self, view: LayerView, budget: int) -> tuple[int, int]:
        """Return how many of the first and of the last tokens are kept at this budget, as far as a head's slots go."""


class LayerPolicy(KVPolicy, ABC):
    """Compresses every layer by itself, at a budget of its own."""

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]]:
        budgets = self.layer_budgets(budget, sizes.tokens, sizes.layers)
        return [partial(self.compress_layer, budget=own) for own in budgets]

    @abstractmethod
    def compress_layer(self, view: LayerView, budget: int) -> KV:
        """Return what is left of one layer at `budget` slots per KV head."""

    def layer_budgets(self, budget: int, tokens: int, layers: int) -> list[int]:
        """Return the slots per KV head of each layer; they sum to at most layers * budget."""
        return [min(budget, tokens)] * layers


class EvictionPolicy(LayerPolicy):
    """Keeps the top slots by score; the last `recent` and the first `sinks` tokens are always kept.

    A budget smaller than `recent` keeps the last `budget` tokens; one smaller than `sinks + recent` gives up sinks
    first. evict: it goes on evicting while decoding. A subclass declares those of the three as fields that it takes.
    """

    recent: int = 0
    sinks: int = 0
    evict: bool = False

    @property
    def evicts_while_decoding(self) -> bool:
        return self.evict

    def __post_init__(self) -> None:
        at_least(self, 0, "recent", "sinks")

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Return the worth of every token: [B, H, T] float, higher is kept. Must not depend on the budget."""

    @property
    def ranks_tokens(self) -> bool:
        return True

    def ends(self, view: LayerView, budget: int) -> tuple[int, int]:
        return self.sinks, self.recent_slots(budget)

    def recent_slots(self, budget: int) -> int:
        """Return how many of the last tokens are kept at this budget, whatever their score."""
        return min(self.recent, budget)

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        return view.kv.take(self.select(view, budget))

    def select(self, view: LayerView, budget: int) -> Tensor:
        """Choose the slots to keep: [B, H, min(budget, T)] int64, ascending. Equal scores go to the earlier token."""
        if budget >= view.tokens:
            return torch.arange(view.tokens, device=view.kv.keys.device).expand(view.kv.positions.shape)
        return self.keep(view.only_live(view.memo((type(self), self), self.score)), budget)

    def keep(self, scores: Tensor, budget: int) -> Tensor:
        """Choose `budget` < S slots by their scores [B, H, S], in the order of their tokens: [B, H, budget] int64."""
        heads, tokens, recent = scores.shape[:2], scores.shape[2], self.recent_slots(budget)
        sinks = min(self.sinks, budget - recent)
        order = best(scores[..., sinks : tokens - recent], budget - recent - sinks) + sinks
        ends = ((0, sinks), (tokens - recent, tokens))
        fixed = torch.cat([torch.arange(*end, device=order.device) for end in ends])
        return torch.cat([order, fixed.expand(*heads, -1)], dim=-1).sort(dim=-1).values


def best(scores: Tensor, count: int) -> Tensor:
    """Find the `count` highest of scores [..., T]: places [..., count] int64, best first; of equal ones the earlier.

    A float32's bits above its place make a number that orders both: its `topk` costs a fifth of a stable sort.
    """
    tokens = scores.shape[-1]
    count = min(count, tokens)
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    bits = (scores.float() + 0.0).view(torch.int32).long()  # + 0.0: zero has one sign
    ascending = bits ^ ((bits >> 32) & 0x7FFFFFFF)  # negative floats order the other way round
    earlier = torch.arange(tokens - 1, -1, -1, device=scores.device)
    return ((ascending << 32) + earlier).topk(count, dim=-1).indices


def at_least(policy: object, bound: float, *names: str) -> None:
    """Raise PolicyError for the first parameter of `policy` among `names` that is a number below `bound`."""
    for name in names:
        value = getattr(policy, name)
        if isinstance(value, int | float) and value < bound:
            raise PolicyError(f"{type(policy).__name__}.{name}={value} is too small; give at least {bound:g}")


def at_most(policy: object, bound: float, *names: str) -> None:
    """Raise PolicyError for the first parameter of `policy` among `names` that is a number above `bound`."""
    for name in names:
        value = getattr(policy, name)
        if isinstance(value, int | float) and value > bound:
            raise PolicyError(f"{type(policy).__name__}.{name}={value} is too large; give at most {bound:g}")
