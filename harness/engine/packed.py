"""What stays of a compressed layer, without padding, and what that weighs: live bytes and stored bytes.

Live bytes are those of the slots that hold a token: keys and values or their codes, positions, side data. Stored bytes
are those of the storages that stay allocated, whatever fills them. The whole prompt, and what a sliding-window layer
still sees of it, need no positions: their number tells them, so none are stored. All that a policy chose has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from methods.base import KV
from methods.codes import CodedKV, Codes
from methods.views import POSITION_BYTES


class Coded(NamedTuple):
    """The codes of a layer: as the fields of `CodedKV` of these names."""

    counts: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Codes], ...]


@dataclass
class Packed:
    """The slots of a row's heads, one head after the other, none of them empty.

    keys, values: [P, D], of slots that are no codes. positions: [S] int32, of all, or None where they are implied.
    sizes: slots of each head. plain: those that are no codes. first: the token of the first slot, where implied.
    side: [S, ...], side data of slots. beside: side data of no slot, as it was.
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

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        codes = () if self.coded is None else (x for _, own in self.coded.parts for x in own.tensors())
        extra = (*self.side.values(), *self.beside.values())
        return [self.keys, self.values, *([] if self.positions is None else [self.positions]), *extra, *codes]

    def same(self, other: Packed) -> bool:
        """Whether it holds to the bit what another of the same prompt does; False where codes or side data are."""
        if self.coded or self.side or self.beside or self.sizes != other.sizes:
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
        return KV(keys, values, positions, side | {name: x.clone() for name, x in self.beside.items()})


def pack(kv: KV, end: int, *, window: bool = False) -> Packed | KV:
    """Pack what is left of a layer (B = 1) of a prompt of `end` tokens. window: whether it is of a sliding window.

    Codes with side data and a KV of an unknown class stay as they are, but for views that keep more than they show.
    """
    if type(kv) is not KV and (kv.extra or type(kv) is not CodedKV):
        return each_tensor(_own, kv)
    coded = Coded(kv.counts, kv.parts) if isinstance(kv, CodedKV) else None
    there, implied = kv.positions[0] >= 0, is_implied(kv, end, window=window)
    sizes = tuple(there.sum(dim=-1).tolist())
    plain = sizes if coded is None else tuple(a - b for a, b in zip(sizes, coded.counts, strict=True))
    own = there
    if coded is not None:
        width = torch.arange(kv.keys.shape[2], device=there.device)
        own = width < torch.tensor(plain, device=there.device).unsqueeze(1)
    keys, values = (_flat(x[0], own, sum(plain)) for x in (kv.keys, kv.values))
    positions = None if implied else _flat(kv.positions[0], there, sum(sizes))
    slotted = {name for name, x in kv.extra.items() if x.shape[:3] == kv.positions.shape}
    side = {name: _flat(kv.extra[name][0], there, sum(sizes)) for name in slotted}
    beside = {name: _own(x) for name, x in kv.extra.items() if name not in slotted}
    return Packed(keys, values, positions, sizes, plain, end - sizes[0], coded, side, beside)


def is_implied(kv: KV, end: int, *, window: bool = False) -> bool:
    """Whether positions need not be stored: heads hold all tokens before `end`, or the last of a sliding window."""
    if kv.extra or type(kv) not in (KV, CodedKV):
        return False
    live = int((kv.positions[0, 0] >= 0).sum())
    run = torch.full((kv.positions.shape[2],), -1, dtype=torch.int32, device=kv.positions.device)
    run[:live] = torch.arange(end - live, end, dtype=torch.int32, device=run.device)
    return live > 0 and (live == end or window) and bool((kv.positions == run).all())


def live_bytes(kv: KV, end: int, *, window: bool = False) -> int:
    """Live bytes of a layer; positions count unless they are implied."""
    return kv.nbytes - (int(kv.live.sum()) * POSITION_BYTES if is_implied(kv, end, window=window) else 0)


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


def _flat(x: Tensor, there: Tensor, count: int) -> Tensor:
    """Rows of x [H, S, ...] where `there` [H, S], head after head: [count, ...], in a storage of its own size."""
    return _own(x.flatten(0, 1) if count == there.numel() else x[there])


def _padded(x: Tensor, sizes: tuple[int, ...], more: int = 0, *, empty: int = 0) -> Tensor:
    """Rows x [sum(sizes), ...] as [1, H, max(sizes) + more, ...]."""
    width = max(sizes) + more
    if min(sizes) == width:
        return x.view(1, len(sizes), width, *x.shape[1:])
    there = torch.arange(width, device=x.device) < torch.tensor(sizes, device=x.device).unsqueeze(1)
    out = x.new_full((len(sizes), width, *x.shape[1:]), empty)
    out[there] = x
    return out.unsqueeze(0)
