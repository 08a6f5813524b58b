"""Min/max codes: keys and values as integers of 8, 4 or 2 bits, quantised in groups.

Source: KIVI, https://arxiv.org/abs/2402.02750: keys per channel in groups of tokens, values per token in groups of
channels, asymmetric, x = zero + scale * code. Letters as in `methods.stored`, and G tokens or channels a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from methods.bits import packed, unpacked
from methods.stored import Codes, Coding
from methods.views import KV, POSITION_BYTES

HALF_BYTES = 2  # of a scale, and of a zero


@dataclass(frozen=True)
class MinMax(Coding):
    """bits: 8, or 4 or 2 (two or four codes a byte). group: tokens of a key's, channels of a value's scale."""

    bits: int
    group: int

    @property
    def step(self) -> int:
        return self.group

    @property
    def per_byte(self) -> int:
        """Codes that share a byte."""
        return 8 // self.bits

    def channels(self, dim: int) -> int:
        """Return the channels of a value's scale: the most that divide `dim`, at most a group."""
        return next(width for width in range(min(self.group, dim), 0, -1) if dim % width == 0)

    def coded_slot_bytes(self, key_dim: int, value_dim: int) -> int:
        """Return the bytes of a coded slot and its position without its key's scales, which its group shares."""
        codes = (key_dim + value_dim) * self.bits // 8
        return POSITION_BYTES + codes + 2 * HALF_BYTES * (value_dim // self.channels(value_dim))

    def nbytes(self, slots: int, key_dim: int, value_dim: int) -> int:
        """Return the bytes of `slots` coded slots of a head; a last group that is not full has scales of its own."""
        return slots * self.coded_slot_bytes(key_dim, value_dim) + -(-slots // self.group) * 2 * HALF_BYTES * key_dim

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> MinMaxCodes:
        return MinMaxCodes.of(self, keys, values)

    def coded(self, slots: int, kv: KV) -> int:
        """Return how many of a head's `slots` become codes: all before the residual, if their codes are smaller."""
        dims, older = (kv.keys.shape[-1], kv.values.shape[-1]), max(0, slots - self.residual)
        return older if self.nbytes(older, *dims) < older * kv.slot_bytes else 0


@dataclass
class MinMaxCodes(Codes):
    """Codes with their scales.

    keys, values: [n, C, D * bits / 8] uint8. key_scale, key_zero: [n, ceil(C / G), D]. value_scale, value_zero:
    [n, C, D / channels], both in half precision.
    """

    coding: MinMax
    keys: Tensor
    key_scale: Tensor
    key_zero: Tensor
    values: Tensor
    value_scale: Tensor
    value_zero: Tensor

    @classmethod
    def of(cls, coding: MinMax, keys: Tensor, values: Tensor) -> MinMaxCodes:
        """Return the codes of keys and values [n, C, D], C > 0."""
        whole = keys.shape[1] // coding.group * coding.group
        parts = [x for x in (keys[:, :whole], keys[:, whole:]) if x.shape[1]]
        grouped = [_split(x, 1, min(coding.group, x.shape[1])) for x in parts]
        coded = [_coded(x, coding, dim=2) for x in grouped]
        key_codes = torch.cat([codes.flatten(1, 2) for codes, *_ in coded], dim=1)
        scale, zero = (torch.cat([own[i].squeeze(2) for own in coded], dim=1) for i in (1, 2))
        width = coding.channels(values.shape[-1])
        codes, *own = _coded(_split(values, 2, width), coding, dim=3)
        value_codes, value_scales = codes.flatten(2), (x.squeeze(3) for x in own)
        return cls(coding, packed(key_codes, coding.bits), scale, zero, packed(value_codes, coding.bits), *value_scales)

    @classmethod
    def cat(cls, parts: Sequence[MinMaxCodes]) -> MinMaxCodes:
        if len(parts) == 1:
            return parts[0]
        return cls(parts[0].coding, *(torch.cat([getattr(own, name) for own in parts]) for name in _TENSORS))

    @property
    def slots(self) -> int:
        return int(self.keys.shape[1])

    def then(self, later: MinMaxCodes) -> MinMaxCodes | None:
        """Return both, unless these end with a group that is not full, which no slot can be added to."""
        if self.slots % self.coding.group:
            return None
        return MinMaxCodes(
            self.coding, *(torch.cat(own, dim=1) for own in zip(self.tensors(), later.tensors(), strict=True))
        )

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in _TENSORS]

    def scaled(self) -> Sequence[Tensor]:
        return self.key_scale, self.key_zero, self.value_scale, self.value_zero

    def take(self, streams: Tensor) -> MinMaxCodes:
        return MinMaxCodes(self.coding, *(getattr(self, name)[streams] for name in _TENSORS))

    def decode(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        size, group = self.slots, self.coding.group
        whole, codes = size // group * group, unpacked(self.keys, self.coding.bits)
        scale, zero = (x.to(keys.dtype).unsqueeze(2) for x in (self.key_scale, self.key_zero))  # [n, groups, 1, D]
        if whole:
            out, own = (_split(x[:, :whole], 1, group) for x in (keys, codes))
            torch.addcmul(zero[:, : whole // group], own.to(keys.dtype), scale[:, : whole // group], out=out)
        if whole < size:
            torch.addcmul(zero[:, -1], codes[:, whole:].to(keys.dtype), scale[:, -1], out=keys[:, whole:])
        scale, zero = (x.to(values.dtype).unsqueeze(3) for x in (self.value_scale, self.value_zero))
        width = values.shape[2] // scale.shape[2]
        codes = _split(unpacked(self.values, self.coding.bits), 2, width)
        torch.addcmul(zero, codes.to(values.dtype), scale, out=_split(values, 2, width))


_TENSORS = [own.name for own in fields(MinMaxCodes) if own.name != "coding"]


def _coded(x: Tensor, coding: MinMax, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x as uint8, and the scale and zero of each group along `dim`, which is kept.

    The scale is rounded up, so that the highest number has a code; codes are of the rounded scale and zero.
    """
    half = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    x = x.float()
    zero = x.amin(dim=dim, keepdim=True).to(half)
    highest = int(2**coding.bits - 1)
    reach = (x.amax(dim=dim, keepdim=True) - zero.float()).clamp(min=0) / highest
    scale = (reach * (1 + torch.finfo(half).eps)).to(half)
    step = scale.float().masked_fill(scale == 0, 1.0)
    codes = ((x - zero.float()) / step).round_().clamp_(0, highest).to(torch.uint8)
    return codes, scale, zero


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """A view of x with `dim` in parts of `size`."""
    return x.view(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])
