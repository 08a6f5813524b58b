"""Decode: many compressed rows of one prompt together. Feed tokens, score a continuation, generate greedily.

One model forward serves every row; rows differ only in what their layer caches hold. Rows that evict while decoding
take one token at a time, so they live in a session of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.engine.compress import Compressed
from harness.engine.evicting_cache import EvictingRow, EvictingRows, with_room
from harness.engine.layer_cache import DecodingLayer
from harness.engine.row_cache import GrowingRows, without
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Limits

ROOM = 64  # tokens that a cache can take before it grows, where nobody knows how many will come
LOGITS_AT_ONCE = 2**25  # numbers of one logits tensor; longer inputs are fed in chunks
CPU_ROWS_AT_ONCE = 32  # up to here bf16 products round a row the same in any batch; see `Decoding._chunks`


@dataclass
class Generated:
    """What one row produced. kv_bytes_end: measured after the last token that was fed."""

    tokens: list[int] = field(default_factory=list)
    kv_bytes_end: int = 0
    done: bool = False


class Decoding:
    """R rows at the same position of prompts of one length. caches: one per model layer.

    first: [R, V] float32, logits after the prompts' last tokens, from the full cache.
    """

    def __init__(
        self, model: AttachedModel, caches: Sequence[DecodingLayer], rows: int, first: Tensor | None = None
    ) -> None:
        self.model, self.caches, self.rows, self.first = model, caches, rows, first

    @classmethod
    def of(
        cls,
        model: AttachedModel,
        rows: Sequence[Compressed],
        *,
        again: bool = False,
        room: int | None = None,
        release: bool = False,
    ) -> Decoding:
        """Decoding of compressed prompts, which either all evict while they decode or all grow.

        Args:
            model: that they were prefilled by.
            rows: prompts of one length.
            again: the prompts' last token is to be fed again, so its slot is given up.
            room: tokens to come, all rows alike; None when that is not known.
            release: take the rows' own KVs, layer by layer, so that they need not be held twice.

        Raises:
            ValueError: prompts of several lengths.
        """
        lengths = {row.tokens for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"prompts of {sorted(lengths)} tokens; a batch has one length")
        position = rows[0].tokens - again
        evicts = rows[0].policy.evicts_while_decoding
        caches: list[DecodingLayer] = []
        for i, window in enumerate(model.windows):
            kvs = [row.kvs.pop(0) if release else row.kvs[i] for row in rows]
            if evicts:
                evicting = []
                for row, kv in zip(rows, kvs, strict=True):
                    width = kv.positions.shape[2] + _free_slots(row, window, room)
                    evicting.append(EvictingRow(row.policy, row.budget, with_room(without(kv, position), width)))
                caches.append(EvictingRows(evicting, position))
            else:
                held = [without(kv, position) for kv in kvs]
                caches.append(GrowingRows(held, position=position, room=ROOM if room is None else room))
        return cls(model, caches, len(rows), torch.cat([row.logits for row in rows]))

    @property
    def position(self) -> int:
        """Of the next token."""
        return self.caches[0].position

    def nbytes(self, row: int) -> int:
        """Measured bytes of a row's cache."""
        return sum(cache.nbytes(row) for cache in self.caches)

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append the same tokens to every row; logits after the last one, [R, V] float32; `first` after none."""
        if not tokens and self.first is not None:
            return self.first
        logits = torch.empty(0)
        for chunk in self._chunks(tokens):
            logits = self._forward(torch.tensor([chunk] * self.rows), keep=1)
        return logits[:, -1].float()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; next logits [R, V] float32."""
        return self._forward(torch.tensor(tokens).unsqueeze(1), keep=1)[:, -1].float()

    def forced(
        self, logits: Tensor, tokens: Sequence[int], *, alone: bool = False
    ) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Teacher-forced: logits [R, Q, V] and the Q tokens that they should tell, in pieces of some length.

        The rows are afterwards as they were. logits: [R, V], the distribution of the first token. alone: no other
        company will be compared with, so a CPU may take many tokens at once (see `_chunks`).
        """
        marks = [cache.mark() for cache in self.caches]
        yield logits.unsqueeze(1), tokens[:1]
        at = 1
        for chunk in self._chunks(tokens[:-1], alone=alone):
            yield self._forward(torch.tensor([chunk] * self.rows), keep=0), tokens[at : at + len(chunk)]
            at += len(chunk)
        for cache, mark in zip(self.caches, marks, strict=True):
            cache.rewind(mark)

    def answer_nll(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        """Negative log-likelihood of every answer token: [R, len(answer)] float32, nats. logits: as in `forced`."""
        return torch.cat([_nll(own, tokens) for own, tokens in self.forced(logits, answer)], dim=1)

    def greedy(self, logits: Tensor, limits: Limits) -> list[Generated]:
        """Greedy generation of every row from its first logits [R, V]; a row stops on its own."""
        results = [Generated() for _ in range(self.rows)]
        active = list(range(self.rows))  # batch row -> result
        eos = torch.tensor(sorted(limits.eos_ids), dtype=torch.int64, device=logits.device)
        for count in range(limits.max_new_tokens):
            if count < limits.min_new_tokens:
                logits[:, eos] = float("-inf")
            picked: list[int] = logits.max(dim=-1).indices.tolist()  # on a CPU faster than argmax
            for row, token in enumerate(picked):
                self._take(row, results[active[row]], token, limits)
            left = [row for row, result in enumerate(active) if not results[result].done]
            if not left:
                break
            if len(left) <= len(active) // 2:
                self._keep(left)
                active, picked = [active[row] for row in left], [picked[row] for row in left]
            logits = self.step(picked)
        return results

    def _take(self, row: int, result: Generated, token: int, limits: Limits) -> None:
        if result.done:
            return
        if token in limits.eos_ids:
            result.done = True
        else:
            result.tokens.append(token)
            result.done = limits.ends(result.tokens)
        if result.done:
            result.kv_bytes_end = self.nbytes(row)

    def _chunks(self, tokens: Sequence[int], *, alone: bool = False) -> list[list[int]]:
        """Tokens cut into forwards.

        On a CPU every token goes by itself, so that a cell computes the same in any company: wider products pick
        another kernel, which rounds differently.
        """
        one = self.caches[0].single_step or (self.model.device.type == "cpu" and not alone)
        size = 1 if one else max(1, LOGITS_AT_ONCE // (self.rows * self.model.vocab))
        return [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    def _forward(self, ids: Tensor, *, keep: int) -> Tensor:
        return self.model.forward(ids.to(self.model.device), self.caches, position=self.position, keep=keep)

    def _keep(self, rows: Sequence[int]) -> None:
        for cache in self.caches:
            cache.keep(rows)
        self.rows = len(rows)


def _free_slots(row: Compressed, window: int | None, room: int | None) -> int:
    """Slots more than its policy left that a row needs, for it evicts while it decodes.

    One for the next token, and as many as a prompt within its budget may still grow by. In a layer with a sliding
    window tokens leave as the window passes them: its own width, or what will come.
    """
    if window is None:
        return max(1, row.budget + 1 - row.tokens)
    return window if room is None else min(room, window)


def _nll(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    index = torch.tensor(tokens, device=logits.device).expand(logits.shape[0], -1).unsqueeze(-1)
    return -logits.float().log_softmax(dim=-1).gather(2, index).squeeze(-1)
