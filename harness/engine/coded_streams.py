"""Codes of streams on a GPU, one stream after the other. A stream is a KV head of a row, as in `ragged_rows`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from methods.base import KV
from methods.codes import MinMax, MinMaxCodes
from methods.stored import CodedKV

INDEX_BYTES = 16  # of a stream: its number, its first slot and group of keys, how many slots


@dataclass
class CodedStreams:
    """Coded slots of those streams that have any of one kind. None is changed; more make another one.

    streams: their numbers. tensors: those of `methods.codes.MinMaxCodes`, [C, ...] of one stream after the other, or a
    row for each group of keys. counts: coded slots of each.
    index: [4, n] int32, of each its number, first slot, first group of keys, coded slots.
    """

    coding: MinMax
    streams: list[int]
    tensors: list[Tensor]
    counts: list[int]

    @classmethod
    def of(cls, rows: Sequence[KV], heads: int) -> list[CodedStreams]:
        """Return those of rows, one for each kind of codes."""
        found = defaultdict[MinMax, list[tuple[int, int, list[Tensor]]]](list)
        for row, kv in enumerate(rows):
            for members, codes in kv.parts if isinstance(kv, CodedKV) else ():
                assert isinstance(codes, MinMaxCodes)
                for i, head in enumerate(members):
                    own = [x[i] for x in codes.tensors()]
                    found[codes.coding].append((row * heads + head, codes.slots, own))
        made = []
        for coding, parts in found.items():
            tensors = [torch.cat(own) for own in zip(*(held for _, _, held in parts), strict=True)]
            made.append(cls(coding, [part[0] for part in parts], tensors, [part[1] for part in parts]))
        return made

    def __post_init__(self) -> None:
        groups = [-(-count // self.coding.group) for count in self.counts]
        self.slot_ends, self.group_ends = (list(accumulate(own, initial=0)) for own in (self.counts, groups))
        index = [self.streams, self.slot_ends[:-1], self.group_ends[:-1], self.counts]
        self.index = torch.tensor(index, dtype=torch.int32, device=self.tensors[0].device)

    @classmethod
    def made(cls, codes: MinMaxCodes, streams: Sequence[int]) -> CodedStreams:
        """Return the codes of some streams, in their order."""
        tensors = [x.flatten(0, 1) for x in codes.tensors()]
        return cls(codes.coding, list(streams), tensors, [codes.slots] * len(streams))

    def then(self, later: CodedStreams) -> CodedStreams:
        """Return these slots and `later` ones behind them, of all streams of both; groups of these are full."""
        held = defaultdict[int, list[tuple[CodedStreams, int]]](list)
        for part in (self, later):
            for i, stream in enumerate(part.streams):
                held[stream].append((part, i))
        pieces = [own for stream in sorted(held) for own in held[stream]]
        tensors = [torch.cat([of.tensors[at][of._own(i, at)] for of, i in pieces]) for at in range(len(self.tensors))]
        counts = [sum(of.counts[i] for of, i in held[stream]) for stream in sorted(held)]
        return CodedStreams(self.coding, sorted(held), tensors, counts)

    def take(self, place: Mapping[int, int]) -> CodedStreams | None:
        """Return the streams that have a place, under its number; None when none has."""
        left = [i for i, stream in enumerate(self.streams) if stream in place]
        tensors = [torch.cat([x[self._own(i, at)] for i in left]) for at, x in enumerate(self.tensors) if left]
        streams, counts = [place[self.streams[i]] for i in left], [self.counts[i] for i in left]
        return CodedStreams(self.coding, streams, tensors, counts) if left else None

    def nbytes(self, streams: range) -> int:
        """Return the bytes that are held for some streams."""
        own = [i for i, stream in enumerate(self.streams) if stream in streams]
        codes = sum(x[self._own(i, at)].nbytes for i in own for at, x in enumerate(self.tensors))
        return codes + INDEX_BYTES * len(own)

    def _own(self, i: int, at: int) -> slice:
        """Of the i-th stream in the tensor of that number."""
        ends = self.group_ends if at in (1, 2) else self.slot_ends
        return slice(ends[i], ends[i + 1])
