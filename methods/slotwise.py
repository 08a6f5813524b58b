"""Codes of single slots: each becomes codes by itself, so a decoded token is one more slot of the same codes.

Letters as in `methods.stored`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.stored import Codes, Coding
from methods.views import POSITION_BYTES


@dataclass(frozen=True)
class SlotCoding(Coding):
    """How one slot becomes codes. A subclass says what is held of it and how that is read."""

    @abstractmethod
    def slot_bytes(self, key_dim: int, value_dim: int) -> int:
        """Return the bytes of what `held` makes of a slot."""

    @property
    def head_bytes(self) -> int:
        """Bytes of what `fixed` makes of a stream."""
        return 0

    @abstractmethod
    def held(self, keys: Tensor, values: Tensor, fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what is held for keys and values [n, C, D]: [n, C, ...] each. fixed: as `fixed` made it."""

    def fixed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return what the slots of a stream are coded by, those that come later too, from its first ones: [n, ...]."""
        return ()

    @abstractmethod
    def read(self, held: Sequence[Tensor], fixed: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        """Write what `held` stands for into keys and values [n, C, D]."""

    def scaled(self, held: Sequence[Tensor], fixed: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return numbers that are finite where keys and values are."""
        return [x for x in (*held, *fixed) if x.is_floating_point()]

    def nbytes(self, slots: int, key_dim: int, value_dim: int) -> int:
        return slots * (self.slot_bytes(key_dim, value_dim) + POSITION_BYTES) + self.head_bytes * (slots > 0)

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> SlotCodes:
        fixed = self.fixed(keys, values)
        return SlotCodes(self, self.held(keys, values, fixed), fixed)


@dataclass
class SlotCodes(Codes):
    """What a `SlotCoding` made. held: [n, C, ...] each. fixed: [n, ...] each."""

    coding: SlotCoding
    held: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]

    @property
    def slots(self) -> int:
        return int(self.held[0].shape[1])

    def later(self, keys: Tensor, values: Tensor, positions: Tensor) -> SlotCodes:
        return SlotCodes(self.coding, self.coding.held(keys, values, self.fixed), self.fixed)

    def tensors(self) -> list[Tensor]:
        return [*self.held, *self.fixed]

    def scaled(self) -> Sequence[Tensor]:
        return self.coding.scaled(self.held, self.fixed)

    def take(self, streams: Tensor) -> SlotCodes:
        held, fixed = (tuple(x[streams] for x in own) for own in (self.held, self.fixed))
        return SlotCodes(self.coding, held, fixed)

    @classmethod
    def cat(cls, parts: Sequence[SlotCodes]) -> SlotCodes:
        if len(parts) == 1:
            return parts[0]
        held = tuple(map(torch.cat, zip(*(own.held for own in parts), strict=True)))
        fixed = tuple(map(torch.cat, zip(*(own.fixed for own in parts), strict=True)))
        return cls(parts[0].coding, held, fixed)

    def then(self, later: SlotCodes) -> SlotCodes:
        held = tuple(torch.cat(own, dim=1) for own in zip(self.held, later.held, strict=True))
        return SlotCodes(self.coding, held, self.fixed)

    def decode(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.coding.read(self.held, self.fixed, keys, values)
