"""llama.cpp's quantised cache: blocks of 32 numbers of a token's key or value with one scale, 8 or 4 bits a number.

Source: llama.cpp, `--cache-type-k q8_0 --cache-type-v q8_0` (or q4_0). q8_0: the scale is the largest magnitude by 127,
codes are whole numbers rounded away from zero at a half, 34 bytes a block. q4_0: the scale is the number of the largest
magnitude by -8, a code is x / scale + 8.5 without its fraction, at most 15, 18 bytes a block (ggml-quants.c,
quantize_row_q8_0_ref and quantize_row_q4_0_ref). Codes are of the scale before it is rounded to half precision. Since
its pull request 21038 a quantised cache is turned first, where the head size is a multiple of 64, as QuaRot turns it
(https://arxiv.org/abs/2404.00456): keys by the largest Walsh-Hadamard matrix that fits a head, values by one of 64
(llama-kv-cache.cpp, build_input_k_rot, build_input_v_rot). `@plain` is without, as with LLAMA_ATTN_ROT_DISABLE=1 and
before April 2026. With `over` a budget of N buys the bytes of N plain slots, as for `quant`.
Differences: numbers are turned back when they are decoded, where llama.cpp turns queries and outputs: the same products
but for rounding. The last slot of every head is plain, as a prompt's last token is fed again. q5_0, q5_1, q4_1 and
iq4_nl are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from methods.base import PolicyError
from methods.bits import packed, unpacked
from methods.coded import CodedPolicy
from methods.registry import method
from methods.rotation import hadamard, turned
from methods.slotwise import SlotCoding

Kind = Literal["q8_0", "q4_0"]
BITS = {"q8_0": 8, "q4_0": 4}
BLOCK, LEAST, SCALE_BYTES = 32, 64, 2
PRESETS: dict[str, dict[str, Any]] = {
    "q4_0": {"keys": "q4_0", "values": "q4_0"},
    "q8_0-q4_0": {"values": "q4_0"},
    "plain": {"rotated": False},
    "q4_0-plain": {"keys": "q4_0", "values": "q4_0", "rotated": False},
    "snapkv-q4_0": {"keys": "q4_0", "values": "q4_0", "over": "snapkv"},
}


@method(
    "q8_0",
    paper="https://arxiv.org/abs/2404.00456",
    code="https://github.com/ggml-org/llama.cpp at 01243c5",
    presets=PRESETS,
)
@dataclass(frozen=True)
class Q8_0(CodedPolicy):  # noqa: N801
    """Blocks of 32 codes with a scale, as llama.cpp's, of all tokens or of those that the method `over` keeps."""

    unit = BLOCK

    keys: Kind = "q8_0"
    values: Kind = "q8_0"
    rotated: bool = True

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            if getattr(self, name) not in get_args(Kind):
                raise PolicyError(f"q8_0.{name}={getattr(self, name)!r} is no type of codes; give q8_0 or q4_0")
        super().__post_init__()

    @property
    def least_bits(self) -> float:
        return (BITS[self.keys] + BITS[self.values]) / 2

    @property
    def coding(self) -> "Blocks":
        return Blocks(self.keys, self.values, self.rotated)


@dataclass(frozen=True)
class Blocks(SlotCoding):
    """keys, values: type of their codes. rotated: whether they are turned first, where llama.cpp does."""

    keys: Kind
    values: Kind
    rotated: bool

    def slot_bytes(self, key_dim: int, value_dim: int) -> int:
        sizes = ((self.keys, key_dim), (self.values, value_dim))
        return sum(dim // BLOCK * (BLOCK * BITS[kind] // 8 + SCALE_BYTES) for kind, dim in sizes)

    def held(self, keys: Tensor, values: Tensor, fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = [(keys, self.keys, _widest(keys.shape[-1])), (values, self.values, LEAST)]
        return tuple(x for own, kind, width in parts for x in coded(self._turned(own, width), kind))

    def read(self, held: Sequence[Tensor], fixed: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        key_codes, key_scale, value_codes, value_scale = held
        keys.copy_(self._turned(decoded(key_codes, key_scale, self.keys), _widest(keys.shape[-1])))
        values.copy_(self._turned(decoded(value_codes, value_scale, self.values), LEAST))

    def _turned(self, x: Tensor, width: int) -> Tensor:
        """Numbers [n, C, D] float32, turned by what undoes itself: matrices of `width` channels, where they fit."""
        whole = self.rotated and x.shape[-1] % LEAST == 0
        return turned(x, hadamard(x.shape[-1], width, x.device)) if whole else x.float()


def coded(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return codes [n, C, D * bits / 8] uint8 of numbers [n, C, D] float32 and the scale of each block, float16.

    Of 4 bits, the first half of a block lies in the low bits of its bytes.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    magnitude, at = blocks.abs().max(dim=-1, keepdim=True)
    scale = magnitude / 127 if kind == "q8_0" else blocks.gather(-1, at) / -8
    numbers = blocks * (1 / scale).masked_fill(scale == 0, 0.0)
    if kind == "q8_0":
        codes = (numbers.abs() + 0.5).floor().copysign(numbers).to(torch.int8).view(torch.uint8)
    else:
        codes = (numbers + 8.5).floor().clamp(0, 15).to(torch.uint8)
    return packed(codes, BITS[kind]).flatten(-2), scale.squeeze(-1).half()


def decoded(codes: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    """Return the numbers [n, C, D] float32 that codes stand for."""
    blocks = unpacked(codes.view(*scale.shape, -1), BITS[kind])
    numbers = blocks.view(torch.int8).float() if kind == "q8_0" else blocks.float().sub_(8)
    return numbers.mul_(scale.float().unsqueeze(-1)).flatten(-2)


def _widest(dim: int) -> int:
    """Channels of the largest matrix that keys of `dim` numbers are turned by."""
    width = LEAST
    while dim % (2 * width) == 0:
        width *= 2
    return width
