"""Scoring given text on a compressed cache: what lm-eval's log-likelihood requests ask of the engine.

A context is prefilled and compressed once and serves all its continuations. Its last token is held back: fed again on
the compressed cache at its true position, so that the first scored token is compressed too. Without that, tasks whose
choices are one token long (MMLU, A to D) would show no loss at any budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engine.decode import LOGITS_AT_ONCE, Session
from harness.engine.engine import Engine, Prefilled, Row
from harness.engine.evicting_cache import EvictingLayer
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Outcome
from methods.base import Needs


@dataclass(frozen=True)
class Scored:
    """A continuation's log-probability in nats, summed over its tokens, and whether each is the most likely one."""

    logprob: float
    greedy: bool


class ScoringEngine(Engine):
    """An engine that scores continuations, query-aware and with the first token from the compressed cache.

    prefills: how many prompts it has run through the model.
    """

    def __init__(self, model: AttachedModel) -> None:
        super().__init__(model)
        self.prefills = 0
        self._extra = Needs()

    def prefill(self, ids: Sequence[int], needs: Needs) -> Prefilled:
        self.prefills += 1
        return super().prefill(ids, needs | self._extra)

    def score(
        self, ids: Sequence[int], cell: Cell, continuations: Sequence[Sequence[int]]
    ) -> tuple[Outcome, list[Scored]]:
        """Every continuation after the context `ids`, which is compressed once.

        An outcome that is not ok says why there are no scores. Raises what the model raises while it scores.
        """
        row, prefilled = self._one(ids, cell)
        if prefilled is None or row.outcome.status != "ok":
            return row.outcome, []
        return row.outcome, self._scored(row, prefilled, ids[-1], continuations)

    def score_text(self, ids: Sequence[int], cell: Cell, *, context: int) -> tuple[Outcome, float]:
        """Log-probability of ids[context:]; up to `border` with the full cache, from there on what is left of it."""
        at = border(len(ids), context)
        self._extra = Needs(window=at - context, logprobs=True)  # those of ids[context:at] come with the prefill
        try:
            row, prefilled = self._one(ids[:at], cell)
        finally:
            self._extra = Needs()
        if prefilled is None or row.outcome.status != "ok":
            return row.outcome, 0.0
        logprobs = prefilled.view.logprobs  # [1, W], of the last W tokens, which the method's own needs may make more
        first = 0.0 if logprobs is None else float(logprobs[0, logprobs.shape[1] - (at - context) :].sum())
        second = self._scored(row, prefilled, ids[at - 1], [ids[at:]])[0]
        return row.outcome, first + second.logprob

    def _one(self, ids: Sequence[int], cell: Cell) -> tuple[Row, Prefilled | None]:
        done, prefilled = self._compressed([Row(cell, Outcome())], list(ids))
        return done[cell], prefilled

    def _scored(
        self, row: Row, prefilled: Prefilled, held_back: int, continuations: Sequence[Sequence[int]]
    ) -> list[Scored]:
        room = 1 + max(map(len, continuations))
        with torch.inference_mode():
            session = self._session([row], prefilled, position=prefilled.tokens - 1, room=room)
            first = session.feed([held_back])  # [1, V]
            scored = []
            for tokens in continuations:
                with _left_as_it_was(session):
                    scored.append(self._continuation(session, first, tokens))
            row.outcome.kv_bytes_end = sum(cache.nbytes(0) for cache in session.caches)
        return scored

    def _continuation(self, session: Session, first: Tensor, tokens: Sequence[int]) -> Scored:
        """Teacher-forced, in one forward unless the logits are many. first: [1, V], those of tokens[0]."""
        size = 1 if session.single_step else max(1, LOGITS_AT_ONCE // self.model.vocab)
        parts = [_judge(first, tokens[:1])]
        for at in range(0, len(tokens) - 1, size):
            fed = tokens[at : min(at + size, len(tokens) - 1)]
            ids = torch.tensor([list(fed)], device=self.model.device)
            logits = self.model.forward(ids, session.caches, position=session.position)[0]  # [Q, V]
            parts.append(_judge(logits, tokens[at + 1 : at + 1 + len(fed)]))
        return Scored(sum(part.logprob for part in parts), all(part.greedy for part in parts))


def border(tokens: int, context: int) -> int:
    """Where a text of so many tokens is cut in two to be scored: in the middle, or where its context ends."""
    return max(tokens // 2, context)


def _judge(logits: Tensor, tokens: Sequence[int]) -> Scored:
    """Logits [Q, V] against the tokens that came, Q of them."""
    came = torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)
    logprobs = logits.float().log_softmax(dim=-1)
    total = logprobs.gather(1, came.unsqueeze(1)).sum()
    return Scored(float(total), bool((logprobs.argmax(dim=-1) == came).all()))


@contextmanager
def _left_as_it_was(session: Session) -> Iterator[None]:
    """Undo what the tokens fed inside did to the caches."""
    before = [cache.snapshot() if isinstance(cache, EvictingLayer) else cache.position for cache in session.caches]
    yield
    for cache, state in zip(session.caches, before, strict=True):
        if isinstance(cache, EvictingLayer):
            cache.restore(state)
        else:
            cache.rewind(cache.position - state)
