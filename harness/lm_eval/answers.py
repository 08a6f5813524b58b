"""Answers to lm-eval's requests, from token ids on: what is truncated, compressed, generated, scored and noted.

A context is prefilled and compressed once and serves all its continuations. Its last token is held back: fed again on
the compressed cache at its true position, so that the first scored token is compressed too. Without that, tasks whose
choices are one token long (MMLU, A to D) would show no loss at any budget.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from lm_eval.models.utils import postprocess_generated_text, truncate_tokens
from torch import Tensor

from harness.engine.decode import Decoding
from harness.engine.engine import CellRun, Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.errors import HarnessError, shown
from harness.lm_eval.kept_facts import KeptFacts
from harness.lm_eval.requests import Generation
from harness.models.load import LoadedModel
from harness.models.prompt import token_sha256
from harness.plan.methods import plan_method
from harness.plan.sweep import PlannedCell, plan_cells
from methods.base import Needs


class ScoredPair(NamedTuple):
    """A continuation to score after a context of at least one token. text: the context as lm-eval gave it."""

    place: int
    task: str
    text: str
    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: bool = False


Scored = tuple[float, bool]
"""A continuation's log-probability in nats, summed over its tokens, and whether each is the most likely one."""


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
        if not math.isfinite(told):
            raise RuntimeError(f"the model's logits are not finite: a log-probability of {told}")
        return runs[cell].outcome, told + scored[0][0]

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
                logprobs, greedy = zip(*parts, strict=True)
                scored.append((sum(logprobs), all(greedy)))
            run.outcome.kv_bytes_end, run.outcome.stored_bytes_end = decoding.nbytes(0), decoding.stored_bytes(0)
            run.outcome.read_bytes = run.compressed.reads(decoding.read_bytes(0))
        return scored


def border(tokens: int, context: int) -> int:
    """Where a text of so many tokens is cut in two to be scored: in the middle, or where its context ends."""
    return max(tokens // 2, context)


def _judge(logits: Tensor, tokens: Sequence[int]) -> Scored:
    """Logits [Q, V] against the tokens that came, Q of them. Raises RuntimeError for what is no probability."""
    came = torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)
    logprobs = logits.float().log_softmax(dim=-1)
    total = float(logprobs.gather(1, came.unsqueeze(1)).sum())
    if not math.isfinite(total):
        raise RuntimeError(f"the model's logits are not finite: a log-probability of {total}")
    return total, bool((logprobs.argmax(dim=-1) == came).all())


class Answerer:
    """Runs prompts of one model under one cell, one at a time.

    max_length: tokens of prompt and answer together. side: which end of a longer prompt goes.
    """

    def __init__(self, loaded: LoadedModel, planned: PlannedCell, *, max_length: int | None, side: str) -> None:
        self.loaded, self.planned, self.side = loaded, planned, side
        self.max_length = max_length or loaded.context
        (self.full,) = plan_cells([plan_method("fullkv")], ())  # of a prompt that is no longer than its budget
        self.fitted_on = planned.cell.policy.fitted_on()
        self.engine = ScoringEngine(AttachedModel(loaded.model, loaded.wording))
        self.engine.check([planned.cell.policy], list(range(8)))
        self.facts = KeptFacts(heads=self.engine.model.sizes(8).kv_heads, budget=planned.budget)

    def generate(self, task: str, text: str, whole: Sequence[int], asked: Generation) -> str:
        """Return greedy text after the prompt `whole`, cut at the first stop string."""
        most, least, until = asked
        if self.max_length <= most:
            limit = f"{self.max_length} tokens"
            raise HarnessError(f"max_gen_toks {most} leaves no room for a prompt in {limit}; lower it")
        ids, tokenizer = self._cut(whole, self.max_length - most), self.loaded.tokenizer
        limits = Limits(
            max_new_tokens=most,
            eos_ids=self.loaded.eos_ids,
            min_new_tokens=least,
            stop=until,
            text=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False)),
        )
        cell = self._cell(ids)
        with _one_line(task):
            outcome = self.engine.run(Prompt(ids, len(ids), (), limits), [cell.cell])[0]
        self._note(task, text, ids, outcome, cell=cell, truncated=len(ids) < len(whole))
        generated = str(tokenizer.decode(list(outcome.token_ids), skip_special_tokens=True))
        return str(postprocess_generated_text(generated, list(until), None))

    def score(self, pairs: Iterable[ScoredPair]) -> Iterator[list[tuple[ScoredPair, float, bool]]]:
        """Yield, each context once, its continuations' log-probability (nats) and whether greedy decoding gives it."""
        fitted = sorted(map(self._fitted, pairs), key=lambda pair: (-len(pair.context), pair.context, pair.place))
        for context, group in groupby(fitted, key=lambda pair: pair.context):
            own, ids = list(group), list(context)
            cell = self._cell(ids)
            with _one_line(own[0].task):
                outcome, scored = self.engine.score(ids, cell.cell, [pair.continuation for pair in own])
            for pair in {(pair.task, pair.text): pair for pair in own}.values():
                self._note(pair.task, pair.text, ids, outcome, cell=cell, truncated=pair.truncated)
            yield [(pair, *one) for pair, one in zip(own, scored, strict=True)]

    def score_text(self, task: str, text: str, context: Sequence[int], predicted: Sequence[int]) -> float:
        """Return the log-probability of `predicted` after `context`, both with at least one token.

        Of the two together the first half is scored with the full cache, the second on what compression left of it.
        """
        ids = [*context, *predicted]
        first = ids[: border(len(ids), len(context))]
        cell = self._cell(first)
        with _one_line(task):
            outcome, total = self.engine.score_text(ids, cell.cell, context=len(context))
        self._note(task, text, first, outcome, cell=cell, truncated=False)
        return total

    def _cell(self, ids: Sequence[int]) -> PlannedCell:
        """The method's, or that of the full cache where the budget is not below the prompt."""
        if self.fitted_on and token_sha256(ids) in self.fitted_on:
            raise HarnessError(f"method {self.planned.method} was fitted on one of these prompts; leave that task out")
        budget = self.planned.cell.budget
        return self.full if budget is not None and budget.resolve(len(ids)) >= len(ids) else self.planned

    def _note(
        self, task: str, text: str, ids: Sequence[int], outcome: Outcome, *, cell: PlannedCell, truncated: bool
    ) -> None:
        if outcome.status != "ok":
            why = f"lm-eval task {task}: a prompt of {len(ids)} tokens: {outcome.status}: {outcome.error}"
            raise HarnessError(f"{why}; with --use_cache what is answered is not lost")
        self.facts.add(task, text, ids, outcome, compressed=cell is self.planned, truncated=truncated)

    def _cut(self, ids: Sequence[int], room: int) -> list[int]:
        return list(ids) if len(ids) <= room else list(truncate_tokens(list(ids), room, self.side))

    def _fitted(self, pair: ScoredPair) -> ScoredPair:
        """With room for the continuation but its last token, which is never fed."""
        if not pair.continuation:
            raise HarnessError(
                f"lm-eval task {pair.task}: a continuation is empty, or merges into its context's last token, so that "
                f"nothing is left to score; the context ends in {shown(pair.text[-20:])}: leave that task out"
            )
        room = self.max_length + 1 - len(pair.continuation)
        if room < 1:
            what = f"a continuation of {len(pair.continuation)} tokens"
            raise HarnessError(
                f"lm-eval task {pair.task}: {what} does not fit into max_length {self.max_length}; raise it"
            )
        ids = tuple(self._cut(pair.context, room))
        return pair._replace(context=ids, truncated=len(ids) < len(pair.context))


@contextmanager
def _one_line(task: str) -> Iterator[None]:
    """What torch raises while it scores, memory above all, as one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise HarnessError(f"lm-eval task {task}: {why}; with --use_cache what is answered is not lost") from error
