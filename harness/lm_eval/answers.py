"""Answers to lm-eval's requests, from token ids on: what is truncated, compressed, generated, scored and noted."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

from lm_eval.models.utils import postprocess_generated_text, truncate_tokens

from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Limits, Outcome, Prompt
from harness.errors import HarnessError
from harness.lm_eval.kept_facts import KeptFacts
from harness.lm_eval.requests import Generation
from harness.lm_eval.scoring import ScoringEngine, border
from harness.models.load import LoadedModel
from harness.models.prompt import token_sha256
from harness.plan.methods import plan_method
from harness.plan.sweep import PlannedCell, plan_cells

SIDES = ("left", "middle", "right")


class ScoredPair(NamedTuple):
    """A continuation to score after a context of at least one token. text: the context as lm-eval gave it."""

    place: int
    task: str
    text: str
    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: bool = False


class Answerer:
    """Runs prompts of one model under one cell, one at a time.

    max_length: tokens of prompt and answer together. side: which end of a longer prompt goes.
    """

    def __init__(self, loaded: LoadedModel, planned: PlannedCell, *, max_length: int | None, side: str) -> None:
        if side not in SIDES:
            raise HarnessError(f"truncation_side {side!r} is unknown; give {', '.join(SIDES)}")
        if max_length is not None and max_length < 2:
            raise HarnessError(f"max_length {max_length} is too small; give at least 2")
        self.loaded, self.planned, self.side = loaded, planned, side
        self.max_length = max_length or loaded.context
        (self.full,) = plan_cells([plan_method("fullkv")], ())  # of a prompt that is no longer than its budget
        self.fitted_on = planned.cell.policy.fitted_on()
        self.engine = ScoringEngine(AttachedModel(loaded.model))
        self.engine.check([planned.cell.policy], list(range(8)))
        self.facts = KeptFacts(heads=self.engine.model.sizes(8).kv_heads, budget=planned.budget)

    def generate(self, task: str, text: str, whole: Sequence[int], asked: Generation) -> str:
        """Return greedy text after the prompt `whole`, cut at the first stop string."""
        room = self.max_length - asked.max_new_tokens
        if room < 1:
            limit = f"{self.max_length} tokens"
            raise HarnessError(f"max_gen_toks {asked.max_new_tokens} leaves no room for a prompt in {limit}; lower it")
        ids, tokenizer = self._cut(whole, room), self.loaded.tokenizer
        limits = Limits(
            max_new_tokens=asked.max_new_tokens,
            eos_ids=self.loaded.eos_ids,
            min_new_tokens=asked.min_new_tokens,
            stop=asked.until,
            text=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False)),
        )
        cell = self._cell(ids)
        outcome = self.engine.run(Prompt(ids, len(ids), (), limits), [cell.cell])[0]
        self._note(task, text, ids, outcome, cell=cell, truncated=len(ids) < len(whole))
        generated = str(tokenizer.decode(list(outcome.token_ids), skip_special_tokens=True))
        return str(postprocess_generated_text(generated, list(asked.until), None))

    def score(self, pairs: Iterable[ScoredPair]) -> Iterator[list[tuple[ScoredPair, float, bool]]]:
        """Yield, a context at a time, each continuation's log-probability in nats and whether greedy decoding gives it.

        Contexts come in order of their tokens, each once.
        """
        fitted = sorted(map(self._fitted, pairs), key=lambda pair: (-len(pair.context), pair.context, pair.place))
        for context, group in groupby(fitted, key=lambda pair: pair.context):
            own, ids = list(group), list(context)
            cell = self._cell(ids)
            with _one_line(own[0].task):
                outcome, scored = self.engine.score(ids, cell.cell, [pair.continuation for pair in own])
            for pair in {(pair.task, pair.text): pair for pair in own}.values():
                self._note(pair.task, pair.text, ids, outcome, cell=cell, truncated=pair.truncated)
            yield [(pair, one.logprob, one.greedy) for pair, one in zip(own, scored, strict=True)]

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
        """The method's, or that of the full cache where the budget is not below the prompt.

        Raises HarnessError for a prompt that the method was fitted on.
        """
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
