"""The layer cache of rows that keep every token, of which each decoded one reads the pages that it chooses.

The pages that are not chosen are masked, so what is read is counted, not saved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.kernels import slot_attention
from harness.engine.layer_cache import DecodingLayer, room_step
from harness.engine.packed import Held, storage_bytes
from methods.base import KV
from methods.pages import PagedKV, Pages
from methods.views import Form


class _Row:
    """One row: all its slots in order, then room; and of one that chooses, the bounds of its pages, with room too.

    read: slots of all heads that were read so far, [] int64; asked: by how many tokens.
    """

    def __init__(self, kv: KV, known: Held, size: int, room: int | None) -> None:
        self.pages = kv.pages if isinstance(kv, PagedKV) else None
        self.size, self.used, self.most = size, size, room
        self.step = room_step(size)
        self.keys, self.values = (x[:, :, :size] for x in kv.load())  # [1, H, size + room, D]
        self.positions = None if known.implied else kv.positions[:, :, :size].clone()
        self.low = self.high = self.keys.new_empty(*self.keys.shape[:2], 0, self.keys.shape[3])
        self.read, self.asked = torch.zeros((), dtype=torch.int64, device=self.keys.device), 0
        self.resize(self._room(size))

    def append(self, keys: Tensor, values: Tensor) -> None:
        first, end = self.used, self.used + keys.shape[2]
        if end > self.keys.shape[2]:
            self.resize(self._room(end))
        self.keys[:, :, first:end], self.values[:, :, first:end] = keys, values
        self.used = end
        self._bound(first)

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        """Queries [1, Hq, 1, D], of the last token."""
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        if self.pages is None:
            return slot_attention(queries, keys, values, form, mask=None)
        mask = self.chosen(queries, self.pages)
        self.read, self.asked = self.read + mask.any(dim=1).sum(), self.asked + 1
        return slot_attention(queries, keys, values, form, mask=mask[None, :, :, None])

    def chosen(self, queries: Tensor, pages: Pages) -> Tensor:
        """Slots that queries [1, Hq, 1, D] read: [H, G, S] bool."""
        there, grouped = pages.of(self.used), queries.view(self.keys.shape[1], -1, queries.shape[3])
        found = pages.chosen(grouped, self.low[0, :, :there], self.high[0, :, :there])  # [H, G, P]
        return found.repeat_interleave(pages.size, dim=2)[..., : self.used]

    def rewind(self, used: int) -> None:
        self.used = used
        slots = self._room(used)
        if self.keys.shape[2] > slots:
            self.resize(slots)
        self._bound(used - 1)

    def resize(self, slots: int) -> None:
        """Copy what it holds to memory for so many slots."""
        held = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        self.keys, self.values = (_roomy(x, slots) for x in held)
        if self.pages is not None:
            self.low, self.high = (_roomy(x, self.pages.of(slots)) for x in self.pages.bounds(held[0]))

    @property
    def nbytes(self) -> int:
        """Live bytes; what counts the reads is the harness's."""
        pages = 0 if self.pages is None else self.pages.of(self.used)
        live = (self.keys[:, :, : self.used], self.values[:, :, : self.used], self.low[:, :, :pages])
        return sum(x.nbytes for x in (*live, self.high[:, :, :pages], *self._places()))

    @property
    def stored_bytes(self) -> int:
        """Bytes that are allocated for it."""
        return storage_bytes((self.keys, self.values, self.low, self.high, self.read, *self._places()))

    @property
    def read_bytes(self) -> int | None:
        """Mean bytes that a token read so far, of the bounds of all pages the least; None where all is read."""
        if self.pages is None or not self.asked:
            return None
        slot = sum(x.shape[3] * x.element_size() for x in (self.keys, self.values))
        pages = self.pages.of(self.size)
        return int(self.read) * slot // self.asked + 2 * self.low[:, :, :pages].nbytes

    def _bound(self, first: int) -> None:
        """Bound anew the pages from the one that slot `first` is in."""
        if self.pages is not None:
            page = max(0, first) // self.pages.size
            bounds = self.pages.bounds(self.keys[:, :, page * self.pages.size : self.used])
            for held, own in zip((self.low, self.high), bounds, strict=True):
                held[:, :, page : self.pages.of(self.used)] = own

    def _places(self) -> tuple[Tensor, ...]:
        return () if self.positions is None else (self.positions,)

    def _room(self, used: int) -> int:
        """Slots to have memory for, of which so many are used."""
        grown = used - self.size
        room = grown + self.step + grown // 16
        return self.size + (room if self.most is None else min(room, self.most))


class PagedRows(DecodingLayer):
    """R rows that keep every token; those whose layer is no `PagedKV` read all of them.

    Args:
        rows: what each row kept, every KV of batch 1.
        position: of the next token, the same for all rows, and so the number of their slots.
        room: most tokens that will come; None when that is not known.
        known: of each row what the host knows.
    """

    single_step = True

    def __init__(self, rows: Sequence[KV], *, position: int, room: int | None, known: Sequence[Held]) -> None:
        self.position = position
        self.rows = [_Row(kv, own, position, room) for kv, own in zip(rows, known, strict=True)]

    def append(self, keys: Tensor, values: Tensor) -> None:
        for i, row in enumerate(self.rows):
            row.append(keys[i : i + 1], values[i : i + 1])
        self.position += keys.shape[2]

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        return torch.cat([row.attend(queries[i : i + 1], form) for i, row in enumerate(self.rows)])

    def mark(self) -> int:
        return self.position

    def rewind(self, mark: int) -> None:
        self.position = mark
        for row in self.rows:
            row.rewind(mark)

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def nbytes(self, row: int) -> int:
        return self.rows[row].nbytes

    def stored_bytes(self, row: int) -> int:
        return self.rows[row].stored_bytes

    def read_bytes(self, row: int) -> int | None:
        return self.rows[row].read_bytes

    @property
    def stored(self) -> list[int]:
        return [row.stored_bytes for row in self.rows]


def _roomy(x: Tensor, slots: int) -> Tensor:
    """A copy of x [1, H, S, D] with memory for so many slots."""
    out = x.new_empty(*x.shape[:2], slots, x.shape[3])
    out[:, :, : x.shape[2]] = x
    return out
