"""The base of methods that store slots as something smaller: of the whole cache, or of what another method keeps.

A subclass is a frozen dataclass that says how slots become codes (`coding`) and how many fit into a budget (`fitting`).
With `over` a budget of N buys the bytes of N plain slots: the method `over` keeps as many slots as fit into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

from methods.around import Around
from methods.base import KV, Kind, KVPolicy, LayerView, PolicyError, PromptView, Sizes
from methods.device import read
from methods.stored import CodedKV, Coding, encode


@dataclass(frozen=True)
class CodedPolicy(Around):
    """Codes instead of numbers, of all tokens or of those that the method `over` keeps."""

    unit: ClassVar[int] = 1
    """Numbers of a key or value that are coded or packed together."""

    def suits(self, policy: KVPolicy) -> None:
        if isinstance(policy, CodedPolicy):
            raise PolicyError(f"{self.asked} makes codes itself; name a method that evicts")
        if policy.kind == "whole":
            raise PolicyError(f"{self.asked} evicts nothing; leave `over` out to code the whole cache")
        if policy.evicts_while_decoding:
            raise PolicyError(f"{self.asked} evicts while decoding, and codes stay; name another preset or method")

    @property
    def least_bits(self) -> float:
        """Bits of a number that becomes a code, on average over keys and values, at least."""
        return 0.0

    def least_share(self, bits: int) -> float:
        return min(1.0, self.least_bits / bits)

    @property
    def coding(self) -> Coding:
        """How slots become codes, where that is the same in all layers."""
        raise PolicyError(f"{type(self).__name__} says nowhere how slots become codes")

    def codings(self, layer: LayerView) -> Coding | Sequence[Coding]:
        """Return how a layer's slots become codes, or those of each of its heads."""
        return self.coding

    def fitting(self, budget: int, keys: int, values: int, plain: int) -> int:
        """Return what `slots` does for heads of so many key and value numbers and `plain` bytes a slot.

        This one is for codes of which every slot of a head takes as much.
        """
        one, two = (self.coding.nbytes(slots, keys, values) for slots in (1, 2))
        own, once = two - one, 2 * one - two  # of each slot, and of a head
        if own >= plain:
            raise PolicyError(f"{type(self).__name__.lower()}: codes of {own} bytes a slot are no smaller than {plain}")
        spare = (budget - self.coding.residual) * plain - once
        return max(budget, self.coding.residual + spare // own)

    def slots(self, budget: int, kv: KV) -> int:
        """Count slots per head, on average over heads and layers, whose codes fit the bytes of `budget` plain ones.

        However they are spread over heads. Raises PolicyError for numbers that codes of this kind cannot hold or make
        smaller.
        """
        keys, values = kv.keys.shape[-1], kv.values.shape[-1]
        if keys % self.unit or values % self.unit:
            found = f"keys of {keys} and values of {values} numbers are no multiples of {self.unit}"
            raise PolicyError(f"{found}, which {type(self).__name__.lower()} needs; take quant instead")
        return self.fitting(budget, keys, values, kv.slot_bytes)

    @property
    def kind(self) -> Kind:
        return self.chooser.kind  # alone it keeps all tokens

    def check(self, view: PromptView) -> None:
        for layer in view.layers:
            self.slots(1, layer.kv)
        super().check(view)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        slots = min(self.slots(budget, view.layers[0].kv), view.tokens)
        kept = self.chooser.compress(view, slots)
        live = read([kv.live for kv in kept])
        return [self._encoded(*own) for own in zip(view.layers, kept, live, strict=True)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        if self.chooser.per_layer(budget, sizes) is None:
            return None

        @cache
        def acts(slots: int) -> list[Callable[[LayerView], KV]]:
            return self.chooser.per_layer(slots, sizes) or []

        def act(layer: LayerView, index: int) -> KV:
            return self._encoded(layer, acts(min(self.slots(budget, layer.kv), sizes.tokens))[index](layer))

        return [partial(act, index=index) for index in range(sizes.layers)]

    def _encoded(self, layer: LayerView, kv: KV, live: Sequence[int] | None = None) -> CodedKV:
        self.plain(kv)
        self.slots(1, kv)
        return encode(kv, self.codings(layer), live, layer.refuse)
