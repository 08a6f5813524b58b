"""What a KV may store instead of numbers: codes, and a KV most of whose slots are codes.

A `Coding` says how slots become codes; `Codes` are the slots of some streams that have become some. Codes are what a
prompt adds: constants of the model, such as bases, are held by the coding and are no cache bytes. Letters as in
`methods.base`, and n streams (KV heads of some row), C coded slots of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from methods.budget import PolicyError
from methods.device import Doubt, placed, settle
from methods.views import KV, POSITION_BYTES

UNSOUND = "keys or values are NaN, infinite or too large for what codes are scaled with; try bfloat16"
Refuse = Callable[[Tensor, Callable[[int], str]], None]


@dataclass(frozen=True, eq=False)
class Coding(ABC):
    """How slots become codes. Streams of equal codings, so of one hash, are decoded together.

    residual: last slots of every head that stay as they are, at least 1: a prompt's last token is fed again.
    """

    residual: int = field(default=1, kw_only=True)

    @property
    def step(self) -> int:
        """Slots that are coded at once while a cache grows: of a step from `residual` plain ones on, none is left."""
        return 1

    @property
    def shared(self) -> int:
        """Heads, one after the other, whose slots of a token are one code; they keep the same tokens."""
        return 1

    def coded(self, slots: int, kv: KV) -> int:
        """Return how many of a head's `slots` become codes."""
        return max(0, slots - self.residual)

    def due(self, plain: int, new: int) -> int:
        """Return how many of a stream's `plain` slots become codes before `new` tokens come to it, the oldest."""
        if plain + new < self.residual + self.step:
            return 0
        return max(0, min(plain, (plain + new - self.residual) // self.step * self.step))

    def nbytes(self, slots: int, key_dim: int, value_dim: int) -> int:
        """Return the bytes of `slots` coded slots of a head and their positions; PolicyError where none are told."""
        raise PolicyError(f"how many bytes {type(self).__name__} codes take is known only once they are made")

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> Codes:
        """Return the codes of keys and values [n, C, D], C > 0, whose tokens are at `positions`, [n, C] int32."""


class Codes(ABC):
    """Coded slots of n streams that have the same number of them."""

    coding: Coding

    @property
    @abstractmethod
    def slots(self) -> int:
        """C."""

    def later(self, keys: Tensor, values: Tensor, positions: Tensor) -> Codes:
        """Return the codes of slots of these streams that come later; arguments as of `Coding.encode`."""
        return self.coding.encode(keys, values, positions)

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return everything that is held for them, streams first: [n, ...], or [n / shared, ...]."""

    def scaled(self) -> Sequence[Tensor]:
        """Return those whose numbers must be finite: all floating ones, unless a class knows better."""
        return [x for x in self.tensors() if x.is_floating_point()]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    @abstractmethod
    def take(self, streams: Tensor) -> Self:
        """Return the codes of some of the streams, of all that share a code or of none. streams: [n'] int64."""

    @classmethod
    @abstractmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Return the streams of all `parts`, which have one coding and as many slots."""

    @abstractmethod
    def then(self, later: Self) -> Self | None:
        """Return these slots and `later` ones of the same streams; None where they are to be held apart."""

    @abstractmethod
    def decode(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Write what the codes stand for into keys and values [n, C, D]. positions: as in `Coding.encode`."""


@dataclass
class CodedKV(KV):
    """Slots in the order of their tokens: of every head first coded ones, then at most R as they were, then empty ones.

    keys, values: [1, H, R, D], those that are no codes; positions [1, H, S] are of all.
    counts: coded slots of each head. parts: their codes, with the heads that have them, those of one coding and number
    together. codings: of each head, by which what comes later is coded.
    A slot that is given up later (`positions` -1) must be none of the coded ones: a head's last tokens are not.
    """

    counts: tuple[int, ...] = ()
    parts: tuple[tuple[tuple[int, ...], Codes], ...] = ()
    codings: tuple[Coding, ...] = ()

    def load(self) -> tuple[Tensor, Tensor]:
        """Return decoded copies of all slots, [1, H, S, D] each; empty slots are 0."""
        slots = self.positions.shape[2]
        keys, values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (self.keys, self.values))
        for heads, codes in self.parts:
            at = placed(heads, self.keys.device)
            k, v = (x.new_empty(len(heads), codes.slots, x.shape[3]) for x in (keys, values))
            codes.decode(k, v, self.positions[0].index_select(0, at)[:, : codes.slots])
            for x, decoded in ((keys, k), (values, v)):
                x[0].narrow(1, 0, codes.slots).index_copy_(0, at, decoded)
        for head, count in enumerate(self.counts):
            rest = min(slots - count, self.keys.shape[2])
            keys[0, head, count : count + rest] = self.keys[0, head, :rest]
            values[0, head, count : count + rest] = self.values[0, head, :rest]
        return keys, values

    def codes_of(self, heads: Sequence[int]) -> list[Codes]:
        """Return the codes of heads that have the same number of one coding, as one; none where that is 0."""
        for own, codes in self.parts:
            if heads[0] in own:
                at = [own.index(head) for head in heads]
                return [codes if len(at) == len(own) else codes.take(placed(at, self.keys.device))]
        return []

    def take(self, slots: Tensor) -> KV:
        return KV(*self.load(), self.positions).take(slots)

    def bytes_of(self, live: int) -> int:
        """Codes with all that they are scaled with and positions, and the live slots that are none."""
        coded, count = sum(codes.nbytes for _, codes in self.parts), sum(self.counts)
        return coded + count * POSITION_BYTES + (live - count) * self.slot_bytes

    def reads(self, live: int) -> int:
        """Codes are read at their own size."""
        return self.bytes_of(live) - live * POSITION_BYTES


def encode(
    kv: KV, coding: Coding | Sequence[Coding], live: Sequence[int] | None = None, refuse: Refuse | None = None
) -> CodedKV:
    """Code a KV (B = 1) of any number of slots in each head. `kv` is left alone, and nothing of it is shared.

    coding: of all heads, or each head's own; heads that share a code have one number of slots, or ValueError. live:
    slots of each head, where they are known. refuse: as `LayerView.refuse`; None to refuse at once. Raises PolicyError
    for numbers that have no codes.
    """
    codings = (coding,) * kv.positions.shape[1] if isinstance(coding, Coding) else tuple(coding)
    last = torch.iinfo(kv.positions.dtype).max
    order = kv.positions.masked_fill(kv.positions < 0, last).argsort(dim=-1, stable=True)
    positions = kv.positions.gather(2, order)
    live = kv.live[0].tolist() if live is None else live
    counts = tuple(own.coded(slots, kv) for own, slots in zip(codings, live, strict=True))
    rest = max(slots - count for slots, count in zip(live, counts, strict=True))
    keys, values = (x.new_zeros(*x.shape[:2], rest, x.shape[3]) for x in (kv.keys, kv.values))
    for head, (slots, count) in enumerate(zip(live, counts, strict=True)):
        own = order[0, head, count:slots]
        keys[0, head, : len(own)], values[0, head, : len(own)] = kv.keys[0, head, own], kv.values[0, head, own]
    parts = []
    for kind in dict.fromkeys(zip(counts, codings, strict=True)):
        heads, (count, chosen) = (
            [head for head, own in enumerate(zip(counts, codings, strict=True)) if own == kind],
            kind,
        )
        if len(heads) % chosen.shared:
            raise ValueError(f"heads {heads} have {count} slots each, and {chosen.shared} heads share a code")
        if count:
            at = placed(heads, order.device)
            rows = order[0].index_select(0, at)[:, :count]  # [n, C]
            taken = kv.keys[0][at.unsqueeze(1), rows], kv.values[0][at.unsqueeze(1), rows]
            parts.append((tuple(heads), chosen.encode(*taken, positions[0].index_select(0, at)[:, :count])))
    scaled = [x for _, codes in parts for x in codes.scaled()]
    if scaled:
        flaws = torch.stack([x.isfinite().logical_not().any() for x in scaled]).sum()
        (refuse or _refuse)(flaws, UNSOUND.format)
    return CodedKV(keys, values, positions, counts=counts, parts=tuple(parts), codings=codings)


def _refuse(flaws: Tensor, told: Callable[[int], str]) -> None:
    settle([Doubt(flaws, told)])
