"""Decoding many compressed rows of one prompt together: feed tokens, score a reference, generate greedily.

One model forward serves every row; rows differ only in what their layer caches hold. Rows that evict while decoding
take one token at a time, so they live in a session of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.engine.evicting_cache import EvictingLayer
from harness.engine.row_cache import RowsLayer
from harness.engine.transformers_seam import AttachedModel

LOGITS_AT_ONCE = 2**25  # numbers of one logits tensor; longer inputs are fed in chunks
CPU_ROWS_AT_ONCE = 32  # up to here bf16 products round a row the same in any batch; see `Session._chunks`


@dataclass(frozen=True)
class Limits:
    """When a generation ends. stop: strings; text: token ids to text, asked only when there are stop strings."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    text: Callable[[Sequence[int]], str] | None = None

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the generation is complete, judged by its tokens so far (end-of-text never among them)."""
        if len(tokens) >= self.max_new_tokens:
            return True
        if not self.stop or self.text is None or len(tokens) <= self.min_new_tokens:
            return False
        longest = max(len(stop.encode()) for stop in self.stop)  # a token is a byte at least
        tail = self.text(tokens[-longest - 8 :])
        return any(stop in tail for stop in self.stop)


@dataclass
class Generated:
    """What one row produced. kv_bytes_end: measured after the last token that was fed."""

    tokens: list[int] = field(default_factory=list)
    kv_bytes_end: int = 0
    done: bool = False


class Session:
    """R rows at the same position of the same prompt. caches: one layer cache per model layer."""

    def __init__(self, model: AttachedModel, caches: Sequence[RowsLayer | EvictingLayer], rows: int) -> None:
        self.model, self.caches, self.rows = model, caches, rows

    @property
    def position(self) -> int:
        return self.caches[0].position

    @property
    def single_step(self) -> bool:
        return isinstance(self.caches[0], EvictingLayer)

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append the same tokens to every row; logits after the last one, [R, V] float32."""
        logits = torch.empty(0)
        for chunk in self._chunks(tokens):
            logits = self._forward(torch.tensor([chunk] * self.rows), keep=1)
        return logits[:, -1].float()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; next logits [R, V] float32."""
        return self._forward(torch.tensor(tokens).unsqueeze(1), keep=1)[:, -1].float()

    def answer_nll(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        """Negative log-likelihood of every answer token, teacher-forced: [R, len(answer)] float32, nats.

        logits: [R, V], the distribution of the first answer token. The rows are left as they were.
        """
        mark = self._mark()
        parts = [_nll(logits.unsqueeze(1), answer[:1])]
        at = 1
        for chunk in self._chunks(answer[:-1]):
            out = self._forward(torch.tensor([chunk] * self.rows), keep=0)
            parts.append(_nll(out, answer[at : at + len(chunk)]))
            at += len(chunk)
        self._rewind(mark)
        return torch.cat(parts, dim=1)

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
            result.kv_bytes_end = sum(cache.nbytes(row) for cache in self.caches)

    def _chunks(self, tokens: Sequence[int]) -> list[list[int]]:
        """Tokens cut into forwards.

        On a CPU every token goes alone, so that a cell computes the same in any company: wider products pick another
        kernel, which rounds differently.
        """
        alone = self.single_step or self.model.device.type == "cpu"
        size = 1 if alone else max(1, LOGITS_AT_ONCE // (self.rows * self.model.vocab))
        return [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    def _forward(self, ids: Tensor, *, keep: int) -> Tensor:
        return self.model.forward(ids.to(self.model.device), self.caches, position=self.position, keep=keep)

    def _keep(self, rows: Sequence[int]) -> None:
        for cache in self.caches:
            cache.keep(rows)
        self.rows = len(rows)

    def _mark(self) -> Any:
        return [cache.snapshot() if isinstance(cache, EvictingLayer) else cache.position for cache in self.caches]

    def _rewind(self, marks: Any) -> None:
        for cache, mark in zip(self.caches, marks, strict=True):
            if isinstance(cache, EvictingLayer):
                cache.restore(mark)
            else:
                cache.rewind(cache.position - mark)


def _nll(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    index = torch.tensor(tokens, device=logits.device).expand(logits.shape[0], -1).unsqueeze(-1)
    return -logits.float().log_softmax(dim=-1).gather(2, index).squeeze(-1)
