"""The layer cache of rows in a layer of chunks that see themselves alone: rows hold the same, no policy sees it.

When a chunk is full the next token begins another, which knows nothing of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.engine.kernels import slot_attention
from harness.engine.layer_cache import DecodingLayer, visible
from methods.base import KV
from methods.views import Form


class ChunkRows(DecodingLayer):
    """R rows of a layer with chunked attention.

    rows: what each holds of the chunk that the next token is in, or that ends before it; every KV of batch 1. position:
    of the next token.
    """

    def __init__(self, rows: Sequence[KV], position: int) -> None:
        self.position = position
        keys, values = zip(*(kv.load() for kv in rows), strict=True)
        self.keys, self.values = torch.cat(keys), torch.cat(values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.position += keys.shape[2]

    def restart(self) -> None:
        self.keys, self.values = (x[:, :, :0].clone() for x in (self.keys, self.values))

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        new, mask = queries.shape[2], None
        if new > 1:
            at = torch.arange(self.keys.shape[2], device=queries.device)
            mask = visible(at.expand(self.keys.shape[:3]), at[-new:], None)
        return slot_attention(queries, self.keys, self.values, form, mask=mask)

    def mark(self) -> Any:
        return self.position, self.keys, self.values  # an append makes new ones

    def rewind(self, mark: Any) -> None:
        self.position, self.keys, self.values = mark

    def keep(self, rows: Sequence[int]) -> None:
        self.keys, self.values = self.keys[list(rows)], self.values[list(rows)]

    def nbytes(self, row: int) -> int:
        return self.stored[row]

    stored_bytes = nbytes

    @property
    def stored(self) -> list[int]:
        rows = len(self.keys)
        return [(self.keys.nbytes + self.values.nbytes) // rows] * rows
