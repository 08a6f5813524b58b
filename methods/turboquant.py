"""TurboQuant: a random rotation, then each coordinate by the best codebook for what rotated unit vectors have there.

Source: https://arxiv.org/abs/2504.19874. A key or value is divided by its norm and rotated; its coordinates then have
the density (1 - x^2)^((D - 3) / 2) whatever the vector was, and each becomes the nearest of the 2^b levels that Lloyd's
iteration finds for it (Algorithm 1, for the least squared error). `signs` is Algorithm 2, whose inner products are
unbiased: keys have b - 1 bits, and of what is left the signs of a Gaussian projection (QJL) and its norm. Bits are
packed without a gap and norms are in half precision. The rotation, the projection and the levels are made from D and a
seed, one for all layers and heads: they are no constants of a model. With `over` a budget of N buys the bytes of N
plain slots, as for `quant`.
Differences: no code of the authors' was found. Their 2.5 and 3.5 bits, where channels of large numbers have a bit more
than others, are left out, and which of the two algorithms their cache has is not said; plain names are Algorithm 1, for
keys and values alike; so is vLLM's form, which found the signs to hurt (turboquant/config.py at vllm 1471680), and
`corrected`, which divides by the norm of the levels too, is its norm correction. The last slot of every head is plain,
as a prompt's last token is fed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import pi
from typing import Any

import torch
from torch import Tensor

from methods.base import at_least, at_most
from methods.bits import packed, unpacked
from methods.coded import CodedPolicy
from methods.device import placed
from methods.registry import method
from methods.rotation import gaussian, haar, turned
from methods.slotwise import SlotCoding

NORM_BYTES, GRID = 2, 1 << 16
PRESETS: dict[str, dict[str, Any]] = {
    "bits2": {"key_bits": 2, "value_bits": 2},
    "bits3": {"key_bits": 3, "value_bits": 3},
    "bits4": {},
    "prod3": {"key_bits": 3, "value_bits": 3, "signs": True},
    "prod4": {"signs": True},
    "snapkv-bits3": {"key_bits": 3, "value_bits": 3, "over": "snapkv"},
}


@method("turboquant", paper="https://arxiv.org/abs/2504.19874", presets=PRESETS)
@dataclass(frozen=True)
class TurboQuant(CodedPolicy):
    """Codes of 1 to 8 bits of rotated keys and values, of all tokens or of those that the method `over` keeps."""

    unit = 8

    key_bits: int = 4
    value_bits: int = 4
    signs: bool = False
    corrected: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 2 if self.signs else 1, "key_bits")
        at_least(self, 1, "value_bits")
        at_least(self, 0, "seed")
        at_most(self, 8, "key_bits", "value_bits")
        super().__post_init__()

    @property
    def least_bits(self) -> float:
        return (self.key_bits + self.value_bits) / 2

    @property
    def coding(self) -> "Levels":
        return Levels(self.key_bits, self.value_bits, self.signs, self.corrected, self.seed)


@dataclass(frozen=True)
class Levels(SlotCoding):
    """Fields as of `TurboQuant`."""

    key_bits: int
    value_bits: int
    signs: bool = False
    corrected: bool = False
    seed: int = 0

    def slot_bytes(self, key_dim: int, value_dim: int) -> int:
        return (key_dim * self.key_bits + value_dim * self.value_bits) // 8 + NORM_BYTES * (2 + self.signs)

    def held(self, keys: Tensor, values: Tensor, fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        codes, norm, left = self._coded(keys, self.key_bits - self.signs)
        signs: tuple[Tensor, ...] = ()
        if self.signs:
            projected = turned(left, gaussian(keys.shape[-1], keys.device, self.seed).T)
            signs = (packed((projected >= 0).to(torch.uint8), 1), half(left.norm(dim=-1, keepdim=True), keys))
        return (codes, norm, *signs, *self._coded(values, self.value_bits)[:2])

    def read(self, held: Sequence[Tensor], fixed: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        found = _read(held[0], self.key_bits - self.signs).mul_(held[1])
        if self.signs:
            dim, signs = keys.shape[-1], unpacked(held[2], 1).float().mul_(2).sub_(1)
            left = turned(signs, gaussian(dim, keys.device, self.seed))
            found += left.mul_(held[3].float() * ((pi / 2) ** 0.5 / dim))
        keys.copy_(turned(found, haar(keys.shape[-1], keys.device, self.seed).T))
        found = _read(held[-2], self.value_bits).mul_(held[-1])
        values.copy_(turned(found, haar(values.shape[-1], values.device, self.seed).T))

    def _coded(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and norms of vectors [n, C, D], and what the levels leave of them, rotated."""
        unit = turned(x, haar(x.shape[-1], x.device, self.seed))
        norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        unit.div_(norm.masked_fill(norm == 0, 1.0))
        levels = on_device(x.shape[-1], bits, x.device)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        near = _at(levels, codes)
        scale = norm / torch.linalg.vector_norm(near, dim=-1, keepdim=True) if self.corrected else norm
        return packed(codes.to(torch.uint8), bits), half(scale, x), unit.mul_(norm).sub_(near.mul_(scale))


def _read(codes: Tensor, bits: int) -> Tensor:
    """The levels [n, C, D] float32 of packed codes."""
    numbers = unpacked(codes, bits)
    return _at(on_device(numbers.shape[-1], bits, codes.device), numbers.int())


def _at(levels: Tensor, codes: Tensor) -> Tensor:
    return levels.index_select(0, codes.flatten()).view(codes.shape)


def half(x: Tensor, like: Tensor) -> Tensor:
    """Return x in half precision, of the kind of `like` where it has one."""
    return x.to(torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float16)


@cache
def on_device(dim: int, bits: int, device: torch.device) -> Tensor:
    """Return `codebook` as a tensor."""
    with torch.inference_mode(mode=False):
        return placed(codebook(dim, bits), device)


@cache
def codebook(dim: int, bits: int) -> tuple[float, ...]:
    """Return the 2^bits levels of least squared error for a coordinate of a uniform unit vector of `dim` numbers.

    Lloyd's iteration on a grid of angles, x = sin a with weight cos(a)^(D - 2), for the positive half; the first levels
    are spread as many fine ones would be (Panter and Dite).
    """
    angle = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (pi / 2 / GRID)
    x, weight = angle.sin(), angle.cos() ** (dim - 2)
    sums = torch.stack([weight.cumsum(0), (weight * x).cumsum(0)])
    spread = (angle.cos() ** (dim / 3)).cumsum(0)
    count = 2 ** (bits - 1)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count * spread[-1]
    levels = x[torch.searchsorted(spread, shares).clamp(max=GRID - 1)]
    for _ in range(10_000):
        ends = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        parts = torch.cat([sums[:, ends - 1], sums[:, -1:]], dim=1).diff(dim=1, prepend=torch.zeros(2, 1).double())
        before, levels = levels, parts[1] / parts[0]
        if bool((levels - before).abs().max() < 1e-9):
            break
    return (*(-levels.flip(0)).tolist(), *levels.tolist())
