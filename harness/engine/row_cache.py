"""The layer cache of rows that grow by every token: whatever a policy left, every head at its own number of slots."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.kernels import slot_attention
from harness.engine.layer_cache import INDEX_BYTES, DecodingLayer, Parts, room_step, visible
from harness.engine.packed import Held, storage_bytes, survey
from methods.base import KV
from methods.device import placed
from methods.stored import CodedKV, Codes, Coding
from methods.views import Form


class _Shape(NamedTuple):
    """What streams of a group have in common: live slots; how many of the first are codes, and of what kind they are.

    step: tokens that memory is added for at once, by what the whole row holds in this layer.
    """

    size: int
    step: int
    coded: int = 0
    coding: Coding | None = None
    implied: bool = False  # whether positions are those of the last tokens, in order

    @property
    def plain(self) -> int:
        return self.size - self.coded


@dataclass
class _Group:
    """Streams of one layer with the same number of slots: none is padded, and one alone computes the same.

    A stream is one KV head of one row, and its number is row * H + head. Codes stay codes: they are decoded for the
    length of a step, and what comes later becomes codes too. Of `mark`, nothing that is held is changed but its end.
    """

    streams: list[int]  # ascending
    keys: Tensor  # [n, 1, plain + room, D]
    values: Tensor  # [n, 1, plain + room, D]
    positions: Tensor | None  # [n, 1, size] int32; None where they are implied, as those of tokens that came later are
    size: int  # slots that the policies left, none of them empty
    plain: int  # those that they left as they were, after the coded ones, less those coded since
    step: int  # tokens that memory is added for at once, and a sixteenth of those that came
    coding: Coding | None = None
    codes: tuple[Codes, ...] = ()  # one after the other

    def take(self, at: list[int], streams: list[int]) -> "_Group":
        """Some of the streams under new numbers, copied unless they are all."""
        if len(at) == len(self.streams):
            return replace(self, streams=streams)
        index = torch.tensor(at, device=self.keys.device)
        keys, values = self.keys[index], self.values[index]
        positions = None if self.positions is None else self.positions[index]
        codes = tuple(own.take(index) for own in self.codes)
        return replace(self, streams=streams, keys=keys, values=values, positions=positions, codes=codes)

    @property
    def room(self) -> int:
        """Tokens that fit after the slots that the policies left."""
        return self.keys.shape[2] - self.plain

    @property
    def coded(self) -> int:
        """Slots of each stream that are codes."""
        return sum(own.slots for own in self.codes)

    def code(self, start: int, grown: int, new: int) -> int:
        """Code the oldest plain slots as far as `new` tokens to come leave more than a residual and a step of them.

        start, grown: as in `tokens`. Return how many slots of each stream have become codes.
        """
        count = 0 if self.coding is None else self.coding.due(self.plain + grown, new)
        if self.coding is None or not count:
            return 0
        first = self.coded
        positions = self.tokens(start, grown)[:, 0, first : first + count]
        encode = self.codes[-1].later if self.codes else self.coding.encode
        found = encode(self.keys[:, 0, :count], self.values[:, 0, :count], positions)
        joined = self.codes[-1].then(found) if self.codes else None
        self.codes = (*self.codes, found) if joined is None else (*self.codes[:-1], joined)
        self.keys, self.values = (x[:, :, count:].clone() for x in (self.keys, self.values))
        self.plain -= count
        return count

    def resize(self, grown: int, room: int) -> None:
        """Copy what it holds to memory for `room` tokens. grown: tokens that came."""
        used = self.plain + grown
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], self.plain + room, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)

    def tokens(self, start: int, grown: int) -> Tensor:
        """The token of every slot: [n, 1, size + grown] int32. start: the first one that came later."""
        before = self.size if self.positions is None else 0
        run = torch.arange(start - before, start + grown, dtype=torch.int32, device=self.keys.device)
        run = run.expand(len(self.streams), 1, -1)
        return run if self.positions is None else torch.cat([self.positions, run], dim=2)

    def allocated(self, streams: int) -> int:
        """Bytes that are allocated for so many of its streams."""
        own = [x for x in (self.keys, self.values, self.positions) if x is not None]
        held = storage_bytes([*own, *chain.from_iterable(codes.tensors() for codes in self.codes)])
        return held * streams // len(self.streams)

    def load(self, start: int, grown: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, 1, size + grown, D], decoded where they are codes. start, grown: as in `tokens`."""
        used = self.plain + grown
        plain = self.keys.narrow(2, 0, used), self.values.narrow(2, 0, used)
        if not self.codes:
            return plain
        keys, values = (x.new_empty(*x.shape[:2], self.coded + used, x.shape[3]) for x in plain)
        tokens, first = self.tokens(start, grown)[:, 0], 0
        for codes in self.codes:
            own = slice(first, first + codes.slots)
            codes.decode(keys[:, 0, own], values[:, 0, own], tokens[:, own])
            first = own.stop
        keys[:, :, first:], values[:, :, first:] = plain
        return keys, values


class _Mark(NamedTuple):
    """What `rewind` needs. coding: the groups whose later slots become codes, as they were; None for others."""

    position: int
    coding: list[_Group | None]
    less: list[int]


class GrowingRows(DecodingLayer):
    """R compressed rows that grow by every token. Every KV head of every row holds a number of slots of its own.

    Args:
        rows: what each row kept, every KV of batch 1.
        position: position of the next token, the same for all rows.
        room: most tokens that will come; None when that is not known. Memory for them is added in steps (`room_step`),
            so that every row has little more than it fills.
        window: whether this is a layer of a sliding window.
        known: of each row what the host knows, where it does.
    """

    groups: list[_Group]

    def __init__(
        self,
        rows: Sequence[KV],
        *,
        position: int,
        room: int | None,
        window: bool = False,
        known: Sequence[Held] | None = None,
    ) -> None:
        self.start = self.position = position
        self.room = room
        self.heads = rows[0].positions.shape[1]
        first = rows[0]
        like = (first.keys, first.values) if isinstance(first, CodedKV) else first.load()
        self.slot_bytes = sum(x.shape[-1] * x.element_size() for x in like)  # of a token that comes
        known = survey(rows, position, [window] * len(rows)) if known is None else known
        self.kept_bytes = [own.nbytes for own in known]
        self.extra, self._less = [kv.extra for kv in rows], [0] * len(rows)
        steps = [room_step(kept // (self.heads * self.slot_bytes)) for kept in self.kept_bytes]
        shapes = [_shapes(*own) for own in zip(rows, steps, known, strict=True)]
        self._hold(_groups(rows, shapes, self._room))
        self._stored = [self.stored_bytes(row) for row in range(len(rows))]

    def append(self, keys: Tensor, values: Tensor) -> None:
        grown, new = self.position - self.start, keys.shape[2]
        for group in self.groups:
            coded = self._code(group, grown, new)
            if coded or grown + new > group.room:
                self._resize(group, grown, max(grown + new, self._room(group)))
        for group, k, v in zip(self.groups, self._split(keys), self._split(values), strict=True):
            group.keys.narrow(2, group.plain + grown, new).copy_(k)
            group.values.narrow(2, group.plain + grown, new).copy_(v)
        self.position += new

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        grown = self.position - self.start
        asked = None  # one token sees all there is, unless a window ends before it
        if queries.shape[2] > 1 or form.window is not None:
            asked = torch.arange(self.position - queries.shape[2], self.position, device=queries.device)
        forms, outputs = self._forms(form, queries.shape[0]), list[Tensor]()
        for group, own, of in zip(self.groups, self._split(queries), forms, strict=True):
            mask = None if asked is None else visible(group.tokens(self.start, grown), asked, of.window)
            keys, values = group.load(self.start, grown)
            outputs.append(slot_attention(own, keys, values, of, mask=mask))
        out = self._parts.join(outputs)  # [R * H, G, Q, D]
        return out.reshape(queries.shape[0], -1, *out.shape[2:])

    def mark(self) -> _Mark:
        held = [replace(group) if group.coding else None for group in self.groups]
        return _Mark(self.position, held, [*self._less])

    def rewind(self, mark: _Mark) -> None:
        self.position, self._less = mark.position, mark.less
        if any(mark.coding):
            self.groups = [own or group for own, group in zip(mark.coding, self.groups, strict=True)]
            self._stored = [self.stored_bytes(row) for row in range(len(self._stored))]
        for group in self.groups:
            room = self._room(group)
            if group.room > room:
                self._resize(group, mark.position - self.start, room)

    def keep(self, rows: Sequence[int]) -> None:
        number = {row * self.heads + h: new * self.heads + h for new, row in enumerate(rows) for h in range(self.heads)}
        self.kept_bytes, self.extra = [self.kept_bytes[row] for row in rows], [self.extra[row] for row in rows]
        self._stored, self._less = ([own[row] for row in rows] for own in (self._stored, self._less))
        kept = []
        for group in self.groups:
            at = [i for i, stream in enumerate(group.streams) if stream in number]
            if at:
                kept.append(group.take(at, [number[group.streams[i]] for i in at]))
        self._hold(kept)

    def nbytes(self, row: int) -> int:
        """What the row's policy left, and what every head appended since, as it is stored by now."""
        return self.kept_bytes[row] + (self.position - self.start) * self.heads * self.slot_bytes - self._less[row]

    def stored_bytes(self, row: int) -> int:
        group_of = {stream: i for i, group in enumerate(self.groups) for stream in group.streams}
        own = [group_of[stream] for stream in range(row * self.heads, (row + 1) * self.heads)]
        alone = [group for first in dict.fromkeys(own) for group in own if group == first]
        index = 0 if own == alone else INDEX_BYTES * self.heads
        streams = sum(self.groups[group].allocated(count) for group, count in Counter(own).items())
        return streams + index + storage_bytes(self.extra[row].values())

    @property
    def stored(self) -> list[int]:
        return self._stored

    def _code(self, group: _Group, grown: int, new: int) -> int:
        """`_Group.code`, and keep up what its rows hold less for it."""
        before, held = self._of_rows(group), sum(own.nbytes for own in group.codes)
        coded = group.code(self.start, grown, new)
        if coded:
            more = sum(own.nbytes for own in group.codes) - held
            for row, count in Counter(stream // self.heads for stream in group.streams).items():
                self._less[row] += coded * self.slot_bytes * count - more * count // len(group.streams)
            self._changed(group, before)
        return coded

    def _resize(self, group: _Group, grown: int, room: int) -> None:
        before = self._of_rows(group)
        group.resize(grown, room)
        self._changed(group, before)

    def _of_rows(self, group: _Group) -> dict[int, int]:
        """Bytes that are allocated for each row's streams of a group."""
        counts = Counter(stream // self.heads for stream in group.streams)
        return {row: group.allocated(count) for row, count in counts.items()}

    def _changed(self, group: _Group, before: dict[int, int]) -> None:
        for row, now in self._of_rows(group).items():
            self._stored[row] += now - before[row]

    def _room(self, group: "_Group | _Shape") -> int:
        """Tokens to have memory for now, those that came included: none that come when these have become codes."""
        grown = self.position - self.start
        room = grown + group.step + grown // 16
        if group.coding is not None:
            room = min(room, max(grown, group.coding.residual + group.coding.step - 1 - group.plain))
        return room if self.room is None else min(room, self.room)

    def _hold(self, groups: list[_Group]) -> None:
        self.groups = groups
        self.single_step = any(group.coding is not None for group in groups)  # later tokens become codes in time
        self._parts = Parts([group.streams for group in groups], groups[0].keys.device)

    def _forms(self, form: Form, rows: int) -> Iterable[Form]:
        """The form of each group, whose streams have sinks of their own: [n, 1, G]."""
        if form.sinks is None:
            return repeat(form, len(self.groups))
        sinks = form.sinks.expand(rows, -1, -1).flatten(0, 1).unsqueeze(1)
        return [replace(form, sinks=own) for own in self._parts.split(sinks)]

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """The streams' parts of x [R, H * k, Q, D], by group: [n, k, Q, D]."""
        return self._parts.split(x.reshape(-1, x.shape[1] // self.heads, *x.shape[2:]))


def _groups(rows: Sequence[KV], shapes: Sequence[list[_Shape]], room: Callable[[_Shape], int]) -> list[_Group]:
    """The streams of `rows` by their shapes. room: tokens that a group of some shape has memory for beside them."""
    streams = defaultdict[_Shape, list[int]](list)
    for stream, shape in enumerate(chain.from_iterable(shapes)):
        streams[shape].append(stream)
    groups: dict[_Shape, _Group] = {}
    filled, codes = Counter[_Shape](), defaultdict[_Shape, list[Codes]](list)
    for kv, own in zip(rows, shapes, strict=True):
        keys, values, positions = _packed(kv, min(shape.size for shape in own))
        for shape in dict.fromkeys(own):
            if shape not in groups:
                groups[shape] = _empty(streams[shape], shape, keys, values, room=room(shape))
            group, heads, first = groups[shape], [head for head, of in enumerate(own) if of == shape], filled[shape]
            filled[shape] += len(heads)
            to = slice(first, filled[shape])
            run = heads[-1] - heads[0] + 1 == len(heads)
            of = slice(heads[0], heads[-1] + 1) if run else placed(heads, keys.device)
            group.keys[to, 0, : group.plain] = keys[0, of, : group.plain]
            group.values[to, 0, : group.plain] = values[0, of, : group.plain]
            if group.positions is not None:
                group.positions[to, 0] = positions[0, of, : group.size]
            if isinstance(kv, CodedKV):
                codes[shape] += kv.codes_of(heads)
    for shape, parts in codes.items():
        groups[shape].codes = (type(parts[0]).cat(parts),) if parts else ()
    return list(groups.values())


def _shapes(kv: KV, step: int, known: Held) -> list[_Shape]:
    """Of every head of a row."""
    if not isinstance(kv, CodedKV):
        return [_Shape(size, step, implied=known.implied) for size in known.sizes]
    counted = zip(known.sizes, kv.counts, kv.codings, strict=True)
    return [_Shape(size, step, coded, coding, known.implied) for size, coded, coding in counted]


def _packed(kv: KV, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of a row with its empty slots last, codes left out. least: live slots of some head."""
    if isinstance(kv, CodedKV):
        return kv.keys, kv.values, kv.positions
    if least < kv.positions.shape[2]:
        kv = KV(*kv.load(), kv.positions).take((kv.positions < 0).byte().argsort(dim=-1, stable=True))
    return *kv.load(), kv.positions


def _empty(streams: list[int], shape: _Shape, *like: Tensor, room: int) -> _Group:
    """A group of that shape, to be filled. like: keys and values of some row that is in it."""
    plain, count = shape.plain, len(streams)
    keys, values = (x.new_empty(count, 1, plain + room, x.shape[-1]) for x in like)
    positions = None
    if not shape.implied:
        positions = torch.empty(count, 1, shape.size, dtype=torch.int32, device=keys.device)
    return _Group(streams, keys, values, positions, shape.size, plain, shape.step, shape.coding)
