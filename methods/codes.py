"""Keys and values as integer codes: min/max quantisation in groups, and a KV most of whose slots are codes.

Source: KIVI, https://arxiv.org/abs/2402.02750: keys per channel in groups of tokens, values per token in groups of
channels, asymmetric, x = zero + scale * code. Letters as in `methods.base`, and n streams (KV heads of some row), C
coded slots of each, G tokens or channels a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from methods.device import Doubt, placed, settle
from methods.views import KV, POSITION_BYTES

HALF_BYTES = 2  # of a scale, and of a zero
UNSOUND = "keys or values are NaN, infinite or too large for scales in half precision; try bfloat16"
Refuse = Callable[[Tensor, Callable[[int], str]], None]


@dataclass(frozen=True)
class Coding:
    """How slots become codes. bits: 8, or 4 or 2 (two or four codes a byte).

    group: tokens of a key's, channels of a value's scale. residual: last slots of every head that stay as they are.
    """

    bits: int
    group: int
    residual: int

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

    def coded(self, slots: int, kv: KV) -> int:
        """Return how many of a head's `slots` become codes: all before the residual, if their codes are smaller."""
        dims, older = (kv.keys.shape[-1], kv.values.shape[-1]), max(0, slots - self.residual)
        return older if self.nbytes(older, *dims) < older * kv.slot_bytes else 0


@dataclass
class Codes:
    """Coded slots of streams that have the same number of them.

    keys, values: [n, C, D * bits / 8] uint8. key_scale, key_zero: [n, ceil(C / G), D]. value_scale, value_zero:
    [n, C, D / channels], both in half precision.
    """

    coding: Coding
    keys: Tensor
    key_scale: Tensor
    key_zero: Tensor
    values: Tensor
    value_scale: Tensor
    value_zero: Tensor

    @classmethod
    def of(cls, coding: Coding, keys: Tensor, values: Tensor) -> Codes:
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
        return cls(coding, _packed(key_codes, coding), scale, zero, _packed(value_codes, coding), *value_scales)

    @classmethod
    def cat(cls, parts: Sequence[Codes]) -> Codes:
        """Return the streams of all `parts`, which have one coding and as many slots."""
        if len(parts) == 1:
            return parts[0]
        return cls(parts[0].coding, *(torch.cat([getattr(own, name) for own in parts]) for name in _TENSORS))

    @property
    def slots(self) -> int:
        return int(self.keys.shape[1])

    def tensors(self) -> list[Tensor]:
        """Return everything that is held."""
        return [getattr(self, name) for name in _TENSORS]

    def scales(self) -> tuple[Tensor, ...]:
        """Return what codes are multiplied with, and what is added then."""
        return self.key_scale, self.key_zero, self.value_scale, self.value_zero

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def take(self, streams: Tensor) -> Codes:
        """Return the codes of some of the streams. streams: [n'] int64."""
        return Codes(self.coding, *(getattr(self, name)[streams] for name in _TENSORS))

    def decode(self, keys: Tensor, values: Tensor) -> None:
        """Write what the codes stand for into keys and values [n, C, D]."""
        size, group = self.slots, self.coding.group
        whole, codes = size // group * group, _unpacked(self.keys, self.coding)
        scale, zero = (x.to(keys.dtype).unsqueeze(2) for x in (self.key_scale, self.key_zero))  # [n, groups, 1, D]
        if whole:
            out, own = (_split(x[:, :whole], 1, group) for x in (keys, codes))
            torch.addcmul(zero[:, : whole // group], own.to(keys.dtype), scale[:, : whole // group], out=out)
        if whole < size:
            torch.addcmul(zero[:, -1], codes[:, whole:].to(keys.dtype), scale[:, -1], out=keys[:, whole:])
        scale, zero = (x.to(values.dtype).unsqueeze(3) for x in (self.value_scale, self.value_zero))
        width = values.shape[2] // scale.shape[2]
        codes = _split(_unpacked(self.values, self.coding), 2, width)
        torch.addcmul(zero, codes.to(values.dtype), scale, out=_split(values, 2, width))


_TENSORS = [own.name for own in fields(Codes) if own.name != "coding"]


@dataclass
class CodedKV(KV):
    """Slots in the order of their tokens: of every head first coded ones, then at most R as they were, then empty ones.

    keys, values: [1, H, R, D], those that are no codes; positions [1, H, S] are of all.
    counts: coded slots of each head. parts: their codes, by number of coded slots, with the heads that have so many.
    A slot that is given up later (`positions` -1) must be none of the coded ones: a head's last tokens are not.
    """

    counts: tuple[int, ...] = ()
    parts: tuple[tuple[tuple[int, ...], Codes], ...] = ()

    def load(self) -> tuple[Tensor, Tensor]:
        """Return decoded copies of all slots, [1, H, S, D] each; empty slots are 0."""
        slots = self.positions.shape[2]
        keys, values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (self.keys, self.values))
        for heads, codes in self.parts:
            own = [x.new_empty(len(heads), codes.slots, x.shape[3]) for x in (keys, values)]
            codes.decode(*own)
            for x, decoded in zip((keys, values), own, strict=True):
                x[0].narrow(1, 0, codes.slots).index_copy_(0, placed(heads, x.device), decoded)
        for head, count in enumerate(self.counts):
            rest = min(slots - count, self.keys.shape[2])
            keys[0, head, count : count + rest] = self.keys[0, head, :rest]
            values[0, head, count : count + rest] = self.values[0, head, :rest]
        return keys, values

    def codes_of(self, heads: Sequence[int]) -> list[Codes]:
        """Return the codes of heads that have the same number of them, as one; none where that is 0."""
        for own, codes in self.parts:
            if heads[0] in own:
                at = [own.index(head) for head in heads]
                return [codes if len(at) == len(own) else codes.take(placed(at, codes.keys.device))]
        return []

    def take(self, slots: Tensor) -> KV:
        return KV(*self.load(), self.positions).take(slots)

    def bytes_of(self, live: int) -> int:
        """Codes with their scales and positions, and the live slots that are none."""
        coded, count = sum(codes.nbytes for _, codes in self.parts), sum(self.counts)
        return coded + count * POSITION_BYTES + (live - count) * self.slot_bytes

    def reads(self, live: int) -> int:
        return self.bytes_of(live) - live * POSITION_BYTES


def encode(kv: KV, coding: Coding, live: Sequence[int] | None = None, refuse: Refuse | None = None) -> CodedKV:
    """Code a KV (B = 1) of any number of slots in each head. `kv` is left alone, and nothing of it is shared.

    live: slots of each head, where they are known. refuse: as `LayerView.refuse`; None to refuse at once. Raises
    PolicyError for numbers that have no codes.
    """
    last = torch.iinfo(kv.positions.dtype).max
    order = kv.positions.masked_fill(kv.positions < 0, last).argsort(dim=-1, stable=True)
    live = kv.live[0].tolist() if live is None else live
    counts = tuple(coding.coded(slots, kv) for slots in live)
    rest = max(slots - count for slots, count in zip(live, counts, strict=True))
    keys, values = (x.new_zeros(*x.shape[:2], rest, x.shape[3]) for x in (kv.keys, kv.values))
    for head, (slots, count) in enumerate(zip(live, counts, strict=True)):
        own = order[0, head, count:slots]
        keys[0, head, : len(own)], values[0, head, : len(own)] = kv.keys[0, head, own], kv.values[0, head, own]
    parts = []
    for count in dict.fromkeys(counts):
        heads = [head for head, own in enumerate(counts) if own == count]
        if count:
            own = placed(heads, order.device).unsqueeze(1)  # [n, 1]
            at = (own, order[0].index_select(0, own[:, 0])[:, :count])  # and [n, C]
            parts.append((tuple(heads), Codes.of(coding, kv.keys[0][at], kv.values[0][at])))
    scales = [x for _, codes in parts for x in codes.scales()]
    if scales:
        flaws = torch.stack([x.isfinite().logical_not().any() for x in scales]).sum()
        (refuse or _refuse)(flaws, UNSOUND.format)
    positions = kv.positions.gather(2, order)
    return CodedKV(keys, values, positions, counts=counts, parts=tuple(parts))


def _refuse(flaws: Tensor, told: Callable[[int], str]) -> None:
    settle([Doubt(flaws, told)])


def _coded(x: Tensor, coding: Coding, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
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


def _packed(codes: Tensor, coding: Coding) -> Tensor:
    """Codes [..., D], several in a byte: the first part of the channels in the lowest bits, the next ones above."""
    parts = codes.chunk(coding.per_byte, dim=-1)
    return reduce(torch.bitwise_or, (part << at * coding.bits for at, part in enumerate(parts)))


def _unpacked(packed: Tensor, coding: Coding) -> Tensor:
    """Codes [..., D]."""
    if coding.bits == 8:
        return packed
    highest = 2**coding.bits - 1
    shifts = range(coding.bits, 8, coding.bits)
    return torch.cat([packed & highest, *(packed >> shift & highest for shift in shifts)], dim=-1)
