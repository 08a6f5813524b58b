"""The layer cache of rows whose policy evicts while decoding: they stay at their budget while they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from harness.cache import LayerCache, visible
from harness.kernels import slot_attention, slot_weights
from methods.base import KV, KVPolicy, PolicyError, StepView


@dataclass
class EvictingRow:
    """A row whose policy evicts after every decoded token. kv has at least one empty slot per head to write into."""

    policy: KVPolicy
    budget: int
    kv: KV


@dataclass
class EvictingLayer(LayerCache):
    """Rows that stay at their budget while they grow; one token at a time (Q = 1).

    In a sliding-window layer, which no policy sees, tokens leave as the window passes them.
    """

    rows: list[EvictingRow]
    position: int
    _asked: int = field(default=0, repr=False)

    def append(self, keys: Tensor, values: Tensor) -> None:
        for i, row in enumerate(self.rows):
            kv = row.kv
            free = kv.positions.argmin(dim=-1, keepdim=True)  # [1, H, 1], an empty slot
            if bool((kv.positions.gather(2, free) >= 0).any()):
                name = type(row.policy).__name__
                raise PolicyError(f"{name} left no slot for the next token; after_step must free one")
            wide = free.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
            kv.keys.scatter_(2, wide, keys[i : i + 1])
            kv.values.scatter_(2, wide, values[i : i + 1])
            kv.positions.scatter_(2, free, self.position)
        self._asked = self.position
        self.position += 1

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        asked = torch.tensor([self._asked], device=queries.device)
        outputs = []
        for i, row in enumerate(self.rows):
            query = queries[i : i + 1]
            mask = visible(row.kv.positions, asked, window)
            keys, values = row.kv.load()
            outputs.append(slot_attention(query, keys, values, mask=mask, scaling=scaling))
            if window is not None:
                row.kv.positions.masked_fill_(row.kv.positions <= self._asked - window + 1, -1)
            else:
                wanted = row.policy.needs.decode_attention
                self._evict(row, slot_weights(query, keys, mask=mask, scaling=scaling) if wanted else None)
        return torch.cat(outputs)

    def _evict(self, row: EvictingRow, attention: Tensor | None) -> None:
        freed = row.policy.after_step(StepView(row.kv, attention, self._asked, row.budget)).unsqueeze(-1)  # [1, H, 1]
        old = row.kv.positions.gather(2, freed.clamp(min=0))
        row.kv.positions.scatter_(2, freed.clamp(min=0), torch.where(freed < 0, old, -1))

    def snapshot(self) -> Any:
        """State to come back to with `restore`, a copy."""
        return self.position, [copy_kv(row.kv) for row in self.rows]

    def restore(self, state: Any) -> None:
        self.position, kvs = state
        for row, kv in zip(self.rows, kvs, strict=True):
            row.kv = kv

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row that is not in `rows`."""
        self.rows = [self.rows[row] for row in rows]

    def nbytes(self, row: int) -> int:
        return self.rows[row].kv.nbytes


def with_room(kv: KV, slots: int) -> KV:
    """A copy with `slots` columns, the added ones empty (side data 0)."""
    add = slots - kv.positions.shape[2]

    def grow(x: Tensor, value: float) -> Tensor:
        shape = list(x.shape)
        shape[2] = add
        return torch.cat([x, x.new_full(shape, value)], dim=2)

    sized = kv.positions.shape
    extra = {name: grow(x, 0) if x.shape[:3] == sized else x.clone() for name, x in kv.extra.items()}
    return replace(kv, keys=grow(kv.keys, 0), values=grow(kv.values, 0), positions=grow(kv.positions, -1), extra=extra)


def copy_kv(kv: KV) -> KV:
    extra = {name: x.clone() for name, x in kv.extra.items()}
    return replace(kv, keys=kv.keys.clone(), values=kv.values.clone(), positions=kv.positions.clone(), extra=extra)
