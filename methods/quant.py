"""Quantised KV: int8, int4 or int2 codes of all slots but the last ones, of the cache or of what another method keeps.

Source: KIVI, https://arxiv.org/abs/2402.02750, with its groups of 32; `@kivi-2bit` is its headline, with a residual of
128; for grouped queries its authors advise 4 bits (docs/long_bench.md at KIVI 876b4d2). On top of another method
(`over`), a budget of N buys the bytes of N plain slots: that method keeps as many slots as fit into them as codes.
Differences: the residual in full precision is the last `residual` slots of every head, for keys and values alike. So
are KIVI's values (llama_kivi.py:210-217 at KIVI 876b4d2), but of its keys it leaves the last T mod `residual` after the
prefill (193-199), which may be none. With one residual a head's bytes are concave in its slots, and a method that gives
heads different numbers of them keeps to the budget too. Decoded tokens become codes a group at a time, once they leave
the residual; KIVI's values do so one by one, its keys `residual` at a time. A last group of keys that is not full has
scales of its own. Scales are rounded up to half precision before codes are taken. A head whose codes would be no
smaller is left as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import gcd
from typing import Any, Literal

from methods.base import KV, KVPolicy, LayerView, Needs, PolicyError, PromptView, Sizes, at_least
from methods.budget import quoted
from methods.codes import HALF_BYTES, MinMax
from methods.device import read
from methods.fullkv import FullKV
from methods.registry import make_policy, method
from methods.stored import CodedKV, encode

PRESETS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "kivi-2bit": {"bits": 2, "residual": 128},
    "snapkv-int8": {"bits": 8, "over": "snapkv"},
    "snapkv-int4": {"bits": 4, "over": "snapkv"},
}


@method(
    "quant",
    paper="https://arxiv.org/abs/2402.02750",
    code="https://github.com/jy-yuan/KIVI at 876b4d2",
    presets=PRESETS,
)
@dataclass(frozen=True)
class Quant(KVPolicy):
    """Codes of 8, 4 or 2 bits instead of numbers, of all tokens or of those that the method `over` keeps."""

    bits: Literal[8, 4, 2] = 8
    group: int = 32
    residual: int = 32
    over: str | None = None
    inner: KVPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        at_least(self, 1, "group", "residual")
        if self.bits not in (8, 4, 2):
            raise PolicyError(f"quant.bits={self.bits} is no size of codes; give 8, 4 or 2")
        if self.over is not None:
            object.__setattr__(self, "inner", _chooser(self.over))

    @property
    def chooser(self) -> KVPolicy:
        return self.inner or FullKV()

    @property
    def budgeted(self) -> bool:
        return self.chooser.budgeted  # alone it keeps all tokens

    @property
    def needs(self) -> Needs:
        return self.chooser.needs

    @property
    def coding(self) -> MinMax:
        return MinMax(self.bits, self.group, residual=self.residual)

    def for_model(self, revision: str) -> "Quant":
        if self.inner is None:
            return self
        own = replace(self)
        object.__setattr__(own, "inner", self.inner.for_model(revision))
        return own

    def provenance(self) -> dict[str, Any]:
        return self.chooser.provenance()

    def fitted_on(self) -> frozenset[str]:
        return self.chooser.fitted_on()

    @property
    def lacks(self) -> str:
        return self.chooser.lacks

    def check(self, view: PromptView) -> None:
        for layer in view.layers:
            self.slots(1, layer.kv)
        self.chooser.check(view)

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

    def slots(self, budget: int, kv: KV) -> int:
        """Count slots per head, on average over heads and layers, whose codes fit the bytes of `budget` plain ones.

        However they are spread: a head's bytes are concave in its slots, but for the scales of a group that is not
        full, which are set aside. Raises PolicyError for numbers that codes of this kind cannot hold or make smaller.
        """
        return self.fitting(budget, kv.keys.shape[-1], kv.values.shape[-1], kv.slot_bytes)

    def fitting(self, budget: int, keys: int, values: int, plain: int) -> int:
        """Return what `slots` does for heads of so many key and value numbers and `plain` bytes a slot."""
        count, shared = self.coding.per_byte, gcd(keys, values)
        if shared % count:
            found = f"int{self.bits} codes share bytes, {count} in one; heads of {keys} and {values} numbers"
            raise PolicyError(f"{found} need bits={4 if shared % 2 == 0 else 8}")
        scales = 2 * HALF_BYTES * keys  # of a key group
        own = self.coding.coded_slot_bytes(keys, values)
        if own * self.group + scales >= plain * self.group:
            raise PolicyError(f"quant.group={self.group}: codes and scales are no smaller than the cache; raise it")
        spare = (budget - self.residual) * plain * self.group - scales * (self.group - 1)
        return max(budget, self.residual + spare // (own * self.group + scales))

    def _encoded(self, layer: LayerView, kv: KV, live: Sequence[int] | None = None) -> CodedKV:
        if type(kv) is not KV or kv.extra:
            raise PolicyError(f"quant.over={quoted(self.over)} leaves more than keys and values, which has no codes")
        self.slots(1, kv)
        return encode(kv, self.coding, live, layer.refuse)


def _chooser(label: str) -> KVPolicy:
    """The policy that chooses slots. Raises PolicyError for one whose slots cannot be codes."""
    policy = make_policy(label)
    if isinstance(policy, Quant):
        raise PolicyError(f"quant.over={quoted(label)} makes codes itself; name a method that evicts")
    if not policy.budgeted:
        raise PolicyError(f"quant.over={quoted(label)} evicts nothing; leave `over` out to code the whole cache")
    if policy.evicts_while_decoding:
        raise PolicyError(
            f"quant.over={quoted(label)} evicts while decoding, and codes stay; name another preset or method"
        )
    return policy
