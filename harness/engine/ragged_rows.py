"""The layer cache of growing rows on a GPU: every KV head of every row is a stream in one buffer, read in one call.

It does what `row_cache.GrowingRows` does group by group. Starts and lengths of streams lie on the device and an append
is one index_copy, so that nothing in a step waits for the device, and a step can be captured and replayed until a row
has filled its room.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from harness.engine.coded_streams import CodedStreams
from harness.engine.layer_cache import INDEX_BYTES, DecodingLayer, room_step
from harness.engine.packed import Held, flat, live_slots, storage_bytes, survey
from harness.engine.triton_kernels import ragged_attention
from methods.base import KV
from methods.codes import MinMax, MinMaxCodes
from methods.device import placed
from methods.stored import CodedKV
from methods.views import Form


class RaggedRows(DecodingLayer):
    """R compressed rows that grow by every token. Arguments as of `GrowingRows`; keys as wide as values.

    Rows of a sliding window hold their last tokens without a gap, so what a token still sees of one is its end. Codes,
    of which such rows have none, stay codes beside the buffer, and are decoded where they are read. Later tokens become
    codes when `GrowingRows` would make them some: a row has room until then.
    """

    keys: Tensor  # [slots, D], of all streams
    values: Tensor
    starts: Tensor  # [R * H] int32
    lengths: Tensor  # [R * H] int32

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
        self.most, self.heads = room, rows[0].positions.shape[1]
        self.extra, self._less = [kv.extra for kv in rows], [0] * len(rows)
        self.codings = [own for kv in rows for own in _codings(kv)]
        self.single_step = any(self.codings)
        self.replays = not self.single_step  # what makes codes moves slots
        known = survey(rows, position, [window] * len(rows)) if known is None else known
        self.kept_bytes = [own.nbytes for own in known]
        self.coded, self.later = CodedStreams.of(rows, self.heads), dict[MinMax, CodedStreams]()
        self.positions = [  # of no use to a step; held since what a policy chose is stored with them
            None if own.implied else flat(kv.positions[0], live_slots(kv, own))
            for kv, own in zip(rows, known, strict=True)
        ]
        plain = [_plain_sizes(kv, own) for kv, own in zip(rows, known, strict=True)]
        self.sizes = [size for own in plain for size in own]  # plain slots of streams, as the policies left them
        self.slot_bytes = sum(x.shape[-1] * x.element_size() for x in (rows[0].keys, rows[0].values))
        self._steps = [room_step(kept // (self.heads * self.slot_bytes)) for kept in self.kept_bytes]
        self.rooms = [self._room(row) for row in range(len(rows))]
        self._place(map(_plain, rows, known, plain), like=(rows[0].keys, rows[0].values))

    def append(self, keys: Tensor, values: Tensor) -> None:
        new = keys.shape[2]
        if self.position - self.start + new > min(self.rooms):
            self.reserve(new)
        at = (self.starts + self.lengths).long().unsqueeze(1)
        if new > 1:
            at = at + torch.arange(new, device=keys.device)
        for mine, x in ((self.keys, keys), (self.values, values)):
            mine.index_copy_(0, at.flatten(), x.reshape(-1, x.shape[-1]))
        self.lengths += new
        self.position += new

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        rows, _, new, dim = queries.shape
        asked = queries.reshape(rows * self.heads, -1, new, dim).transpose(1, 2).flatten(0, 1)  # [N * Q, G, D]
        starts, lengths = self.starts, self.lengths
        if new > 1:  # a stream for each token, which ends before the later ones
            later = torch.arange(new - 1, -1, -1, dtype=torch.int32, device=lengths.device)
            starts, lengths = starts.repeat_interleave(new), (lengths.unsqueeze(1) - later).flatten()
        if form.sinks is not None:
            form = replace(form, sinks=form.sinks[0].repeat(rows, 1).unsqueeze(1).expand(-1, new, -1).flatten(0, 1))
        if form.window is not None:
            starts, lengths = starts + (lengths - form.window).clamp_min(0), lengths.clamp_max(form.window)
        shape: dict[str, Any] = {"longest": self.longest, "new": new, "coded": [*self.coded, *self.later.values()]}
        out = ragged_attention(asked, self.keys, self.values, starts, lengths, form, **shape)
        return out.view(rows * self.heads, new, -1, dim).transpose(1, 2).reshape(rows, -1, new, dim)

    def reserve(self, tokens: int) -> None:
        """Rows whose later tokens become codes take one at a time: they have room as far as that."""
        self._code()
        tokens = self.position - self.start + (1 if self.single_step else tokens)
        short = [row for row, room in enumerate(self.rooms) if room < tokens]
        if short:
            for row in short:
                self.rooms[row] = max(tokens, self._room(row))
            held = self._held()
            self._place([held], like=held)

    def mark(self) -> Any:
        if not self.single_step:
            return self.position
        held = {name: getattr(self, name) for name in (*_MADE, "_less", "_stored")}
        held = {name: own.copy() if isinstance(own, list | dict) else own for name, own in held.items()}
        return held | {"lengths": self.lengths.clone()}

    def rewind(self, mark: Any) -> None:
        before = self.rooms
        if self.single_step:
            vars(self).update(mark)
        else:
            self.lengths -= self.position - mark
            self.position = mark
        rooms = [  # where nothing becomes codes, as in other company
            room if any(self.codings[row * self.heads : (row + 1) * self.heads]) else min(before[row], self._room(row))
            for row, room in enumerate(self.rooms)
        ]
        if rooms != self.rooms:
            held, self.rooms = self._held(), rooms
            self._place([held], like=held)

    def keep(self, rows: Sequence[int]) -> None:
        streams = [row * self.heads + head for row in rows for head in range(self.heads)]
        at = torch.tensor(streams, device=self.starts.device)
        self.starts, self.lengths = self.starts[at], self.lengths[at]
        place = {stream: number for number, stream in enumerate(streams)}
        self.coded = [left for own in self.coded if (left := own.take(place))]
        self.later = {kind: left for kind, own in self.later.items() if (left := own.take(place))}
        held, self.sizes = self._held(), [self.sizes[stream] for stream in streams]
        self.codings = [self.codings[stream] for stream in streams]
        for name in ("kept_bytes", "extra", "positions", "rooms", "_steps", "_less"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self._place([held], like=held)

    def nbytes(self, row: int) -> int:
        """What the row's policy left, and what every head appended since, as it is stored by now."""
        return self.kept_bytes[row] + (self.position - self.start) * self.heads * self.slot_bytes - self._less[row]

    def stored_bytes(self, row: int) -> int:
        own = range(row * self.heads, (row + 1) * self.heads)
        slots = sum(self.sizes[stream] for stream in own) + self.heads * self.rooms[row]
        codes = sum(coded.nbytes(own) for coded in (*self.coded, *self.later.values()))
        index, at = INDEX_BYTES * self.heads, self.positions[row]
        beside = storage_bytes([*self.extra[row].values(), *([] if at is None else [at])])
        return int(slots * self.slot_bytes) + codes + index + beside

    @property
    def stored(self) -> list[int]:
        return self._stored

    def _room(self, row: int) -> int:
        """Tokens that a row is to have memory for now, those that came included."""
        grown = self.position - self.start
        room = grown + self._steps[row] + grown // 16
        for stream in range(row * self.heads, (row + 1) * self.heads):
            coding = self.codings[stream]
            if coding is not None:
                room = min(room, max(grown, coding.residual + coding.step - 1 - self.sizes[stream]))
        return room if self.most is None else min(room, self.most)

    def _code(self) -> None:
        """Make codes of the oldest plain slots of streams that one token more would leave too many of."""
        grown, due = self.position - self.start, defaultdict[tuple[MinMax, int], list[int]](list)
        for stream, coding in enumerate(self.codings):
            if coding is not None and (count := coding.due(self.sizes[stream] + grown, 1)):
                due[coding, count].append(stream)
        for (coding, count), streams in due.items():
            at = placed([self._starts[stream] for stream in streams], self.keys.device).unsqueeze(1)
            at = at + torch.arange(count, device=at.device)
            codes = MinMaxCodes.of(coding, self.keys[at], self.values[at])
            found = CodedStreams.made(codes, streams)
            self.later[coding] = self.later[coding].then(found) if coding in self.later else found
            for stream in streams:
                self.sizes[stream] -= count
                self._less[stream // self.heads] += count * self.slot_bytes - codes.nbytes // len(streams)
        if due:
            gone = {stream: count for (_, count), streams in due.items() for stream in streams}
            less = placed([gone.get(stream, 0) for stream in range(len(self.sizes))], self.keys.device).int()
            self.starts, self.lengths = self.starts + less, self.lengths - less
            held = self._held()
            for row in {stream // self.heads for stream in gone}:
                self.rooms[row] = self._room(row)
            self._place([held], like=held)

    def _place(self, parts: Iterable[tuple[Tensor, Tensor]], *, like: tuple[Tensor, Tensor]) -> None:
        """Lay out what streams hold in one buffer with room behind each. parts: keys and values [slots, D], in order.

        A part is let go before the next one is made, so that a batch is not there twice.
        """
        grown, device = self.position - self.start, like[0].device
        capacity = [size + self.rooms[stream // self.heads] for stream, size in enumerate(self.sizes)]
        starts, lengths = list(accumulate(capacity, initial=0)), [size + grown for size in self.sizes]
        self._starts = starts[:-1]
        self.starts = torch.tensor(self._starts, dtype=torch.int32, device=device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.longest, at, first = max(capacity), self._slots(), 0
        self.keys, self.values = (x.new_empty(starts[-1], x.shape[-1]) for x in like)
        for keys, values in parts:
            own = at[first : first + len(keys)]
            self.keys.index_copy_(0, own, keys)
            self.values.index_copy_(0, own, values)
            first += len(keys)
        self._stored = [self.stored_bytes(row) for row in range(len(self.rooms))]

    def _held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all that streams hold, [slots, D], stream after stream."""
        at = self._slots()
        return self.keys[at], self.values[at]

    def _slots(self) -> Tensor:
        """Numbers of the slots that hold something, stream after stream."""
        stream = torch.repeat_interleave(self.lengths)
        before = self.lengths.cumsum(0) - self.lengths
        return self.starts[stream] + torch.arange(len(stream), device=stream.device) - before[stream]


_MADE = ("position", "keys", "values", "starts", "_starts", "longest", "rooms", "sizes", "coded", "later")
"""What appending changes where later tokens become codes, but for lengths."""


def _codings(kv: KV) -> Sequence[MinMax | None]:
    """Of each head; None where nothing becomes codes."""
    if not isinstance(kv, CodedKV):
        return [None] * kv.positions.shape[1]
    return [own if isinstance(own, MinMax) else None for own in kv.codings]


def _plain_sizes(kv: KV, known: Held) -> Sequence[int]:
    """How many slots of each head are no codes."""
    if isinstance(kv, CodedKV):
        return [slots - coded for slots, coded in zip(known.sizes, kv.counts, strict=True)]
    return known.sizes


def _plain(kv: KV, known: Held, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values of the slots that are no codes, head after head: [slots, D] each."""
    if isinstance(kv, CodedKV):
        keys, values = (torch.cat([x[0, head, :size] for head, size in enumerate(sizes)]) for x in (kv.keys, kv.values))
        return keys, values
    at = live_slots(kv, known)
    keys, values = (flat(x[0], at) for x in kv.load())
    return keys, values
