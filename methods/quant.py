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

from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

from methods.base import PolicyError, at_least
from methods.coded import CodedPolicy
from methods.codes import HALF_BYTES, MinMax
from methods.registry import method

PRESETS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "kivi-2bit": {"bits": 2, "residual": 128},
    "snapkv-int8": {"bits": 8, "over": "snapkv"},
    "snapkv-int4": {"bits": 4, "over": "snapkv"},
    "snapkv-int2": {"bits": 2, "over": "snapkv"},
    "compilerkv-int4": {"bits": 4, "over": "compilerkv"},
    "compilerkv-int2": {"bits": 2, "over": "compilerkv"},
}


@method(
    "quant",
    paper="https://arxiv.org/abs/2402.02750",
    code="https://github.com/jy-yuan/KIVI at 876b4d2",
    presets=PRESETS,
)
@dataclass(frozen=True)
class Quant(CodedPolicy):
    """Codes of 8, 4 or 2 bits instead of numbers, of all tokens or of those that the method `over` keeps."""

    bits: Literal[8, 4, 2] = 8
    group: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        at_least(self, 1, "group", "residual")
        if self.bits not in (8, 4, 2):
            raise PolicyError(f"quant.bits={self.bits} is no size of codes; give 8, 4 or 2")
        super().__post_init__()

    @property
    def least_bits(self) -> float:
        return self.bits

    @property
    def coding(self) -> MinMax:
        return MinMax(self.bits, self.group, residual=self.residual)

    def fitting(self, budget: int, keys: int, values: int, plain: int) -> int:
        """A head's bytes are concave in its slots, but for the scales of a last group, which are set aside."""
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
