"""What stays of a compressed layer, without padding, and what that weighs: live bytes and stored bytes.

Live bytes are those of the slots that hold a token: keys and values or their codes, positions, side data. Stored bytes
are those of the storages that stay allocated, whatever fills them. The whole prompt, and what a sliding-window layer
still sees of it, need no positions: their number tells them, so none are stored. All that a policy chose has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from methods.base import KV
from methods.device import placed, read
from methods.pages import PagedKV, Pages
from methods.stored import CodedKV, Codes, Coding
from methods.views import POSITION_BYTES


class Held(NamedTuple):
    """What is known on the host of a layer (B = 1) of a prompt of so many tokens.

    sizes: live slots of each head. nbytes: live bytes. read: of them, what attention reads for a decoded token.
    implied: whether positions need not be stored: heads hold all tokens, or the last ones of a sliding window. last: of
    each head, 2 if its last slot holds the prompt's last token, 1 if another one does, 0 if none; empty once that is
    given up.
    """

    sizes: tuple[int, ...]
    nbytes: int
    read: int
    implied: bool
    last: tuple[int, ...] = ()


class Coded(NamedTuple):
    """The codes of a layer: as the fields of `CodedKV` of these names."""

    counts: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Codes], ...]
    codings: tuple[Coding, ...]


@dataclass
class Packed:
    """The slots of a row's heads, one head after the other, none of them empty.

    keys, values: [P, D], of slots that are no codes. positions: [S] int32, of all, or None where they are implied.
    sizes: slots of each head. plain: those that are no codes. first: the token of the first slot, where implied.
    side: [S, ...], side data of slots. beside: side data of no slot, as it was. pages: of a `PagedKV`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None
    sizes: tuple[int, ...]
    plain: tuple[int, ...]
    first: int
    coded: Coded | None = None
    side: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    pages: Pages | None = None

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        codes = () if self.coded is None else (x for _, own in self.coded.parts for x in own.tensors())
        extra = (*self.side.values(), *self.beside.values())
        return [self.keys, self.values, *([] if self.positions is None else [self.positions]), *extra, *codes]

    def same(self, other: Packed) -> bool:
        """Whether it holds to the bit what another of the same prompt does; False where codes or side data are."""
        if self.coded or other.coded or self.side or self.beside or self.sizes != other.sizes:
            return False
        own, others = self.tensors(), other.tensors()
        return len(own) == len(others) and all(map(torch.equal, own, others))

    def kv(self, more: int = 0) -> KV:
        """The layer as methods leave it, padded where heads differ, with `more` empty columns; else no copy."""
        if self.positions is None:
            end = self.first + self.sizes[0]
            run = torch.arange(self.first, end, dtype=torch.int32, device=self.keys.device)
            positions = run.expand(1, len(self.sizes), -1)
        else:
            positions = _padded(self.positions, self.sizes, more, empty=-1)
        keys, values = (_padded(x, self.plain, more) for x in (self.keys, self.values))
        if self.coded is not None:
            return CodedKV(keys, values, positions, {}, *self.coded)
        side = {name: _padded(x, self.sizes, more) for name, x in self.side.items()}
        extra = side | {name: x.clone() for name, x in self.beside.items()}
        if self.pages is not None:
            return PagedKV(keys, values, positions, extra, self.pages)
        return KV(keys, values, positions, extra)


def survey(kvs: Sequence[KV], end: int, windows: Sequence[bool]) -> list[Held]:
    """Tell of layers (B = 1) of a prompt of `end` tokens what there is to know; a GPU is waited for once.

    windows: whether each is of a sliding window.
    """
    maybe = [_may_imply(kv, end, window) for kv, window in zip(kvs, windows, strict=True)]
    found = read([_seen(*own, end) for own in zip(kvs, maybe, windows, strict=True)])
    told = []
    for kv, own in zip(kvs, found, strict=True):
        heads, implied = kv.positions.shape[1], bool(own.pop())
        sizes, last = tuple(own[:heads]), tuple(own[heads:])
        told.append(_held(kv, sizes, implied, last))
    return told


def _may_imply(kv: KV, end: int, window: bool) -> bool:
    """Whether its positions may go without saying, by all that the host knows."""
    plain = type(kv) is PagedKV or (not kv.extra and type(kv) in (KV, CodedKV))
    return plain and (window or kv.positions.shape[2] >= end)


def _seen(kv: KV, may_imply: bool, window: bool, end: int) -> Tensor:
    """What `survey` reads of a layer: sizes, where the last token is, whether positions are implied, [2 * H + 1]."""
    positions = kv.positions[0]
    live = (positions >= 0).sum(dim=1)
    implied = torch.zeros_like(live[:1])
    if may_imply:
        size = live[0]
        columns = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
        run = torch.where(columns < size, columns + (end - size), -1)
        whole = (size > 0) if window else (size == max(1, end))
        implied = (whole & (positions == run).all()).long().view(1)
    return torch.cat([live, _where(positions, end - 1), implied])


def _where(positions: Tensor, token: int) -> Tensor:
    """Where heads [H, S] hold a token: 2 in their last slot, 1 in another one, 0 in none; [H]."""
    found = positions == token
    return found.any(dim=1).long() + found[:, -1:].any(dim=1)


def _held(kv: KV, sizes: tuple[int, ...], implied: bool, last: tuple[int, ...] = ()) -> Held:
    """Live bytes, of which positions count unless they are implied, and those read: no more than there are."""
    live = sum(sizes)
    known = type(kv).nbytes is KV.nbytes  # a method's own KV may know better
    nbytes = (kv.bytes_of(live) if known else kv.nbytes) - (live * POSITION_BYTES if implied else 0)
    return Held(sizes, nbytes, min(nbytes, kv.reads(live)), implied, last)


def without(kv: KV, position: int, last: Sequence[int] | None = None) -> KV:
    """The same KV with the slots of one token given up; a last column that is empty for every head is cut off.

    last: where the heads of a KV without empty columns hold the token, as in `Held`; None to ask the device.
    """
    at = read([_where(kv.positions[0], position)])[0] if last is None else last
    if not any(at):
        return kv
    if type(kv) is KV and not kv.extra and set(at) == {2}:
        return KV(kv.keys[:, :, :-1], kv.values[:, :, :-1], kv.positions[:, :, :-1])
    return replace(kv, positions=kv.positions.masked_fill(kv.positions == position, -1))


def without_last(kv: KV, known: Held, end: int, *, window: bool = False) -> tuple[KV, Held]:
    """Give up the slots of the last one of `end` tokens, and tell what is known then. kv: as it was packed."""
    even = set(known.sizes) == {kv.positions.shape[2]}
    left = without(kv, end - 1, known.last if even else [min(1, own) for own in known.last])
    sizes = tuple(size - (at > 0) for size, at in zip(known.sizes, known.last, strict=True))
    if not known.implied and (window or set(sizes) == {end - 1}):  # these may be all tokens in order
        return left, survey([left], end - 1, [window])[0]
    implied = known.implied and min(sizes) > 0
    return left, _held(left, sizes, implied)


def pack(kv: KV, end: int, known: Held) -> Packed | KV:
    """Pack what is left of a layer (B = 1) of a prompt of `end` tokens.

    Codes with side data and a KV of an unknown class stay as they are, but for views that keep more than they show.
    """
    if type(kv) not in (KV, PagedKV) and (kv.extra or type(kv) is not CodedKV):
        return each_tensor(_own, kv)
    coded = Coded(kv.counts, kv.parts, kv.codings) if isinstance(kv, CodedKV) else None
    sizes, there = known.sizes, live_slots(kv, known)
    plain, own = sizes, there
    if coded is not None:
        plain = tuple(a - b for a, b in zip(sizes, coded.counts, strict=True))
        own = _first(plain, kv.keys.shape[2], kv.keys.device)
    keys, values = (flat(x[0], own) for x in (kv.keys, kv.values))
    positions = None if known.implied else flat(kv.positions[0], there)
    slotted = {name for name, x in kv.extra.items() if x.shape[:3] == kv.positions.shape}
    side = {name: flat(kv.extra[name][0], there) for name in slotted}
    beside = {name: _own(x) for name, x in kv.extra.items() if name not in slotted}
    pages = kv.pages if isinstance(kv, PagedKV) else None
    return Packed(keys, values, positions, sizes, plain, end - sizes[0], coded, side, beside, pages)


def live_bytes(kv: KV, end: int, *, window: bool = False) -> int:
    """Live bytes of a layer; positions count unless they are implied."""
    return survey([kv], end, [window])[0].nbytes


def live_slots(kv: KV, known: Held) -> Tensor | None:
    """Numbers of the slots that hold a token, head after head: [n] int64; None for all slots."""
    whole = min(known.sizes) == kv.positions.shape[2]
    return None if whole else _true(kv.positions[0] >= 0, sum(known.sizes))


def flat(x: Tensor, at: Tensor | None) -> Tensor:
    """Slots of x [H, S, ...], numbered as `live_slots` does: [n, ...], in a storage of its own size."""
    rows = x.flatten(0, 1)
    return _own(rows if at is None else rows.index_select(0, at))


def tensors_of(kv: KV | Packed) -> list[Tensor]:
    """Everything that a layer holds."""
    if isinstance(kv, Packed):
        return kv.tensors()
    codes = [x for _, own in kv.parts for x in own.tensors()] if isinstance(kv, CodedKV) else []
    return [kv.keys, kv.values, kv.positions, *kv.extra.values(), *codes]


def each_tensor(change: Callable[..., Tensor], *kvs: KV) -> KV:
    """A KV of what `change` makes of each tensor of one KV, or of the same tensors of several alike."""
    own = {name: change(*(getattr(kv, name) for kv in kvs)) for name in ("keys", "values", "positions")}
    extra = {name: change(*(kv.extra[name] for kv in kvs)) for name in kvs[0].extra}
    return replace(kvs[0], **own, extra=extra)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors keep allocated: each storage once and whole, also where a view shows a part of it."""
    storages = {own.data_ptr(): own.nbytes() for own in (x.untyped_storage() for x in tensors)}
    return sum(storages.values())


def _own(x: Tensor) -> Tensor:
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _true(there: Tensor, count: int) -> Tensor:
    """Numbers [count] of the entries of `there` that hold, which are so many: the device need not be asked."""
    return torch.nonzero_static(there.flatten(), size=count).squeeze(1)


def _first(sizes: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Numbers of the first slots, as many as `sizes` says, of heads that have `width` of them: [sum(sizes)]."""
    return _true(torch.arange(width, device=device) < placed(sizes, device).unsqueeze(1), sum(sizes))


def _padded(x: Tensor, sizes: tuple[int, ...], more: int = 0, *, empty: int = 0) -> Tensor:
    """Rows x [sum(sizes), ...] as [1, H, max(sizes) + more, ...]."""
    width = max(sizes) + more
    if min(sizes) == width:
        return x.view(1, len(sizes), width, *x.shape[1:])
    out = x.new_full((len(sizes) * width, *x.shape[1:]), empty)
    return out.index_copy_(0, _first(sizes, width, x.device), x).view(1, len(sizes), width, *x.shape[1:])
