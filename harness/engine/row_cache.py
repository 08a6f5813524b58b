"""The layer cache of rows that grow by every token: whatever a policy left, every head at its own number of slots."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from harness.engine.kernels import slot_attention
from harness.engine.layer_cache import DecodingLayer, Parts, visible
from methods.base import KV
from methods.codes import CodedKV, Codes, Coding


@dataclass
class _Group:
    """Streams of one layer with the same number of slots: none is padded, and one alone computes the same.

    A stream is one KV head of one row, and its number is row * H + head. Codes stay codes: they are decoded for the
    length of a step.
    """

    streams: list[int]  # ascending
    keys: Tensor  # [n, 1, C, D], C = size + room, less the coded slots
    values: Tensor  # [n, 1, C, D]
    positions: Tensor  # [n, 1, size + room] int64, those of tokens still to come included
    size: int  # slots that the policies left, none of them empty
    codes: Codes | None = None  # of the first slots

    @property
    def plain(self) -> int:
        """Slots that the policies left as they were."""
        return self.size if self.codes is None else self.size - self.codes.slots

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
            keys, values = group.load(grown)
            outputs.append(slot_attention(own, keys, values, mask=mask, scaling=scaling))
        out = self._parts.join(outputs)  # [R * H, G, Q, D]
        return out.reshape(queries.shape[0], -1, *out.shape[2:])

    def mark(self) -> int:
        return self.position

    def rewind(self, mark: int) -> None:
        self.position = mark

    def keep(self, rows: Sequence[int]) -> None:
        place = {row: new for new, row in enumerate(rows)}
        self.kept_bytes = [self.kept_bytes[row] for row in rows]
        kept = []
        for group in self.groups:
            members = [i for i, stream in enumerate(group.streams) if stream // self.heads in place]
            if not members:
                continue
            tensors, codes = (group.keys, group.values, group.positions), group.codes
            if len(members) < len(group.streams):
                index = torch.tensor(members, device=group.keys.device)
                tensors = (group.keys[index], group.values[index], group.positions[index])
                codes = None if codes is None else codes.take(index)
            old = [divmod(group.streams[i], self.heads) for i in members]
            kept.append(_Group([place[row] * self.heads + head for row, head in old], *tensors, group.size, codes))
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
            more = room - self.room
            later = torch.arange(self.start + self.room, self.start + room, device=group.keys.device)
            group.keys, group.values = (
                torch.cat([x, x.new_empty(*x.shape[:2], more, x.shape[3])], dim=2) for x in (group.keys, group.values)
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


@dataclass(frozen=True)
class _Shape:
    """What streams of a group have in common. size: live slots. codes: how many of them are codes, and of what kind."""

    size: int
    codes: tuple[int, Coding] | None = None

    @property
    def plain(self) -> int:
        return self.size if self.codes is None else self.size - self.codes[0]


def _groups(rows: Sequence[KV], *, position: int, room: int) -> list[_Group]:
    """The streams of `rows` by their live slots, with room for the tokens from `position` on."""
    shapes = [_shapes(kv) for kv in rows]
    streams: dict[_Shape, list[int]] = {}
    for stream, shape in enumerate(chain.from_iterable(shapes)):
        streams.setdefault(shape, []).append(stream)
    groups: dict[_Shape, _Group] = {}
    codes: dict[_Shape, list[Codes]] = {}
    for row, (kv, own) in enumerate(zip(rows, shapes, strict=True)):
        loaded = (kv.keys, kv.values) if isinstance(kv, CodedKV) else kv.load()
        for shape in dict.fromkeys(own):
            if shape not in groups:
                groups[shape] = _empty(streams[shape], shape, loaded, position=position, room=room)
            first = streams[shape].index(row * len(own) + own.index(shape))
            if isinstance(kv, CodedKV):
                heads = [head for head, other in enumerate(own) if other == shape]
                _fill_coded(groups[shape], first, kv, shape=shape, heads=heads)
                codes.setdefault(shape, []).extend(kv.codes_of(heads))
            elif shape.size:
                _fill(groups[shape], first, kv, loaded=loaded)
    for shape, parts in codes.items():
        groups[shape].codes = Codes.cat(parts) if parts else None
    return list(groups.values())


def _shapes(kv: KV) -> list[_Shape]:
    """Of every head of a row."""
    if not isinstance(kv, CodedKV):
        return [_Shape(size) for size in kv.live[0].tolist()]
    found = []
    for count, positions in zip(kv.counts, kv.positions[0].tolist(), strict=True):
        plain = sum(at >= 0 for at in positions[count:])
        found.append(_Shape(count + plain, (count, kv.parts[0][1].coding) if count else None))
    return found


def _empty(streams: list[int], shape: _Shape, loaded: tuple[Tensor, Tensor], *, position: int, room: int) -> _Group:
    """A group of that shape, to be filled. loaded: keys and values of some row that is in it."""
    keys, values = (x.new_empty(len(streams), 1, shape.plain + room, x.shape[-1]) for x in loaded)
    positions = torch.arange(position - shape.size, position + room, device=keys.device).repeat(len(streams), 1, 1)
    return _Group(streams, keys, values, positions, shape.size)


def _fill(group: _Group, first: int, kv: KV, *, loaded: tuple[Tensor, Tensor]) -> None:
    """Copy the heads of `kv` that belong to `group` into its streams from the `first` on, without empty slots."""
    live = kv.positions[0] >= 0  # [H, S]
    slots = (live & (live.sum(dim=1, keepdim=True) == group.size)).flatten().nonzero().squeeze(1)
    whole = len(slots) == live.numel()  # nothing to leave out: one copy
    for to, x in zip((group.keys, group.values, group.positions), (*loaded, kv.positions), strict=True):
        kept = x[0] if whole else x[0].flatten(0, 1).index_select(0, slots).view(-1, group.size, *x.shape[3:])
        to[first : first + len(kept), 0, : group.size] = kept


def _fill_coded(group: _Group, first: int, kv: CodedKV, *, shape: _Shape, heads: list[int]) -> None:
    """`_fill` of what is no code, for heads of one shape."""
    own = slice(first, first + len(heads))
    group.keys[own, 0, : shape.plain] = kv.keys[0, heads, : shape.plain]
    group.values[own, 0, : shape.plain] = kv.values[0, heads, : shape.plain]
    group.positions[own, 0, : shape.size] = kv.positions[0, heads, : shape.size]
