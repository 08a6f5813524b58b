"""What `harness.attached` puts in the place of a model's forward: prefill, compress, then decode on what is left.

Every row of a batch has caches of its own, so rows may differ in length; they go through the model one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from harness.engine.compress import compress
from harness.engine.decode import Decoding
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.records.spec import FirstToken
from methods.base import Budget, KVPolicy
from methods.fullkv import FullKV

TEXT = {"input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "token_type_ids"}


@dataclass(frozen=True)
class RowReport:
    """What compression left of one prompt of a batch.

    budget_tokens: slots asked for per layer and KV head, None for a method that keeps everything.
    kept_slots: live slots of every compressible layer, summed over its KV heads. kv_bytes, full_bytes: of all layers,
    after and before. notes: what the method says of this budget.
    """

    prompt_tokens: int
    budget_tokens: int | None
    kept_slots: tuple[int, ...]
    kv_bytes: int
    full_bytes: int
    notes: tuple[str, ...] = ()


@dataclass
class CacheReport:
    """What the last `generate` of a context compressed. rows: one per prompt of its batch; empty before the first."""

    method: str
    rows: tuple[RowReport, ...] = ()

    @property
    def kv_bytes(self) -> int:
        return sum(row.kv_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        return sum(row.full_bytes for row in self.rows)


class Handle(Cache):
    """What `generate` carries from step to step: the compressed rows. columns: of `input_ids` seen so far."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: list[Decoding] = []
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise HarnessError("rows of a compressed cache cannot change places; generate without beams")

    def crop(self, max_length: int, *args: Any) -> None:
        raise HarnessError("a compressed cache cannot be cut back; generate without an assistant")


class Compressor:
    """A policy at a budget, and what it left of the last batch."""

    def __init__(self, label: str, policy: KVPolicy, budget: Budget | None, first_token: FirstToken) -> None:
        self.policy, self.budget, self.first_token = policy, budget, first_token
        self.report = CacheReport(label)

    def forward(self, whole: AttachedModel) -> Callable[..., Any]:
        """The model's forward for `generate`: prefill and compress at first, one token a row later."""
        plain = whole.model.forward

        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            handle = kwargs.get("past_key_values")
            if not isinstance(handle, Handle):
                return plain(*args, **kwargs)  # the engine's own, on caches of its own
            given = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in TEXT]
            if given:
                raise HarnessError(f"generate got {', '.join(given)}; compressed caches take input_ids of text alone")
            ids = kwargs["input_ids"] if not args else args[0]
            with torch.inference_mode():
                logits = self._step(whole, handle, _rows(ids, kwargs.get("attention_mask")))
            handle.columns += ids.shape[1]
            return CausalLMOutputWithPast(logits=logits.clone().unsqueeze(1), past_key_values=handle)

        return forward

    def _step(self, whole: AttachedModel, handle: Handle, rows: Sequence[list[int]]) -> Tensor:
        """Logits [R, V] float32 after the new tokens of each row."""
        if handle.rows:
            return torch.cat([decoding.feed(row) for decoding, row in zip(handle.rows, rows, strict=True)])
        started = [self._start(whole, row) for row in rows]
        handle.rows = [decoding for decoding, _, _ in started]
        self.report.rows = tuple(report for _, _, report in started)
        return torch.cat([logits for _, logits, _ in started])

    def _start(self, whole: AttachedModel, ids: list[int]) -> tuple[Decoding, Tensor, RowReport]:
        """Prefill one prompt and compress it; one within its budget is kept whole, unless its books begin with it."""
        prefilled, tokens, policy = prefill(whole, ids, self.policy.needs), len(ids), self.policy
        asked = None if self.budget is None else self.budget.resolve(tokens)
        if asked is not None and asked >= tokens and not policy.evicts_while_decoding:
            policy = FullKV()
        left = compress(prefilled, policy, tokens if asked is None else asked)
        notes = () if asked is None else self.policy.notes(asked, tokens, len(left.compressible))
        report = RowReport(tokens, asked, left.kept_slots, left.kv_bytes, left.full_bytes, notes)
        again = self.first_token == "compressed"
        decoding = Decoding.of(whole, [left], again=again, release=True)
        return decoding, decoding.feed(ids[-1:] if again else []), report


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The new tokens of every row of ids [R, Q], without its left padding. mask: [R, >= Q], 0 at padding."""
    if mask is None:
        return [list(row) for row in ids.tolist()]
    real = mask[:, -ids.shape[1] :].bool()
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise HarnessError("the prompts are padded on the right; tokenize them with padding_side='left'")
    return [row[own].tolist() for row, own in zip(ids, real, strict=True)]
