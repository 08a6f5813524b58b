"""The layer cache of rows whose policy evicts while decoding: they stay at their budget while they grow."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from harness.engine.kernels import slot_attention, slot_weights
from harness.engine.layer_cache import DecodingLayer, Parts, visible
from methods.base import KV, KVPolicy, PolicyError, StepView


@dataclass
class EvictingRow:
    """A row whose policy evicts after every decoded token. kv has at least one empty slot per head to write into."""

    policy: KVPolicy
    budget: int
    kv: KV


@dataclass
class _Batch:
    """Rows of one policy, budget and number of slots, in one KV: they are asked, and evict, at once."""

    rows: list[int]  # ascending
    policy: KVPolicy
    budget: int
    kv: KV  # B = len(rows)


class EvictingRows(DecodingLayer):
    """Rows that stay at their budget while they grow; one token at a time (Q = 1).

    In a sliding-window layer, which no policy sees, tokens leave as the window passes them.

    Args:
        rows: what each row kept, every KV of batch 1. It is the layer's from then on.
        position: position of the next token, the same for all rows.
    """

    single_step = True

    def __init__(self, rows: Sequence[EvictingRow], position: int) -> None:
        self.position = position
        alike: dict[Hashable, list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault(_alike(row, i), []).append(i)
        batches = []
        for own in alike.values():
            first = rows[own[0]]
            batches.append(_Batch(own, first.policy, first.budget, _merged([rows[i].kv for i in own])))
        self._hold(batches)

    def append(self, keys: Tensor, values: Tensor) -> None:
        for batch, k, v in zip(self.batches, self._parts.split(keys), self._parts.split(values), strict=True):
            kv = batch.kv
            lowest, free = kv.positions.min(dim=-1, keepdim=True)  # [B, H, 1], an empty slot
            if int(lowest.max()) >= 0:
                name = type(batch.policy).__name__
                raise PolicyError(f"{name} left no slot for the next token; after_step must free one")
            wide = free.unsqueeze(-1)
            kv.keys.scatter_(2, wide.expand(k.shape), k)
            kv.values.scatter_(2, wide.expand(v.shape), v)
            kv.positions.scatter_(2, free, self.position)
        self.position += 1

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        last = self.position - 1
        asked = torch.tensor([last], device=queries.device)
        outputs = []
        for batch, query in zip(self.batches, self._parts.split(queries), strict=True):
            mask = visible(batch.kv.positions, asked, window)
            keys, values = batch.kv.load()
            outputs.append(slot_attention(query, keys, values, mask=mask, scaling=scaling))
            if window is not None:
                batch.kv.positions.masked_fill_(batch.kv.positions <= last - window + 1, -1)
            else:
                wanted = batch.policy.needs.decode_attention
                _evict(batch, slot_weights(query, keys, mask=mask, scaling=scaling) if wanted else None, position=last)
        return self._parts.join(outputs)

    def mark(self) -> Any:
        return self.position, [copy_kv(batch.kv) for batch in self.batches]

    def rewind(self, mark: Any) -> None:
        self.position, kvs = mark
        for batch, kv in zip(self.batches, kvs, strict=True):
            batch.kv = kv

    def keep(self, rows: Sequence[int]) -> None:
        place = {row: new for new, row in enumerate(rows)}
        kept = []
        for batch in self.batches:
            members = [i for i, row in enumerate(batch.rows) if row in place]
            if members:
                kv = batch.kv if len(members) == len(batch.rows) else _merged([_row(batch.kv, i) for i in members])
                kept.append(replace(batch, rows=[place[batch.rows[i]] for i in members], kv=kv))
        self._hold(kept)

    def nbytes(self, row: int) -> int:
        batch = next((batch for batch in self.batches if row in batch.rows), None)
        if batch is None:
            raise IndexError(f"row {row} of {sum(len(batch.rows) for batch in self.batches)}")
        return (batch.kv if len(batch.rows) == 1 else _row(batch.kv, batch.rows.index(row))).nbytes

    def _hold(self, batches: list[_Batch]) -> None:
        self.batches = batches
        self._parts = Parts([batch.rows for batch in batches], batches[0].kv.positions.device)


def _alike(row: EvictingRow, alone: int) -> Hashable:
    """Equal for rows that one KV can hold. alone: the row's number, which sets apart what cannot be held with others.

    What a subclass of KV holds besides tensors is one for the whole batch. It changes alike in rows that start alike:
    with the same fields and as many live slots in every head.
    """
    kv = row.kv
    if any(x.shape[:2] != kv.positions.shape[:2] for x in kv.extra.values()):
        return alone
    side = tuple((name, x.shape, x.dtype) for name, x in sorted(kv.extra.items()))
    tensors = (type(kv), kv.keys.shape, kv.keys.dtype, kv.values.shape, kv.values.dtype, kv.positions.shape, side)
    if type(kv) is KV:
        return row.policy, row.budget, tensors
    own = {field.name for field in fields(kv)} - {field.name for field in fields(KV)}
    state = tuple((name, getattr(kv, name)) for name in sorted(own))
    if any(isinstance(value, Tensor) or not isinstance(value, Hashable) for _, value in state):
        return alone
    return row.policy, row.budget, tensors, state, tuple(kv.live[0].tolist())


def _merged(kvs: Sequence[KV]) -> KV:
    """The KVs of alike rows as one."""
    first = kvs[0]
    if len(kvs) == 1:
        return first
    extra = {name: torch.cat([kv.extra[name] for kv in kvs]) for name in first.extra}
    keys, values = torch.cat([kv.keys for kv in kvs]), torch.cat([kv.values for kv in kvs])
    return replace(first, keys=keys, values=values, positions=torch.cat([kv.positions for kv in kvs]), extra=extra)


def _row(kv: KV, row: int) -> KV:
    """One row of a batch's KV, not a copy."""
    at = slice(row, row + 1)
    extra = {name: x[at] for name, x in kv.extra.items()}
    return replace(kv, keys=kv.keys[at], values=kv.values[at], positions=kv.positions[at], extra=extra)


def _evict(batch: _Batch, attention: Tensor | None, *, position: int) -> None:
    kv = batch.kv
    freed = batch.policy.after_step(StepView(kv, attention, position, batch.budget))  # [B, H]
    if freed.shape != kv.positions.shape[:2]:
        name, wanted = type(batch.policy).__name__, list(kv.positions.shape[:2])
        raise PolicyError(f"{name}.after_step returned shape {list(freed.shape)}; give a slot to each head, {wanted}")
    slot = freed.unsqueeze(-1)
    at = slot.clamp(min=0)
    kv.positions.scatter_(2, at, kv.positions.gather(2, at).masked_fill_(slot >= 0, -1))


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
