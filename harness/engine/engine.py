"""Prefill once, compress for every (method, budget), decode all those rows together, measure bytes.

Prefill hidden states do not depend on a policy that acts after prefill, so one prefill serves every cell of a prompt;
a cell run alone gives the same tokens. First token `compressed`: observe and compress with the whole prompt, so that
the last token's query still votes, then drop the last token's own slot and feed it again at its true position. A method
that gave that slot up anyway (compilerkv, h2o@kvpress) so decodes with one slot more than it left, as every method does
after the first decoded token; `kv_bytes` is what it left, `kv_bytes_end` counts everything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from harness.engine.decode import CPU_ROWS_AT_ONCE, Session
from harness.engine.evicting_cache import EvictingLayer, EvictingRow, with_room
from harness.engine.row_cache import PrefillLayer, RowsLayer, without
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Outcome, Prompt, SkippedCell
from harness.errors import HarnessError
from harness.records.record import Status
from harness.records.spec import FirstToken, QueryMode
from methods.base import KV, KVPolicy, LayerView, Needs, PolicyError, PromptView
from methods.views import LayerSource

ROWS_AT_ONCE = CPU_ROWS_AT_ONCE  # rows of one decode batch


@dataclass
class Prefilled:
    """A prompt in the uncompressed cache. logits: [1, V] after its last token."""

    layers: list[PrefillLayer]
    view: PromptView
    logits: Tensor
    tokens: int
    seconds: float

    @property
    def full_bytes(self) -> int:
        return sum(layer.kv().nbytes for layer in self.layers)

    def asked_bytes(self, budget: int) -> int:
        """Bytes of `budget` slots per layer and KV head, sliding-window layers at their own size."""
        total = 0
        for layer in self.layers:
            kv = layer.kv()
            slots = kv.positions.shape[2] if layer.window is not None else min(budget, self.tokens)
            total += kv.nbytes // kv.positions.shape[2] * slots
        return total


@dataclass
class Row:
    """A compressed cell on its way to decoding. kvs: one per model layer, sliding-window layers included."""

    cell: Cell
    outcome: Outcome
    kvs: list[KV] = field(default_factory=list)


class Engine:
    """Runs prompts through a model under many policies.

    Args:
        model: the model, attached.
        query: whether a policy sees the question (`aware`) or the context only (`agnostic`).
        first_token: whether the first generated token comes from the compressed cache or from the prefill.
        rows: most that are decoded together; a row's tokens do not depend on it.
    """

    def __init__(
        self,
        model: AttachedModel,
        *,
        query: QueryMode = "aware",
        first_token: FirstToken = "compressed",
        rows: int = ROWS_AT_ONCE,
    ) -> None:
        self.model, self.query, self.first_token, self.rows = model, query, first_token, rows

    def run(self, prompt: Prompt, cells: Sequence[Cell]) -> list[Outcome]:
        """One outcome per cell, in order. A cell that fails or runs out of memory is marked; the others go on."""
        return self.run_group([prompt], [cells])[0]

    def run_group(self, prompts: Sequence[Prompt], cells: Sequence[Sequence[Cell]]) -> list[list[Outcome]]:
        """The outcomes of several prompts: questions over one context, which is compressed once for all of them.

        cells: those of each prompt. Raises HarnessError when the prompts differ in what is compressed.
        """
        border = prompts[0].context if self.query == "agnostic" else len(prompts[0].ids)
        head = list(prompts[0].ids[:border])
        if any(list(prompt.ids[:border]) != head for prompt in prompts):
            raise HarnessError(f"{len(prompts)} prompts of one group differ in their first {border} tokens")
        wanted = dict.fromkeys(cell for own in cells for cell in own)
        compressed, prefilled = self._compressed([Row(cell, Outcome()) for cell in wanted], head)
        results = []
        for prompt, own in zip(prompts, cells, strict=True):
            rows = [Row(cell, replace(compressed[cell].outcome), compressed[cell].kvs) for cell in own]
            if prefilled is not None:
                self._answer(rows, prompt, prefilled)
            results.append([row.outcome for row in rows])
        return results

    def _compressed(self, rows: list[Row], head: Sequence[int]) -> tuple[dict[Cell, Row], Prefilled | None]:
        """`rows` by cell, each compressed or marked, and what they were compressed from: None when nothing was."""
        done = {row.cell: row for row in rows}
        if not head:
            for row in rows:
                row.outcome.fail("skipped", "the context has no tokens")
            return done, None
        needs = reduce(Needs.__or__, (row.cell.policy.needs for row in rows), Needs())
        try:
            prefilled = self.prefill(head, needs)
        except (RuntimeError, MemoryError) as error:
            for row in rows:
                row.outcome.fail(_status(error), error)
            return done, None
        for row in rows:
            try:
                self._compress(row, prefilled)
            except SkippedCell as error:
                row.outcome.fail("skipped", error)
            except Exception as error:  # a policy is foreign code: whatever it raises is its own cell's
                row.outcome.fail(_status(error), error)
        return done, prefilled

    def _answer(self, rows: Sequence[Row], prompt: Prompt, prefilled: Prefilled) -> None:
        """Decode one prompt under every row that was compressed."""
        tail = list(prompt.ids[prefilled.tokens :])
        ready = [row for row in rows if row.outcome.status == "ok"]
        for row in ready:
            row.outcome.needle_kept = _kept(row.kvs, prefilled, prompt.needle)
            if self.query == "agnostic" and not tail:
                row.outcome.fail("skipped", f"no question after the {prefilled.tokens} tokens of the context")
        ready = [row for row in ready if row.outcome.status == "ok"]
        for evicting in (False, True):
            batch = [row for row in ready if row.cell.policy.evicts_while_decoding is evicting]
            for i in range(0, len(batch), self.rows):
                self._decode(batch[i : i + self.rows], prompt, prefilled, tail=tail)

    def prefill(self, ids: Sequence[int], needs: Needs) -> Prefilled:
        """Run the prompt once with the full cache, gathering what `needs` asks for."""
        start = time.perf_counter()
        layers = [PrefillLayer(needs, len(ids)) for _ in range(self.model.layers)]
        keep = min(len(ids), needs.window + 1) if needs.logprobs else 1
        tokens = torch.tensor([list(ids)], device=self.model.device)
        with self.model.sources(needs.hidden_states) as found:
            logits = self.model.forward(tokens, layers, position=0, keep=keep).float()
        sources: Sequence[LayerSource | None] = found or [None] * len(layers)
        logprobs = None
        if needs.logprobs:
            own = tokens[:, 1 - keep :] if keep > 1 else tokens[:, :0]
            logprobs = logits[:, :-1].log_softmax(dim=-1).gather(2, own.unsqueeze(-1)).squeeze(-1)
        views = [
            LayerView(i, layer.kv(), layer.queries, layer.scaling, layer.sums, self.model.rotate, source)
            for i, (layer, source) in enumerate(zip(layers, sources, strict=True))
            if layer.window is None
        ]
        if not views:
            raise HarnessError("every layer of this model has a sliding window; there is nothing to compress")
        _synchronize(self.model.device)
        return Prefilled(layers, PromptView(views, logprobs), logits[:, -1], len(ids), time.perf_counter() - start)

    def check(self, policies: Sequence[KVPolicy], ids: Sequence[int]) -> None:
        """Let every policy refuse this model before the first prompt, by a view of a few tokens.

        Raises HarnessError with the first refusal.
        """
        view = self.prefill(list(ids[:8]), Needs(window=1)).view
        for policy in policies:
            try:
                policy.check(view)
            except PolicyError as error:
                raise HarnessError(str(error)) from None

    def _compress(self, row: Row, prefilled: Prefilled) -> None:
        cell, outcome = row.cell, row.outcome
        tokens, layers = prefilled.tokens, len(prefilled.view.layers)
        budget = tokens if cell.budget is None else cell.budget.resolve(tokens)
        outcome.prefill_s, outcome.compressed_tokens = prefilled.seconds, tokens
        outcome.full_bytes = prefilled.full_bytes
        if cell.budget is not None:
            outcome.budget_tokens = budget
            if budget >= tokens:
                raise SkippedCell(f"budget {budget} is not below the prompt's {tokens} tokens; nothing to compress")
            outcome.notes = cell.policy.notes(budget, tokens, layers)
        start = time.perf_counter()
        with torch.inference_mode():
            kept = cell.policy.compress(prefilled.view, budget)
        if len(kept) != layers:
            name = type(cell.policy).__name__
            raise PolicyError(f"{name} left {len(kept)} layers of {layers}; return one KV a layer")
        _synchronize(self.model.device)
        outcome.compress_s = time.perf_counter() - start
        compressed = iter(kept)
        row.kvs = [layer.kv() if layer.window is not None else next(compressed) for layer in prefilled.layers]
        outcome.kept_slots = tuple(int(kv.live.sum()) for kv in kept)
        outcome.kv_bytes = sum(kv.nbytes for kv in row.kvs)
        outcome.asked_bytes = prefilled.asked_bytes(budget)
        outcome.over_budget = outcome.kv_bytes > 1.01 * outcome.asked_bytes

    def _decode(self, rows: list[Row], prompt: Prompt, prefilled: Prefilled, *, tail: list[int]) -> None:
        """Decode `rows` as one batch; a batch that does not fit in memory is halved until single rows are marked."""
        if not rows:
            return
        try:
            self._decode_batch(rows, prompt, prefilled, tail=tail)
            return
        except Exception as error:  # `after_step` is foreign code too
            if len(rows) == 1:
                rows[0].outcome.fail(_status(error), error)
                return
        middle = len(rows) // 2  # out here the error is gone, and with it the tensors its frames held
        self._decode(rows[:middle], prompt, prefilled, tail=tail)
        self._decode(rows[middle:], prompt, prefilled, tail=tail)

    def _decode_batch(self, rows: list[Row], prompt: Prompt, prefilled: Prefilled, *, tail: list[int]) -> None:
        start = time.perf_counter()
        feed, position = tail, prefilled.tokens
        if self.query == "aware" and self.first_token == "compressed":
            feed, position = [prompt.ids[-1]], prefilled.tokens - 1
        room = len(feed) + max(len(prompt.answer), prompt.limits.max_new_tokens)
        with torch.inference_mode():
            session = self._session(rows, prefilled, position=position, room=room)
            logits = session.feed(feed) if feed else prefilled.logits.expand(len(rows), -1).clone()
            nll = session.answer_nll(logits, prompt.answer) if prompt.answer else None
            results = session.greedy(logits, prompt.limits)
        _synchronize(self.model.device)
        seconds = time.perf_counter() - start
        for i, (row, result) in enumerate(zip(rows, results, strict=True)):
            row.outcome.token_ids = tuple(result.tokens)
            row.outcome.kv_bytes_end = result.kv_bytes_end
            row.outcome.nll_per_token = () if nll is None else tuple(nll[i].tolist())
            row.outcome.decode_s, row.outcome.decode_rows = seconds, len(rows)
            if not all(map(math.isfinite, row.outcome.nll_per_token)):
                row.outcome.fail("failed", "the answer's log-likelihood is not a finite number; try --dtype float32")

    def _session(self, rows: list[Row], prefilled: Prefilled, *, position: int, room: int) -> Session:
        """Layer caches of `rows`, without the slot of any token at or after `position`."""
        held = [[without(kv, position) for kv in row.kvs] for row in rows]
        if rows[0].cell.policy.evicts_while_decoding:
            layers = []
            for i, layer in enumerate(prefilled.layers):
                free = 1 if layer.window is None else room
                evicting = [_evicting(row, i, kvs[i], free=free) for row, kvs in zip(rows, held, strict=True)]
                layers.append(EvictingLayer(evicting, position))
            return Session(self.model, layers, len(rows))
        grown = [RowsLayer([kvs[i] for kvs in held], position=position, room=room) for i in range(self.model.layers)]
        return Session(self.model, grown, len(rows))


def _evicting(row: Row, layer: int, kv: KV, *, free: int) -> EvictingRow:
    """What a row holds of a layer, `kv`, with `free` slots more than its policy left there."""
    slots = row.kvs[layer].positions.shape[2]
    return EvictingRow(row.cell.policy, row.outcome.budget_tokens or slots, with_room(kv, slots + free))


def _kept(kvs: Sequence[KV], prefilled: Prefilled, needle: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Needle tokens that each compressible layer and KV head holds; empty without a needle."""
    if not needle:
        return ()
    wanted = torch.tensor(needle, device=kvs[0].positions.device)
    own = [kv for kv, layer in zip(kvs, prefilled.layers, strict=True) if layer.window is None]
    return tuple(tuple(torch.isin(kv.positions[0], wanted).sum(dim=-1).tolist()) for kv in own)


def _status(error: BaseException) -> Status:
    """`oom` for the ways in which Python, the CPU allocator and CUDA say so, else `failed`."""
    text = str(error)
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    return "oom" if memory else "failed"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
