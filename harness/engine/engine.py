"""The benchmark's way through a prompt: prefill once, compress for every cell, decode all of them together.

Prefill hidden states do not depend on a policy that acts after prefill, so one prefill serves every cell of a prompt;
a cell run alone gives the same tokens. First token `compressed`: observe and compress with the whole prompt, so that
the last token's query still votes, then drop the last token's own slot and feed it again at its true position. A method
that gave that slot up anyway (compilerkv, h2o@kvpress) so decodes with one slot more than it left, as every method does
after the first decoded token; `kv_bytes` is what it left, `kv_bytes_end` counts everything.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import get_args

import torch

from harness.engine import gpu
from harness.engine.again import Noted, note, why_not
from harness.engine.compress import Compressed, compress, distinct
from harness.engine.decode import CPU_ROWS_AT_ONCE, Decoding, Generated
from harness.engine.prefill import Prefilled, prefill
from harness.engine.repeat import UNWORDED
from harness.engine.transformers_seam import AttachedModel
from harness.engine.turns import Again, beside, converse, joined, room_of
from harness.engine.types import Cell, NotFinite, Outcome, Prompt, PromptFailed, SkippedCell
from harness.errors import HarnessError, shown
from harness.records.record import OVER
from harness.records.spec import FirstToken, QueryMode
from methods.base import KVPolicy, Needs, PolicyError


@dataclass
class CellRun:
    """A cell on its way through one prompt.

    compressed: None until it is, and where the outcome says why not. noted: what it takes to compress it again; None
    where that is not wanted.
    """

    cell: Cell
    outcome: Outcome
    compressed: Compressed | None = None
    noted: list[Noted] | None = None


class Engine:
    """Runs prompts through a model under many policies.

    query: whether a policy sees the question (`aware`) or the context only (`agnostic`). first_token: whether the first
    generated token comes from the compressed cache or from the prefill. rows: most that are decoded together. On a CPU
    a row's tokens do not depend on it; a GPU's kernels are chosen by the batch's shape, so there they may, by rounding.
    """

    def __init__(
        self,
        model: AttachedModel,
        *,
        query: QueryMode = "aware",
        first_token: FirstToken = "compressed",
        rows: int = CPU_ROWS_AT_ONCE,
    ) -> None:
        for name, value, known in (("query", query, QueryMode), ("first_token", first_token, FirstToken)):
            if value not in get_args(known):
                raise HarnessError(f"{name} {shown(value)} is unknown; give {' or '.join(get_args(known))}")
        self.model, self.query, self.rows = model, query, rows
        self.again = query == "aware" and first_token == "compressed"  # the last prompt token is fed again
        self.prefills = 0  # prompts that went through the model

    def run(self, prompt: Prompt, cells: Sequence[Cell]) -> list[Outcome]:
        """One outcome per cell, in order. A cell that fails or runs out of memory is marked; the others go on."""
        return self.run_group([prompt], [cells])[0]

    def run_group(self, prompts: Sequence[Prompt], cells: Sequence[Sequence[Cell]]) -> list[list[Outcome]]:
        """The outcomes of several prompts: questions over one context, which is compressed once for all of them.

        cells: those of each prompt. Raises HarnessError when the prompts differ in what is compressed.
        """
        border, done = self.compress_group(prompts, cells)
        results = []
        for prompt, own in zip(prompts, cells, strict=True):
            runs = [replace(done[cell], outcome=replace(done[cell].outcome)) for cell in own]
            self.answer(runs, prompt, tail=list(prompt.ids[border:]))
            results.append([run.outcome for run in runs])
        return results

    def compress_group(
        self, prompts: Sequence[Prompt], cells: Sequence[Sequence[Cell]]
    ) -> tuple[int, dict[Cell, CellRun]]:
        """What `run_group` compresses of its prompts: how many tokens, and every cell, compressed or marked."""
        border = prompts[0].context if self.query == "agnostic" else len(prompts[0].ids)
        head = list(prompts[0].ids[:border])
        marked = [tuple(at for at in prompt.protected if at < border) for prompt in prompts]
        if any(list(prompt.ids[:border]) != head for prompt in prompts) or len(set(marked)) > 1:
            raise HarnessError(f"{len(prompts)} prompts of one group differ in their first {border} tokens")
        wanted = list(dict.fromkeys(cell for own in cells for cell in own))
        done, prefilled = self.compress_cells(head, wanted, protected=marked[0])
        if prefilled is not None and prompts[0].again:
            for run in done.values():
                _prepare_again(run, prefilled)
        return border, done  # and the full cache is let go

    def prefill(self, ids: Sequence[int], needs: Needs) -> Prefilled:
        """Run a prompt through the model once with the full cache, gathering what `needs` asks for."""
        self.prefills += 1
        return prefill(self.model, ids, needs)

    def compress_cells(
        self, head: Sequence[int], cells: Sequence[Cell], *, also: Needs | None = None, protected: Sequence[int] = ()
    ) -> tuple[dict[Cell, CellRun], Prefilled | None]:
        """Prefill `head` once and compress it for every cell.

        also: what is to be observed besides what the policies need. protected: as in `Prompt`. Returns every cell, and
        that of every method whose own budget others are given, compressed or marked, and what they were compressed
        from: None when the prompt could not be prefilled.
        """
        givers = [Cell(cell.like.policy, None) for cell in cells if cell.like]  # which say how much others may keep
        runs = {cell: CellRun(cell, Outcome()) for cell in dict.fromkeys([*givers, *cells])}
        try:
            if not head:
                raise SkippedCell("the context has no tokens")
            needs = reduce(Needs.__or__, (cell.policy.needs for cell in runs), also or Needs())
            prefilled = replace(self.prefill(head, needs), protected=tuple(protected))
        except Exception as error:  # the model may be foreign code too
            if isinstance(error, HarnessError) and not isinstance(error, PromptFailed):
                raise  # it cannot run any prompt
            for run in runs.values():
                run.outcome.fail(error)
            return runs, None
        for run in runs.values():
            try:
                _compress(run, prefilled, runs)
            except Exception as error:  # a policy is foreign code: whatever it raises is its own cell's
                run.outcome.fail(error)
        return runs, prefilled

    def check(self, policies: Sequence[KVPolicy], ids: Sequence[int]) -> None:
        """Let every policy refuse this model before the first prompt, by a view of a few tokens.

        Raises HarnessError with the first refusal.
        """
        try:
            view = prefill(self.model, list(ids[:8]), Needs(window=1, module=True)).view
        except PromptFailed:
            return  # each cell will say so, of each prompt
        for policy in policies:
            if self.model.wording is None and any(asked.words for asked in policy.needs.repeat):
                raise HarnessError(f"{type(policy).__name__} has the prompt repeated in words; {UNWORDED}")
            try:
                policy.check(view)
            except PolicyError as error:
                raise HarnessError(str(error)) from None

    def answer(self, runs: Sequence[CellRun], prompt: Prompt, *, tail: list[int]) -> None:
        """Decode one prompt under every cell that was compressed. tail: its tokens after what was compressed."""
        ready, on_gpu = defaultdict[tuple[bool, ...], list[CellRun]](list), gpu.is_gpu(self.model.device)
        for run in runs:
            if run.compressed is None:
                continue
            run.outcome.needle_kept = run.compressed.needle_kept(prompt.needle)
            if self.query == "agnostic" and not tail:
                run.outcome.fail(f"no question after the {run.compressed.tokens} tokens of the context", "skipped")
            else:
                policy, apart = run.cell.policy, on_gpu and not run.compressed.one_buffer
                ready[policy.evicts_while_decoding, policy.reads_a_part, apart].append(run)  # how caches are read
        for batch in ready.values():
            rows = 1 if prompt.turns else self.rows
            for i in range(0, len(batch), rows):
                self._decode(batch[i : i + rows], prompt, [prompt.ids[-1]] if self.again else tail)

    def _decode(self, runs: list[CellRun], prompt: Prompt, feed: list[int]) -> None:
        """Decode `runs` as one batch; a batch that does not fit in memory is halved until single rows are marked."""
        try:
            self._decode_batch(runs, prompt, feed)
            return
        except Exception as error:  # `after_step` is foreign code too
            if len(runs) == 1:
                runs[0].outcome.fail(error)
                return
        middle = len(runs) // 2  # out here the error is gone, and with it the tensors its frames held
        self._decode(runs[:middle], prompt, feed)
        self._decode(runs[middle:], prompt, feed)

    def _decode_batch(self, runs: list[CellRun], prompt: Prompt, feed: list[int]) -> None:
        """Decode `runs` together, equal caches once."""
        start = time.perf_counter()
        room = len(feed) + max(len(prompt.answer), prompt.limits.max_new_tokens)
        room += 0 if runs[0].noted else room_of(prompt.turns)
        self.model.check_ids([*feed, *prompt.answer, *(token for turn in prompt.turns for token in turn.ids)])
        rows, numbers = distinct([run.compressed for run in runs if run.compressed is not None])
        with torch.inference_mode():
            decoding = Decoding.of(self.model, rows, again=self.again, room=room)
            decoding.beside = beside(runs[0].noted or ())
            logits = decoding.feed(feed)
            nll = decoding.answer_nll(logits, prompt.answer).tolist() if prompt.answer else [[]] * len(rows)
            at = decoding.position
            results = decoding.greedy(logits, prompt.limits)  # tells tokens, so a GPU is waited for
            if prompt.turns:
                results = [_go_on(runs[0], decoding, results[0], prompt, feed, at)]
        seconds = time.perf_counter() - start
        for run, row in zip(runs, numbers, strict=True):
            outcome, result, own = run.outcome, results[row], nll[row]
            outcome.token_ids = tuple(result.tokens)
            outcome.kv_bytes_end, outcome.stored_bytes_end = result.kv_bytes_end, result.stored_bytes_end
            outcome.byte_steps, outcome.read_bytes = result.byte_steps, rows[row].reads(result.read)
            outcome.decode_s, outcome.decode_rows = seconds, len(runs)
            if not all(map(math.isfinite, own)):
                outcome.fail(result.flaw or NotFinite("of the reference answer"))
            elif result.flaw:
                outcome.fail(result.flaw)
            else:
                outcome.nll_per_token = tuple(own)


def _compress(run: CellRun, prefilled: Prefilled, runs: Mapping[Cell, CellRun]) -> None:
    """Compress one cell and note what that left. Raises SkippedCell when there is nothing to compress.

    runs: of all cells; methods that find a budget have run before those that are given it.
    """
    cell, outcome, tokens = run.cell, run.outcome, prefilled.tokens
    outcome.compressed_tokens, outcome.full_bytes = tokens, prefilled.nbytes(tokens)
    outcome.prefill_s = prefilled.clock.seconds("prefill")
    outcome.budget_tokens = asked = _asked(cell, prefilled, runs)
    budget = tokens if asked is None else asked
    if asked is not None:
        if asked >= tokens:
            own = f"{cell.like.label}'s budget" if cell.like else "budget"
            raise SkippedCell(f"{own} {asked} is not below the prompt's {tokens} tokens; nothing to compress")
        outcome.notes = cell.policy.notes(budget, prefilled.view.sizes)
    run.compressed = left = compress(prefilled, cell.policy, budget)
    outcome.compress_s, outcome.kept_slots = left.compress_s, left.kept_slots
    outcome.kv_bytes, outcome.stored_bytes = left.kv_bytes, left.stored_bytes
    outcome.asked_bytes = _asked_bytes(cell.policy, left)
    outcome.state_bytes, outcome.method_bytes = left.state_bytes, cell.policy.method_bytes
    outcome.read_bytes = left.read_bytes
    outcome.over_budget = not cell.policy.reads_a_part and outcome.stored_bytes > OVER * outcome.asked_bytes


def _asked_bytes(policy: KVPolicy, left: Compressed) -> int:
    """What a budget allows to be held: that of its slots; all where a budget is of what is read; what is, by none."""
    if policy.reads_a_part:
        return left.full_bytes
    return left.stored_bytes if policy.kind == "own" else left.asked_bytes


def _asked(cell: Cell, prefilled: Prefilled, runs: Mapping[Cell, CellRun]) -> int | None:
    """Slots per layer and KV head that a cell is given; None where its method is given none.

    Raises HarnessError where another method was to find them and failed.
    """
    if cell.like is None:
        return None if cell.budget is None else cell.budget.resolve(prefilled.tokens)
    giver = runs[Cell(cell.like.policy, None)]
    if giver.compressed is None:
        raise HarnessError(f"{cell.like.label} found no budget for this prompt: {giver.outcome.error}")
    return prefilled.least(giver.compressed.stored_bytes)


def _prepare_again(run: CellRun, prefilled: Prefilled) -> None:
    """Note what it takes to compress a cell again, or that it cannot be."""
    cell, left = run.cell, run.compressed
    if left is None or cell.whole:
        return
    if cell.policy.evicts_while_decoding:
        run.outcome.notes += ("it evicts while it decodes: nothing is left to compress again",)
    elif why := why_not(prefilled, left):
        run.outcome.fail(why, "skipped")
        run.compressed = None
    else:
        run.noted = note(prefilled, left)


def _go_on(run: CellRun, decoding: Decoding, first: Generated, prompt: Prompt, given: list[int], at: int) -> Generated:
    """All answers of a conversation, as one, of which the first is given. given, at: as of `converse`."""
    assert run.compressed is not None
    again = None if run.noted is None else Again(run.compressed, run.noted)
    answers = converse(decoding, first, prompt, given, at, again)
    run.outcome.turn_tokens = tuple(len(answer.tokens) for answer in answers)
    run.outcome.notes += tuple(again.over if again else ())
    return joined(answers)
