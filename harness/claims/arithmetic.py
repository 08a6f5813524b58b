"""Numbers that follow from shapes and bits alone: bytes of caches and of codes, and what a decode step has to read.

A decode step at these sizes is bound by what it reads, all weights and the whole cache: its time can fall as these
bytes do and no further. Activations are left out, so `gib` says what does not fit, and what may.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

GIB = 2**30
HALF = 16
"""Bits of a number in half precision, of a scale and of a zero."""


@dataclass(frozen=True)
class Shape:
    """What decides a cache. dim: of a head; parameters: of the model."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    parameters: float

    @property
    def numbers(self) -> int:
        """Of the keys and values of a token."""
        return 2 * self.layers * self.kv_heads * self.dim


SHAPES = {
    "llama-2-7b": Shape(32, 32, 32, 128, 6.74e9),
    "llama-3-8b": Shape(32, 32, 8, 128, 8.03e9),
    "qwen2-7b": Shape(28, 28, 4, 128, 7.62e9),
}
"""Of the models' config.json; parameters as their model cards say."""


def kept_percent(*, slots: int, tokens: int) -> float:
    """Slots kept of a prompt, in percent."""
    return 100 * slots / tokens


def cache_gib(*, shape: str, tokens: int, batch: int = 1, bits: float = HALF, share: float = 1.0) -> float:
    """GiB of the caches of a batch. share: of the slots that are kept."""
    return SHAPES[shape].numbers * tokens * batch * share * bits / 8 / GIB


def gib(
    *, shape: str, tokens: int, batch: int = 1, bits: float = HALF, share: float = 1.0, weight_bits: float = HALF
) -> float:
    """GiB of the weights and those caches."""
    weights = SHAPES[shape].parameters * weight_bits / 8 / GIB
    return weights + cache_gib(shape=shape, tokens=tokens, batch=batch, bits=bits, share=share)


def step_saved_percent(*, shape: str, tokens: int, slots: int, batch: int) -> float:
    """Most that a decode step can save by reading `slots` of `tokens` of each prompt, in percent."""
    kept, whole = (gib(shape=shape, tokens=n, batch=batch) for n in (slots, tokens))
    return 100 * (1 - kept / whole)


def least_batch(*, shape: str, tokens: int, slots: int, percent: float) -> int:
    """The smallest batch at which a decode step can save so many percent; 0 when none can."""
    if 100 * (1 - slots / tokens) <= percent:
        return 0
    batches = count(1)
    return next(n for n in batches if step_saved_percent(shape=shape, tokens=tokens, slots=slots, batch=n) >= percent)


def heads_ratio(*, shape: str) -> float:
    """How many times fewer bytes a cache of KV heads takes than one of query heads."""
    return SHAPES[shape].heads / SHAPES[shape].kv_heads


def code_bits(*, bits: float, group: int) -> float:
    """Bits of a number as a code, with its share of the group's scale and zero."""
    return bits + 2 * HALF / group


def peak_ratio(*, shape: str, memory_gib: float, bits: float, group: int) -> float:
    """How many times less weights and codes take than weights and the cache that just fills a memory."""
    weights = gib(shape=shape, tokens=0)
    return memory_gib / (weights + (memory_gib - weights) * code_bits(bits=bits, group=group) / HALF)


def batch_ratio(*, bits: float, group: int) -> float:
    """How many times more prompts fit beside the weights as codes."""
    return HALF / code_bits(bits=bits, group=group)


def mean_layer_ratio(*, shares: tuple[float, ...], bits: tuple[float, ...], against: float) -> float:
    """Mean over layers of how many times fewer bits each has. shares: of the layers with each number of bits."""
    return sum(share * against / own for share, own in zip(shares, bits, strict=True))


def bytes_ratio(*, shares: tuple[float, ...], bits: tuple[float, ...], against: float) -> float:
    """How many times fewer bytes all layers have together."""
    return against / sum(share * own for share, own in zip(shares, bits, strict=True))


def removed_gap(*, kept: tuple[float, ...], group: int, step: int) -> float:
    """Largest difference, in points, of the numbers that are removed from those asked for; 0 where ranks are exact.

    kept: shares of a group's numbers that are asked for. step: what ranks are rounded to multiples of.
    """
    ranks = (max(1, round(share * group / step)) * step for share in kept)
    return max(100 * abs(rank / group - share) for rank, share in zip(ranks, kept, strict=True))


FORMULAS: dict[str, Callable[..., float]] = {
    own.__name__: own
    for own in (
        kept_percent,
        cache_gib,
        gib,
        step_saved_percent,
        least_batch,
        heads_ratio,
        code_bits,
        peak_ratio,
        batch_ratio,
        mean_layer_ratio,
        bytes_ratio,
        removed_gap,
    )
}
