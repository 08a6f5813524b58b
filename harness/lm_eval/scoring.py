"""Scoring given text on a compressed cache: what lm-eval's log-likelihood requests ask of the engine.

A context is prefilled and compressed once and serves all its continuations. Its last token is held back: fed again on
the compressed cache at its true position, so that the first scored token is compressed too. Without that, tasks whose
choices are one token long (MMLU, A to D) would show no loss at any budget.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.decode import Decoding
from harness.engine.engine import CellRun, Engine
from harness.engine.types import Cell, Outcome
from methods.base import Needs


class Scored(NamedTuple):
    """A continuation's log-probability in nats, summed over its tokens, and whether each is the most likely one."""

    logprob: float
    greedy: bool


class ScoringEngine(Engine):
    """An engine that scores continuations, query-aware and with the first token from the compressed cache."""

    def score(
        self, ids: Sequence[int], cell: Cell, continuations: Sequence[Sequence[int]]
    ) -> tuple[Outcome, list[Scored]]:
        """Every continuation after the context `ids`, which is compressed once.

        An outcome that is not ok says why there are no scores. Raises what the model raises while it scores.
        """
        runs, _ = self.compress_cells(ids, [cell])
        return runs[cell].outcome, self._scored(runs[cell], ids[-1], continuations)

    def score_text(self, ids: Sequence[int], cell: Cell, *, context: int) -> tuple[Outcome, float]:
        """Log-probability of ids[context:]; up to `border` with the full cache, from there on what is left of it."""
        at = border(len(ids), context)
        first = Needs(window=at - context, logprobs=True)  # those of ids[context:at] come with the prefill
        runs, prefilled = self.compress_cells(ids[:at], [cell], also=first)
        scored = self._scored(runs[cell], ids[at - 1], [ids[at:]])
        if prefilled is None or not scored:
            return runs[cell].outcome, 0.0
        logprobs = prefilled.logprobs  # [1, W], of the last W tokens, which the method's own needs may make more
        told = 0.0 if logprobs is None else float(logprobs[0, logprobs.shape[1] - (at - context) :].sum())
        return runs[cell].outcome, told + scored[0].logprob

    def _scored(self, run: CellRun, held_back: int, continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Of every continuation; none when the cell was not compressed."""
        if run.compressed is None:
            return []
        with torch.inference_mode():
            room = 1 + max(map(len, continuations))
            decoding = Decoding.of(self.model, [run.compressed], again=True, room=room)
            first = decoding.feed([held_back])  # [1, V], of each continuation's first token
            scored = []
            for tokens in continuations:  # teacher-forced, in one forward unless the logits are many
                parts = [_judge(logits[0], own) for logits, own in decoding.forced(first, tokens, alone=True)]
                scored.append(Scored(sum(part.logprob for part in parts), all(part.greedy for part in parts)))
            run.outcome.kv_bytes_end = decoding.nbytes(0)
        return scored


def border(tokens: int, context: int) -> int:
    """Where a text of so many tokens is cut in two to be scored: in the middle, or where its context ends."""
    return max(tokens // 2, context)


def _judge(logits: Tensor, tokens: Sequence[int]) -> Scored:
    """Logits [Q, V] against the tokens that came, Q of them."""
    came = torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)
    logprobs = logits.float().log_softmax(dim=-1)
    total = logprobs.gather(1, came.unsqueeze(1)).sum()
    return Scored(float(total), bool((logprobs.argmax(dim=-1) == came).all()))
