"""Low rank: latents of fewer numbers than a key or value has, of one head or of a group of heads together.

x is stored as z = (x - mean) @ encoder and read as mean + z @ decoder. Bases and means are constants of the model; only
latents are cache bytes. Letters as in `methods.stored`, E numbers of the heads that share a latent (shared * D), r of a
latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.stored import Codes, Coding

Turn = Callable[[Tensor, Tensor], Tensor]
"""Keys [n, C, D] moved by as many positions as [n, C] says, under the model's RoPE: `LayerView.rotate`."""


@dataclass(frozen=True, eq=False)
class Basis:
    """What takes numbers to a latent and back, float32. mean: [E]. encoder: [E, r]. decoder: [r, E]."""

    mean: Tensor
    encoder: Tensor
    decoder: Tensor

    @classmethod
    def orthonormal(cls, mean: Tensor, basis: Tensor) -> Basis:
        """Return that of orthonormal columns [E, r]."""
        return cls(mean, basis, basis.t())

    @property
    def rank(self) -> int:
        return int(self.encoder.shape[1])


@dataclass(frozen=True, eq=False)
class LowRank(Coding):
    """Latents of `heads` heads that follow each other, in the numbers' own type; equal only to itself.

    turn: takes RoPE off keys before they are stored and puts it on again when they are read; None to store them with
    it.
    """

    keys: Basis
    values: Basis
    heads: int = 1
    turn: Turn | None = None

    @property
    def shared(self) -> int:
        return self.heads

    @property
    def numbers(self) -> int:
        """Of a token of all heads that share a latent."""
        return self.keys.rank + self.values.rank

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> Latents:
        plain = keys if self.turn is None else self.turn(keys.float(), -positions)
        latents = self._latent(plain, self.keys).to(keys.dtype)
        return Latents(self, latents, self._latent(values, self.values).to(values.dtype))

    def _latent(self, x: Tensor, basis: Basis) -> Tensor:
        joined = x.reshape(-1, self.heads, *x.shape[1:]).transpose(1, 2).flatten(2)  # [n / heads, C, E]
        latents: Tensor = (joined.float() - basis.mean) @ basis.encoder
        return latents


@dataclass
class Latents(Codes):
    """keys, values: latents [n / heads, C, r]."""

    coding: LowRank
    keys: Tensor
    values: Tensor

    @property
    def slots(self) -> int:
        return int(self.keys.shape[1])

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def take(self, streams: Tensor) -> Latents:
        own = streams[:: self.coding.heads] // self.coding.heads
        return Latents(self.coding, self.keys[own], self.values[own])

    @classmethod
    def cat(cls, parts: Sequence[Latents]) -> Latents:
        return _joined(parts, dim=0)

    def then(self, later: Latents) -> Latents:
        return _joined([self, later], dim=1)

    def decode(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        turn, found = self.coding.turn, self._read(self.keys, self.coding.keys)
        keys.copy_(found if turn is None else turn(found, positions))
        values.copy_(self._read(self.values, self.coding.values))

    def _read(self, latents: Tensor, basis: Basis) -> Tensor:
        """What latents stand for: [n, C, D] float32."""
        joined = torch.matmul(latents.float(), basis.decoder).add_(basis.mean)
        return joined.view(*joined.shape[:2], self.coding.heads, -1).transpose(1, 2).flatten(0, 1)


def _joined(parts: Sequence[Latents], *, dim: int) -> Latents:
    keys, values = (torch.cat(own, dim=dim) for own in zip(*(part.tensors() for part in parts), strict=True))
    return Latents(parts[0].coding, keys, values)
