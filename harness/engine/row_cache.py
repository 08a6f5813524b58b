"""The layer cache of rows that grow by every token: whatever a policy left, every head at its own number of slots."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.kernels import slot_attention
from harness.engine.layer_cache import DecodingLayer, Parts, visible
from methods.base import KV
from methods.codes import CodedKV, Codes, Coding


class _Shape(NamedTuple):
    """What streams of a group have in common: live slots, and how many of the first are codes, and of what kind."""

    size: int
    coded: int = 0
    coding: Coding | None = None


@dataclass
class _Group:
    """Streams of one layer with the same number of slots: none is padded, and one alone computes the same.

    A stream is one KV head of one row, and its number is row * H + head. Codes stay codes: they are decoded for the
    length of a step.
    """

    streams: list[int]  # ascending
    keys: Tensor  # [n, 1, plain + room, D]
    values: Tensor  # [n, 1, plain + room, D]
    positions: Tensor  # [n, 1, size + room] int64, those of tokens still to come included
    size: int  # slots that the policies left, none of them empty
    plain: int  # those that they left as they were, after the coded ones
    codes: Codes | None = None

    def take(self, at: list[int], streams: list[int]) -> "_Group":
        """Some of the streams under new numbers, copied unless they are all."""
        if len(at) == len(self.streams):
            return replace(self, streams=streams)
        index = torch.tensor(at, device=self.keys.device)
        keys, values, positions = (x[index] for x in (self.keys, self.values, self.positions))
        codes = None if self.codes is None else self.codes.take(index)
        return _Group(streams, keys, values, positions, self.size, self.plain, codes)

    def load(self, grown: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, 1, size + grown, D], decoded where they are codes."""
        used = self.plain + grown
        plain = self.keys.narrow(2, 0, used), self.values.narrow(2, 0, used)
        if self.codes is None:
            return plain
        coded = self.codes.slots
        keys, values = (x.new_empty(*x.shape[:2], coded + used, x.shape[3]) for x in plain)
        self.codes.decode(keys[:, 0, :coded], values[:, 0, :coded])
        keys[:, :, coded:], values[:, :, coded:] = plain
        return keys, values


class GrowingRows(DecodingLayer):
    """R compressed rows that grow by every token. Every KV head of every row holds a number of slots of its own.

    Args:
        rows: what each row kept, every KV of batch 1.
        position: position of the next token, the same for all rows.
        room: tokens that can be appended before memory is allocated anew.
    """

    def __init__(self, rows: Sequence[KV], *, position: int, room: int) -> None:
        self.start = self.position = position
        self.room = room
        self.heads = rows[0].positions.shape[1]
        self.kept_bytes = [kv.nbytes for kv in rows]
        self._hold(_groups(rows, position=position, room=room))

    def append(self, keys: Tensor, values: Tensor) -> None:
        grown, new = self.position - self.start, keys.shape[2]
        if grown + new > self.room:
            self._widen(max(grown + new, 2 * self.room))
        for group, k, v in zip(self.groups, self._split(keys), self._split(values), strict=True):
            group.keys.narrow(2, group.plain + grown, new).copy_(k)
            group.values.narrow(2, group.plain + grown, new).copy_(v)
        self.position += new

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        grown = self.position - self.start
        asked = None  # one token sees all there is, unless a window ends before it
        if queries.shape[2] > 1 or window is not None:
            asked = torch.arange(self.position - queries.shape[2], self.position, device=queries.device)
        outputs = []
        for group, own in zip(self.groups, self._split(queries), strict=True):
            mask = None if asked is None else visible(group.positions[:, :, : group.size + grown], asked, window)
            outputs.append(slot_attention(own, *group.load(grown), mask=mask, scaling=scaling))
        out = self._parts.join(outputs)  # [R * H, G, Q, D]
        return out.reshape(queries.shape[0], -1, *out.shape[2:])

    def mark(self) -> int:
        return self.position

    def rewind(self, mark: int) -> None:
        self.position = mark

    def keep(self, rows: Sequence[int]) -> None:
        number = {row * self.heads + h: new * self.heads + h for new, row in enumerate(rows) for h in range(self.heads)}
        self.kept_bytes = [self.kept_bytes[row] for row in rows]
        kept = []
        for group in self.groups:
            at = [i for i, stream in enumerate(group.streams) if stream in number]
            if at:
                kept.append(group.take(at, [number[group.streams[i]] for i in at]))
        self._hold(kept)

    def nbytes(self, row: int) -> int:
        """What the row's policy left, and what every head appended since."""
        k, v = self.groups[0].keys, self.groups[0].values
        slot = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
        return self.kept_bytes[row] + (self.position - self.start) * self.heads * slot

    def _hold(self, groups: list[_Group]) -> None:
        self.groups = groups
        self._parts = Parts([group.streams for group in groups], groups[0].keys.device)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """The streams' parts of x [R, H * k, Q, D], by group: [n, k, Q, D]."""
        return self._parts.split(x.reshape(-1, x.shape[1] // self.heads, *x.shape[2:]))

    def _widen(self, room: int) -> None:
        for group in self.groups:
            later = torch.arange(self.start + self.room, self.start + room, device=group.keys.device)
            group.keys, group.values = (
                torch.cat([x, x.new_empty(*x.shape[:2], len(later), x.shape[3])], dim=2)
                for x in (group.keys, group.values)
            )
            group.positions = torch.cat([group.positions, later.expand(*group.positions.shape[:2], -1)], dim=2)
        self.room = room


def without(kv: KV, position: int) -> KV:
    """The same KV with the slots of one token given up; a last column that is empty for every head is cut off."""
    drop = kv.positions == position
    if not bool(drop.any()):
        return kv
    last = kv.positions.shape[2] - 1
    if type(kv) is KV and bool(drop[..., last].all()) and not kv.extra:
        return KV(kv.keys[:, :, :last], kv.values[:, :, :last], kv.positions[:, :, :last])
    return replace(kv, positions=kv.positions.masked_fill(drop, -1))


def _groups(rows: Sequence[KV], *, position: int, room: int) -> list[_Group]:
    """The streams of `rows` by their live slots, with room for the tokens from `position` on."""
    shapes = [_shapes(kv) for kv in rows]
    streams = defaultdict[_Shape, list[int]](list)
    for stream, shape in enumerate(chain.from_iterable(shapes)):
        streams[shape].append(stream)
    groups: dict[_Shape, _Group] = {}
    filled, codes = Counter[_Shape](), defaultdict[_Shape, list[Codes]](list)
    for kv, own in zip(rows, shapes, strict=True):
        keys, values, positions = _packed(kv, min(shape.size for shape in own))
        for shape, run in groupby(range(len(own)), key=own.__getitem__):
            if shape not in groups:
                groups[shape] = _empty(streams[shape], shape, keys, values, position=position, room=room)
            group, heads, first = groups[shape], list(run), filled[shape]
            filled[shape] += len(heads)
            to, of = slice(first, filled[shape]), slice(heads[0], heads[-1] + 1)
            group.keys[to, 0, : group.plain] = keys[0, of, : group.plain]
            group.values[to, 0, : group.plain] = values[0, of, : group.plain]
            group.positions[to, 0, : group.size] = positions[0, of, : group.size]
            if isinstance(kv, CodedKV):
                codes[shape] += kv.codes_of(heads)
    for shape, parts in codes.items():
        groups[shape].codes = Codes.cat(parts) if parts else None
    return list(groups.values())


def _shapes(kv: KV) -> list[_Shape]:
    """Of every head of a row."""
    live = kv.live[0].tolist()
    if not isinstance(kv, CodedKV):
        return [_Shape(size) for size in live]
    coding = kv.parts[0][1].coding if kv.parts else None
    return [_Shape(size, coded, coding if coded else None) for size, coded in zip(live, kv.counts, strict=True)]


def _packed(kv: KV, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of a row with its empty slots last, codes left out. least: live slots of some head."""
    if isinstance(kv, CodedKV):
        return kv.keys, kv.values, kv.positions
    if least < kv.positions.shape[2]:
        kv = KV(*kv.load(), kv.positions).take((kv.positions < 0).byte().argsort(dim=-1, stable=True))
    return *kv.load(), kv.positions


def _empty(streams: list[int], shape: _Shape, *like: Tensor, position: int, room: int) -> _Group:
    """A group of that shape, to be filled. like: keys and values of some row that is in it."""
    plain = shape.size - shape.coded
    keys, values = (x.new_empty(len(streams), 1, plain + room, x.shape[-1]) for x in like)
    positions = torch.arange(position - shape.size, position + room, device=keys.device).repeat(len(streams), 1, 1)
    return _Group(streams, keys, values, positions, shape.size, plain)
