"""Layer caches of the engine: one that observes a prefill, and one that holds many compressed rows.

A layer cache takes new keys and values (`append`) and answers the queries of the same tokens (`attend`). All rows of a
batch are at the same token position, because they continue the same prompt; what differs is which slots they kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from harness.engine.kernels import causal_attention, column_sums, slot_attention
from methods.base import KV, Needs
from methods.codes import CodedKV, Codes, Coding


class LayerCache(ABC):
    """One layer of a batch of R rows. Keys and values [R, H, Q, D], queries [R, Hq, Q, D], RoPE applied."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens' keys and values."""

    @abstractmethod
    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        """Attention output [R, Hq, Q, D] of the tokens just appended. window: the layer's sliding window, if any."""


class PrefillLayer(LayerCache):
    """Keeps the whole prompt (R = 1) and what `needs` asks for: window queries, streamed column sums.

    tokens: of the whole prompt, which may come in several chunks.
    """

    def __init__(self, needs: Needs, tokens: int) -> None:
        self.needs, self.tokens = needs, tokens
        self.seen = 0
        self.whole: list[Tensor] = []  # keys and values of a prompt in chunks, allocated once
        self.keys: Tensor
        self.values: Tensor
        self.queries: Tensor
        self.scaling = 1.0
        self.window: int | None = None
        self.sums: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        first, self.seen = self.seen, self.seen + keys.shape[2]
        if keys.shape[2] == self.tokens:
            self.keys, self.values = keys.contiguous(), values.contiguous()  # heads first: policies take rows of slots
            return
        if not first:
            self.whole = [x.new_empty(*x.shape[:2], self.tokens, x.shape[3]) for x in (keys, values)]
        for whole, x in zip(self.whole, (keys, values), strict=True):
            whole[:, :, first : self.seen] = x
        self.keys, self.values = (whole[:, :, : self.seen] for whole in self.whole)

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        self.scaling, self.window = scaling, window
        out, lse = causal_attention(queries, self.keys, self.values, scaling=scaling, window=window)
        if window is None:
            self.observe(queries, lse)
        return out

    def observe(self, queries: Tensor, lse: Tensor | None) -> None:
        """Gather what `needs` asks for from the queries of the tokens just appended. lse: as of `causal_attention`."""
        before = [] if self.seen == queries.shape[2] else [self.queries]
        last = queries[:, :, max(0, queries.shape[2] - self.needs.window) :]
        self.queries = torch.cat([*before, last], dim=2)
        self.queries = self.queries[:, :, max(0, self.queries.shape[2] - self.needs.window) :]
        if self.needs.column_sums:
            sums = column_sums(queries, self.keys, lse, scaling=self.scaling)
            if self.sums is not None:
                sums[..., : self.sums.shape[-1]] += self.sums
            self.sums = sums

    def kv(self) -> KV:
        """The full cache; of a sliding-window layer, what later tokens can still see."""
        tokens = self.keys.shape[2]
        start = 0 if self.window is None else max(0, tokens - self.window)
        positions = torch.arange(start, tokens, device=self.keys.device)
        shape = (*self.keys.shape[:2], tokens - start)
        return KV(self.keys[:, :, start:], self.values[:, :, start:], positions.expand(shape))


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


class RowsLayer(LayerCache):
    """R compressed rows that grow by every token. Every KV head of every row holds a number of slots of its own.

    Args:
        rows: what each row kept, every KV of batch 1.
        position: position of the next token, the same for all rows.
        room: tokens that can be appended.
    """

    def __init__(self, rows: Sequence[KV], *, position: int, room: int) -> None:
        self.start = self.position = position
        self.heads = rows[0].positions.shape[1]
        self.kept_bytes = [kv.nbytes for kv in rows]
        self._arrange(_groups(rows, position=position, room=room))

    def append(self, keys: Tensor, values: Tensor) -> None:
        grown, new = self.position - self.start, keys.shape[2]
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
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [R * H, G, Q, D], group after group
        if self._back is not None:
            out = out.index_select(0, self._back)
        return out.reshape(queries.shape[0], -1, *out.shape[2:])

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every row."""
        self.position -= tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row that is not in `rows` (ascending); the kept ones are renumbered from 0."""
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
        self._arrange(kept)

    def nbytes(self, row: int) -> int:
        """Measured bytes of a row: what its policy left, and what every head appended since."""
        k, v = self.groups[0].keys, self.groups[0].values
        slot = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
        return self.kept_bytes[row] + (self.position - self.start) * self.heads * slot

    def _arrange(self, groups: list[_Group]) -> None:
        """Take `groups`; streams are put in their order by one index per step, whatever the number of groups."""
        self.groups = groups
        self._counts = [len(group.streams) for group in groups]
        self._order: Tensor | None = None  # [R * H], group after group; None when streams stand so already
        self._back: Tensor | None = None
        streams = [stream for group in groups for stream in group.streams]
        if streams != sorted(streams):
            self._order = torch.tensor(streams, device=groups[0].keys.device)
            self._back = self._order.argsort()

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """The streams' parts of x [R, H * k, Q, D], by group: [n, k, Q, D]."""
        x = x.reshape(-1, x.shape[1] // self.heads, *x.shape[2:])
        if len(self._counts) == 1:
            return (x,)
        return (x if self._order is None else x.index_select(0, self._order)).split_with_sizes(self._counts)


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


def visible(positions: Tensor, asked: Tensor, window: int | None) -> Tensor:
    """[R, H, Q, S] bool: slots that hold a token at or before each asked position, inside the sliding window."""
    slot, query = positions.unsqueeze(2), asked[:, None]
    mask = (slot >= 0) & (slot <= query)
    return mask if window is None else mask & (slot > query - window)
