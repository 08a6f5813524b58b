"""What stands between a layer's attention and the tensors it reads: the contract of layer caches.

A layer cache takes new keys and values (`append`) and answers the queries of the same tokens (`attend`). One that
decodes (`DecodingLayer`) holds a batch of rows at the same position, because they continue the same prompt; what
differs is which slots they kept. The engine knows no more of a layer than this: rows that grow
(`row_cache.GrowingRows`) and rows that evict while they decode (`evicting_cache.EvictingRows`) are the same to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from methods.views import Form


class LayerCache(ABC):
    """One layer of a batch of R rows. Keys and values [R, H, Q, D], queries [R, Hq, Q, D], RoPE applied."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens' keys and values."""

    @abstractmethod
    def attend(self, queries: Tensor, form: Form) -> Tensor:
        """Attention output [R, Hq, Q, D] of the tokens just appended."""

    def restart(self) -> None:
        """Forget every token: the next one begins a chunk that sees itself alone. Layers without chunks never do."""
        raise NotImplementedError(f"{type(self).__name__} holds no layer of chunks")


class DecodingLayer(LayerCache):
    """A layer of R compressed rows. position: of the next token, the same for all rows."""

    position: int
    single_step = False
    """Whether it takes one token at a time."""

    replays = False
    """Whether a step can be captured and replayed: a token within the room that `reserve` made asks the host nothing.

    A replay leaves `position` as it is; whoever replays moves it.
    """

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens more, where memory for them would else come in steps."""

    def check(self) -> None:
        """Raise what went wrong in the steps since the last check, where a step does not wait to see it."""

    @abstractmethod
    def mark(self) -> Any:
        """The state of now, to come back to with `rewind`, once."""

    @abstractmethod
    def rewind(self, mark: Any) -> None:
        """Forget every token that came after `mark`."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row that is not in `rows` (ascending); the kept ones are renumbered from 0."""

    @abstractmethod
    def nbytes(self, row: int) -> int:
        """Live bytes of a row, positions and side data included. Raises IndexError for a row that there is not."""

    @abstractmethod
    def stored_bytes(self, row: int) -> int:
        """Bytes that are allocated for a row, in company as alone: what lives, room for tokens to come, its index."""

    def read_bytes(self, row: int) -> int | None:
        """Mean bytes that a decoded token of a row read; None where it reads all that is there."""
        return None

    @property
    @abstractmethod
    def stored(self) -> list[int]:
        """`stored_bytes` of every row, kept up as memory is added, so that it may be asked for after every token."""


INDEX_BYTES = 8  # of an entry of a batch whose entries do not stand part after part: two int32


class Parts:
    """A batch that is held in parts: splits it part after part, and joins it again, by one index per step.

    members: numbers of each part's entries along the batch, ascending in a part.
    """

    def __init__(self, members: Sequence[Sequence[int]], device: torch.device) -> None:
        self._sizes = [len(own) for own in members]
        self._order: Tensor | None = None  # None when the entries stand part after part already
        self._back: Tensor | None = None
        order = [number for own in members for number in own]
        if order != sorted(order):
            self._order = torch.tensor(order, dtype=torch.int32, device=device)
            self._back = self._order.argsort().int()

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The parts of x [batch, ...]."""
        if len(self._sizes) == 1:
            return (x,)
        return (x if self._order is None else x.index_select(0, self._order)).split_with_sizes(self._sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What `split` took apart, or something of the same entries: [batch, ...]."""
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return x if self._back is None else x.index_select(0, self._back)


def room_step(slots: int) -> int:
    """Slots of memory to add at once to `slots` of a head: a sixteenth, so that copying costs little and room too."""
    return max(4, slots // 16)


def visible(positions: Tensor, asked: Tensor, window: int | None) -> Tensor:
    """[R, H, Q, S] bool: slots that hold a token at or before each asked position, inside the sliding window.

    positions: [R, H, S], -1 for an empty slot. asked: [Q].
    """
    slot, query = positions.unsqueeze(2), asked[:, None]
    mask = (slot >= 0) & (slot <= query)
    return mask if window is None else mask & (slot > query - window)
