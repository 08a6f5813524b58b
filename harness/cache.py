"""Layer caches of the engine: one that observes a prefill, one that holds many compressed rows, one that evicts.

A layer cache takes new keys and values (`append`) and answers the queries of the same tokens (`attend`). All rows of a
batch are at the same token position, because they continue the same prompt; what differs is which slots they kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from harness.kernels import causal_attention, column_sums, slot_attention, slot_weights
from methods.base import KV, KVPolicy, Needs, PolicyError, StepView


class LayerCache(ABC):
    """One layer of a batch of R rows. Keys and values [R, H, Q, D], queries [R, Hq, Q, D], RoPE applied."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens' keys and values."""

    @abstractmethod
    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        """Attention output [R, Hq, Q, D] of the tokens just appended. window: the layer's sliding window, if any."""


class PrefillLayer(LayerCache):
    """Keeps the whole prompt (R = 1) and what `needs` asks for: window queries, streamed column sums."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.keys: Tensor
        self.values: Tensor
        self.queries: Tensor
        self.scaling = 1.0
        self.window: int | None = None
        self.sums: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys.contiguous(), values.contiguous()  # heads first: policies take rows of slots

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        self.scaling, self.window = scaling, window
        if window is None:
            self.queries = queries[:, :, max(0, queries.shape[2] - self.needs.window) :].clone()
            if self.needs.column_sums:
                self.sums = column_sums(queries, self.keys, scaling=scaling)
        return causal_attention(queries, self.keys, self.values, scaling=scaling, window=window)

    def kv(self) -> KV:
        """The full cache; of a sliding-window layer, what later tokens can still see."""
        tokens = self.keys.shape[2]
        start = 0 if self.window is None else max(0, tokens - self.window)
        positions = torch.arange(start, tokens, device=self.keys.device)
        shape = (*self.keys.shape[:2], tokens - start)
        return KV(self.keys[:, :, start:], self.values[:, :, start:], positions.expand(shape))


@dataclass
class _Group:
    """Rows of one layer with the same number of slots, so that nothing is padded and a row alone computes the same."""

    rows: list[int]  # where these rows stand in the batch, ascending
    index: Tensor | slice  # the same, as a slice where they are evenly spaced: views instead of copies
    keys: Tensor  # [r, H, C, D]
    values: Tensor  # [r, H, C, D]
    positions: Tensor  # [r, H, C] int64, -1 = empty
    size: int  # columns that the policies left
    used: int  # columns in use
    holes: bool  # some used column is an empty slot


class RowsLayer(LayerCache):
    """R compressed rows that grow by every token. Different rows may hold different numbers of slots.

    Args:
        rows: what each row kept, every KV of batch 1.
        position: position of the next token, the same for all rows.
        room: tokens that can be appended.
    """

    def __init__(self, rows: Sequence[KV], *, position: int, room: int) -> None:
        self.position = position
        self.kept_bytes = [kv.nbytes for kv in rows]
        self.groups: list[_Group] = []
        sizes: dict[int, list[int]] = {}
        for row, kv in enumerate(rows):
            sizes.setdefault(kv.positions.shape[2], []).append(row)
        for size, members in sizes.items():
            self.groups.append(_group([rows[row] for row in members], members, size + room))

    def append(self, keys: Tensor, values: Tensor) -> None:
        new = keys.shape[2]
        positions = torch.arange(self.position, self.position + new, device=keys.device)
        for group in self.groups:
            columns = slice(group.used, group.used + new)
            group.keys[:, :, columns] = keys[group.index]
            group.values[:, :, columns] = values[group.index]
            group.positions[:, :, columns] = positions
            group.used += new
        self.position += new

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        out = torch.empty_like(queries)
        for group in self.groups:
            keys, values = group.keys[:, :, : group.used], group.values[:, :, : group.used]
            mask = None
            if queries.shape[2] > 1 or group.holes or window is not None:
                asked = torch.arange(self.position - queries.shape[2], self.position, device=queries.device)
                mask = _visible(group.positions[:, :, : group.used], asked, window)
            out[group.index] = slot_attention(queries[group.index], keys, values, mask=mask, scaling=scaling)
        return out

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every row."""
        self.position -= tokens
        for group in self.groups:
            group.used -= tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row that is not in `rows` (ascending); the kept ones are renumbered from 0."""
        place = {row: new for new, row in enumerate(rows)}
        self.kept_bytes = [self.kept_bytes[row] for row in rows]
        kept = []
        for group in self.groups:
            members = [i for i, row in enumerate(group.rows) if row in place]
            if not members:
                continue
            index = torch.tensor(members, device=group.keys.device)
            new = [place[group.rows[i]] for i in members]
            tensors = (group.keys[index], group.values[index], group.positions[index])
            kept.append(
                _Group(new, _index(new, index.device), *tensors, size=group.size, used=group.used, holes=group.holes)
            )
        self.groups = kept

    def nbytes(self, row: int) -> int:
        """Measured bytes of a row: what its policy left, and the live slots appended since."""
        for group in self.groups:
            for i, member in enumerate(group.rows):
                if member == row:
                    live = int((group.positions[i, :, group.size : group.used] >= 0).sum())
                    slot = group.keys.shape[-1] * group.keys.element_size()
                    slot += group.values.shape[-1] * group.values.element_size()
                    return self.kept_bytes[row] + live * slot
        raise IndexError(f"row {row} of {len(self.kept_bytes)}")


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
            mask = _visible(row.kv.positions, asked, window)
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


def without(kv: KV, position: int) -> KV:
    """The same KV with the slots of one token given up; a last column that is empty for every head is cut off."""
    drop = kv.positions == position
    if not bool(drop.any()):
        return kv
    last = kv.positions.shape[2] - 1
    if type(kv) is KV and bool(drop[..., last].all()) and not kv.extra:
        return KV(kv.keys[:, :, :last], kv.values[:, :, :last], kv.positions[:, :, :last])
    return replace(kv, positions=kv.positions.masked_fill(drop, -1))


def with_room(kv: KV, slots: int) -> KV:
    """A copy with `slots` columns, the added ones empty (side data 0)."""
    add = slots - kv.positions.shape[2]

    def grow(x: Tensor, value: float) -> Tensor:
        shape = list(x.shape)
        shape[2] = add
        return torch.cat([x, x.new_full(shape, value)], dim=2)

    extra = {name: grow(x, 0) for name, x in kv.extra.items()}
    return replace(kv, keys=grow(kv.keys, 0), values=grow(kv.values, 0), positions=grow(kv.positions, -1), extra=extra)


def copy_kv(kv: KV) -> KV:
    extra = {name: x.clone() for name, x in kv.extra.items()}
    return replace(kv, keys=kv.keys.clone(), values=kv.values.clone(), positions=kv.positions.clone(), extra=extra)


def _group(kvs: Sequence[KV], members: Sequence[int], capacity: int) -> _Group:
    loaded = [kv.load() for kv in kvs]
    _, heads, size, dim = loaded[0][0].shape
    like = loaded[0][0]
    keys = like.new_empty(len(kvs), heads, capacity, dim)
    values = like.new_empty(len(kvs), heads, capacity, loaded[0][1].shape[-1])
    positions = torch.full((len(kvs), heads, capacity), -1, device=like.device)
    for i, (kv, (k, v)) in enumerate(zip(kvs, loaded, strict=True)):
        keys[i, :, :size], values[i, :, :size] = k[0], v[0]
        positions[i, :, :size] = kv.positions[0]
    holes = bool((positions[:, :, :size] < 0).any())
    return _Group(list(members), _index(members, like.device), keys, values, positions, size, size, holes)


def _index(rows: Sequence[int], device: torch.device) -> Tensor | slice:
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = list(range(rows[0], rows[-1] + 1, step)) == list(rows)
    return slice(rows[0], rows[-1] + 1, step) if even else torch.tensor(rows, device=device)


def _visible(positions: Tensor, asked: Tensor, window: int | None) -> Tensor:
    """[R, H, Q, S] bool: slots that hold a token at or before each asked position, inside the sliding window."""
    slot, query = positions.unsqueeze(2), asked[:, None]
    mask = (slot >= 0) & (slot <= query)
    return mask if window is None else mask & (slot > query - window)
