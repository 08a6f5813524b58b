"""Decode: many compressed rows of one prompt together. Feed tokens, score a continuation, generate greedily.

One model forward serves every row; rows differ only in what their layer caches hold. Rows that evict while decoding
take one token at a time, so they live in a session of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.engine import gpu
from harness.engine.chunk_rows import ChunkRows
from harness.engine.compress import Compressed
from harness.engine.evicting_cache import EvictingRow, EvictingRows, with_room
from harness.engine.layer_cache import DecodingLayer
from harness.engine.packed import Held, Packed, without, without_last
from harness.engine.paged_rows import PagedRows
from harness.engine.row_cache import GrowingRows
from harness.engine.states import States
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Limits, NotFinite
from methods.base import KV
from methods.codes import MinMax
from methods.pages import PagedKV
from methods.stored import CodedKV

LOGITS_AT_ONCE = 2**25  # numbers of one logits tensor; longer inputs are fed in chunks
FLAWED = -1  # picked of logits that are NaN or infinite
CPU_ROWS_AT_ONCE = 32  # up to here bf16 products round a row the same in any batch; see `Decoding._forwards`


@dataclass
class Generated:
    """What one row produced. kv_bytes_end, stored_bytes_end: live and stored after the last token that was fed.

    byte_steps: the sum of what was stored when each token was picked, end-of-text too. read: what a token read of each
    layer, as `DecodingLayer.read_bytes`. flaw: why it ended early.
    """

    tokens: list[int] = field(default_factory=list)
    kv_bytes_end: int = 0
    stored_bytes_end: int = 0
    byte_steps: int = 0
    read: Sequence[int | None] = ()
    done: bool = False
    flaw: NotFinite | None = None


@dataclass
class Decoding:
    """R rows at the same position of prompts of one length. caches: one per layer of keys and values.

    first: [R, V] float32, logits after the prompts' last tokens, from the full cache. beside: bytes that are kept for a
    row beside its caches, so that they can be compressed again.
    """

    model: AttachedModel
    caches: Sequence[DecodingLayer]
    rows: int
    first: Tensor | None = None
    states: States = field(default_factory=States)
    beside: int = 0

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
            rows: prompts of one length; else ValueError.
            again: the prompts' last token is to be fed again, so its slot is given up.
            room: most tokens to come, all rows alike; None when that is not known. Memory for them comes in steps.
            release: take the rows' own layers, one by one, so that they need not be held twice.
        """
        lengths = {row.tokens for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"prompts of {sorted(lengths)} tokens; a batch has one length")
        position, caches = rows[0].tokens - again, list[DecodingLayer]()
        states = States.joined([row.states[position] for row in rows])
        for i, window in enumerate(model.windows):
            layers = [row.layers.pop(0) if release else row.layers[i] for row in rows]
            kvs = [layer.kv() if isinstance(layer, Packed) else layer for layer in layers]
            known, sliding = [row.known[i] for row in rows], window is not None
            if model.chunks[i]:
                caches.append(ChunkRows([without(kv, position) for kv in kvs], position))
            elif any(isinstance(kv, PagedKV) for kv in kvs):
                if again:
                    pairs = [without_last(*own, position + 1) for own in zip(kvs, known, strict=True)]
                    kvs, known = [kv for kv, _ in pairs], [own for _, own in pairs]
                caches.append(PagedRows(kvs, position=position, room=room, known=known))
            elif rows[0].policy.evicts_while_decoding:
                free = [_free_slots(row, window, room) for row in rows]
                roomy = [with_room(kv, 1) for kv in kvs]
                if again:
                    left = zip(roomy, known, strict=True)
                    roomy = [without(kv, position, [min(1, at) for at in own.last]) for kv, own in left]
                evicting = [
                    EvictingRow(row.policy, row.budget, kv, more - 1)
                    for row, kv, more in zip(rows, roomy, free, strict=True)
                ]
                caches.append(EvictingRows(evicting, position))
            else:
                if again:
                    less = [without_last(*own, position + 1, window=sliding) for own in zip(kvs, known, strict=True)]
                    kvs, known = [kv for kv, _ in less], [own for _, own in less]
                    del less
                caches.append(_growing(kvs, known, position=position, room=room, window=sliding))
            del layers, kvs  # or the last layer's would stay
        return cls(model, caches, len(rows), torch.cat([row.logits for row in rows]), states)

    @property
    def position(self) -> int:
        """Of the next token."""
        return self.caches[0].position

    def nbytes(self, row: int) -> int:
        """Live bytes of a row's cache."""
        return sum(cache.nbytes(row) for cache in self.caches) + self.states.nbytes + self.beside

    def stored_bytes(self, row: int) -> int:
        """Bytes that are allocated for a row's cache, room for tokens to come included."""
        return sum(cache.stored_bytes(row) for cache in self.caches) + self.states.nbytes + self.beside

    def read_bytes(self, row: int) -> list[int | None]:
        """What a token of a row read of each layer, as `DecodingLayer.read_bytes`."""
        return [cache.read_bytes(row) for cache in self.caches]

    def feed(self, tokens: Sequence[int], *, alone: bool = False) -> Tensor:
        """Append the same tokens to every row; logits after the last one, [R, V] float32; `first` after none.

        alone: as in `forced`.
        """
        logits = self.first
        for _, own in self._forwards(tokens, keep=1, alone=alone):
            logits = own[:, -1].float()
        assert logits is not None
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; next logits [R, V] float32."""
        return self._forward(torch.tensor(tokens).unsqueeze(1), keep=1)[:, -1].float()

    def forced(
        self, logits: Tensor, tokens: Sequence[int], *, alone: bool = False
    ) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Teacher-forced: logits [R, Q, V] and the Q tokens that they should tell, in pieces of some length.

        The rows are afterwards as they were. logits: [R, V], the distribution of the first token. alone: no other
        company will be compared with, so a CPU may take many tokens at once (see `_forwards`).
        """
        marks, states = [cache.mark() for cache in self.caches], self.states.copy()
        yield logits.unsqueeze(1), tokens[:1]
        for at, own in self._forwards(tokens[:-1], keep=0, alone=alone):
            yield own, tokens[at + 1 : at + 1 + own.shape[1]]
        for cache, mark in zip(self.caches, marks, strict=True):
            cache.check()
            cache.rewind(mark)
        self.states = states

    def answer_nll(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        """Negative log-likelihood of every answer token: [R, len(answer)] float32, nats. logits: as in `forced`."""
        found = []
        for own, tokens in self.forced(logits, answer):
            told = torch.tensor(tokens, device=own.device).expand(self.rows, -1).unsqueeze(-1)
            found.append(-own.float().log_softmax(dim=-1).gather(2, told).squeeze(-1))
        return torch.cat(found, dim=1)

    def greedy(self, logits: Tensor, limits: Limits) -> list[Generated]:
        """Greedy generation of every row from its first logits [R, V]; a row stops on its own, or at a flaw."""
        results = [Generated() for _ in range(self.rows)]
        active = results.copy()  # those of the batch's rows
        barred = [token for token in sorted(limits.eos_ids) if token < logits.shape[-1]]  # a model may name more
        eos = torch.tensor(barred, dtype=torch.int64, device=logits.device)
        for count in range(limits.max_new_tokens):
            if count < limits.min_new_tokens:
                logits[:, eos] = float("-inf")
            best = logits.max(dim=-1)  # on a CPU faster than argmax
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            picked: list[int] = [token if math.isfinite(logit) else FLAWED for token, logit in pairs]
            stored, more = zip(*(cache.stored for cache in self.caches), strict=True), self.states.nbytes + self.beside
            for result, held in zip(active, stored, strict=True):
                result.byte_steps += 0 if result.done else sum(held) + more
            for row, token in enumerate(picked):
                self._take(row, active[row], token, limits)
            left = [row for row, result in enumerate(active) if not result.done]
            if not left:
                break
            if len(left) <= len(active) // 2:
                for cache in self.caches:
                    cache.keep(left)
                self.states = self.states.take(left)
                self.rows = len(left)
                active, picked = [active[row] for row in left], [picked[row] for row in left]
            logits = self.step([max(0, token) for token in picked])
        for cache in self.caches:
            cache.check()
        return results

    def _take(self, row: int, result: Generated, token: int, limits: Limits) -> None:
        if result.done:
            return
        if token == FLAWED:
            result.flaw, result.done = NotFinite(f"after {len(result.tokens)} tokens of the answer"), True
        elif token in limits.eos_ids:
            result.done = True
        else:
            result.tokens.append(token)
            result.done = limits.ends(result.tokens)
        if result.done:
            result.kv_bytes_end, result.stored_bytes_end = self.nbytes(row), self.stored_bytes(row)
            result.read = self.read_bytes(row)

    def _forwards(self, tokens: Sequence[int], *, keep: int, alone: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Feed the same tokens to every row: where each piece of them starts, and its logits.

        On a CPU every token goes by itself, so that a cell computes the same in any company: wider products pick
        another kernel, which rounds differently.
        """
        one = any(cache.single_step for cache in self.caches) or (self.model.device.type == "cpu" and not alone)
        size = 1 if one else max(1, LOGITS_AT_ONCE // (self.rows * self.model.vocab))
        for at in range(0, len(tokens), size):
            yield at, self._forward(torch.tensor([tokens[at : at + size]] * self.rows), keep=keep)

    def _forward(self, ids: Tensor, *, keep: int) -> Tensor:
        given = ids.to(self.model.device)
        return self.model.forward(given, self.caches, position=self.position, states=self.states, keep=keep)


def _growing(
    rows: Sequence[KV], known: Sequence[Held], *, position: int, room: int | None, window: bool
) -> DecodingLayer:
    """The layer cache of rows that grow; arguments as of `GrowingRows`.

    On a GPU all heads of all rows are read in one call, but where keys are of another width than values, or slots are
    stored as something else than min/max codes.
    """
    plain = all(isinstance(own, MinMax) for kv in rows if isinstance(kv, CodedKV) for own in kv.codings)
    if plain and rows[0].keys.shape[-1] == rows[0].values.shape[-1] and gpu.fused(rows[0].keys.device):
        from harness.engine.ragged_rows import RaggedRows

        return RaggedRows(rows, position=position, room=room, window=window, known=known)
    return GrowingRows(rows, position=position, room=room, window=window, known=known)


def _free_slots(row: Compressed, window: int | None, room: int | None) -> int:
    """Most slots more than its policy left that a row comes to need, for it evicts while it decodes.

    One for the next token, and as many as a prompt within its budget, or within the layer's sliding window, may still
    grow by.
    """
    more = (row.budget if window is None else window) + 1 - row.tokens
    return max(1, more if room is None else min(room, more))
