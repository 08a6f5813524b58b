"""`harness.attached`: a transformers model whose own `generate` compresses its cache after the prompt.

Inside the context, `generate` prefills every prompt with the full cache, lets the policy compress it and decodes on
what is left, through the same prefill, policies and layer caches as `harness.engine.engine`: greedy tokens are the
engine's. Rows of a batch go through one by one, each at its own length and on caches of its own, left padding taken
off. Sampling, stopping criteria and streamers are those of transformers. Any other call of the model inside the context
is the plain model.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from harness.engine.compress import compress
from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError, checked
from harness.generate.asked import Arguments, refuse, rows_of
from harness.models.wording import Wording, wording
from harness.plan.methods import plan_method
from harness.plan.names import refusals
from harness.records.spec import FirstToken
from methods.base import Budget, KVPolicy
from methods.fullkv import FullKV

TAKEN = "kv_policy_method"  # attribute of a model in such a context: by which method
TEXT = {"input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "token_type_ids"}


@dataclass(frozen=True)
class RowReport:
    """What compression left of one prompt of a batch.

    budget_tokens: slots asked for per layer and KV head, None for a method that keeps everything. kept_slots: live
    slots of every compressible layer, summed over its KV heads. kv_bytes, stored_bytes: live and allocated after
    compression, all layers; full_bytes: before; state_bytes: how many of each are states of layers without keys and
    values. notes: what the method says of this budget.
    """

    prompt_tokens: int
    budget_tokens: int | None
    kept_slots: tuple[int, ...]
    kv_bytes: int
    stored_bytes: int
    full_bytes: int
    state_bytes: int
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
    def stored_bytes(self) -> int:
        return sum(row.stored_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        return sum(row.full_bytes for row in self.rows)


class Handle(Cache):
    """What `generate` carries from step to step: the compressed rows.

    columns: of `input_ids` seen so far. mask: of them, [R, columns] bool, where there is one.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: Sequence[Decoding] = ()
        self.columns = 0
        self.mask: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise HarnessError("rows of a compressed cache cannot change places; generate without beams")

    def crop(self, max_length: int, *args: Any) -> None:
        raise HarnessError("a compressed cache cannot be cut back; generate without an assistant")


class Compressor:
    """A policy at a budget in the place of a model's forward, and what it left of the last batch."""

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
            ids, mask = kwargs["input_ids"] if not args else args[0], kwargs.get("attention_mask")
            with torch.inference_mode(), refusals():
                logits = self._step(whole, handle, rows_of(ids, mask, handle.mask))
            handle.columns += ids.shape[1]
            handle.mask = None if mask is None else mask.bool()
            return CausalLMOutputWithPast(logits=logits.clone().unsqueeze(1), past_key_values=handle)

        return forward

    def _step(self, whole: AttachedModel, handle: Handle, rows: Sequence[list[int]]) -> Tensor:
        """Logits [R, V] float32 after the new tokens of each row."""
        if handle.rows:
            return torch.cat([decoding.feed(row) for decoding, row in zip(handle.rows, rows, strict=True)])
        started = [self._start(whole, row) for row in rows]
        handle.rows, logits, self.report.rows = zip(*started, strict=True)
        return torch.cat(logits)

    def _start(self, whole: AttachedModel, ids: list[int]) -> tuple[Decoding, Tensor, RowReport]:
        """Prefill one prompt and compress it; one within its budget is kept whole, unless its books begin with it."""
        prefilled, tokens, policy = prefill(whole, ids, self.policy.needs), len(ids), self.policy
        asked = None if self.budget is None else self.budget.resolve(tokens)
        if asked is not None and asked >= tokens and not policy.evicts_while_decoding:
            policy = FullKV()
        left = compress(prefilled, policy, tokens if asked is None else asked)
        notes = () if asked is None else self.policy.notes(asked, prefilled.view.sizes)
        sizes = (left.kv_bytes, left.stored_bytes, left.full_bytes, left.state_bytes)
        report = RowReport(tokens, asked, left.kept_slots, *sizes, notes)
        again = self.first_token == "compressed"
        decoding = Decoding.of(whole, [left], again=again, release=True)
        return decoding, decoding.feed(ids[-1:] if again else []), report


@contextmanager
def attached(
    model: PreTrainedModel,
    *,
    method: str,
    budget: int | float | str | None = None,
    first_token: FirstToken = "compressed",
    params: Mapping[str, Any] | None = None,
    revision: str = "unknown",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[CacheReport]:
    """Let `model.generate` decode on a compressed cache while the context lasts.

    >>> import torch
    >>> from harness import attached
    >>> from harness.models import load_model
    >>> loaded = load_model("tiny", dtype="float32", device="cpu")
    >>> ids = loaded.tokenizer("The quick brown fox jumps over the lazy dog. " * 4, return_tensors="pt").input_ids
    >>> with attached(loaded.model, method="snapkv", budget=48) as report:
    ...     out = loaded.model.generate(ids, max_new_tokens=5, do_sample=False)
    >>> out.shape[1] - ids.shape[1], report.rows[0].prompt_tokens, report.rows[0].kept_slots
    (5, 181, (96, 96, 96, 96))
    >>> report.stored_bytes == report.kv_bytes < report.full_bytes * 0.28
    True

    Args:
        model: a causal language model of transformers whose attention goes through its `AttentionInterface`.
        method: `name` or `name@preset`, as `harness list methods` shows them.
        budget: slots per layer and KV head: tokens (512), or a fraction of the prompt (0.25, "25%"). A method that
            keeps everything takes none. A prompt that is no longer than its budget is kept whole, but for the books
            of a method that evicts while decoding, which cost slots (h2o@paper).
        first_token: where the first generated token comes from. `compressed`: the prompt's last token is fed again,
            to the compressed cache, as in the harness's runs. `prefill`: from the logits of the full prompt.
        params: parameters of the method that are changed, such as {"kernel": 5}.
        revision: of the model (`LoadedModel.spec.revision`), by which compilerkv finds its tables. A method that wants
            tables and has none for this model warns.
        tokenizer: of the model, for methods that have the prompt repeated in words (kvzip).

    Yields:
        What the last `generate` kept, row by row.

    Raises:
        HarnessError: an argument of another type or value; a model whose attention cannot be replaced, or that is in
            such a context already; inside, a `generate` that needs another cache (beams, an assistant, a static cache)
            or positions of its own, a mask with holes or right padding, logits that are not finite. The model is as
            before on every way out.
    """
    if not isinstance(model, PreTrainedModel):
        raise HarnessError(f"{type(model).__name__} is no transformers model; give one, a peft model after its merge")
    if not model.can_generate():
        raise HarnessError(f"{type(model).__name__} does not generate; give a model with a language head")
    taken = vars(model).get(TAKEN)
    if taken is not None:
        raise HarnessError(f"this model is attached to {taken} already; leave that context before another")
    given = {"method": method, "budget": budget, "first_token": first_token, "params": params, "revision": revision}
    asked = checked(Arguments, given)
    spec, policy = plan_method(asked.method, asked.params, revision=asked.revision)
    label = spec.label
    if policy.budgeted and asked.budget is None:
        raise HarnessError(f"method {label} needs a budget, got None; give tokens (512) or a fraction (0.25)")
    if policy.lacks:
        advice = "give revision=loaded.spec.revision of a model that has them, or make some with `harness compile`"
        warnings.warn(f"{label}: {policy.lacks}; {advice}", stacklevel=3)
    compressor = Compressor(label, policy, asked.budget if policy.budgeted else None, asked.first_token)
    told = None if tokenizer is None else wording(tokenizer)
    with _replaced_attention(model, told) as whole:
        Engine(whole).check([policy], [0] * 8)
    plain: Any = model.generate

    @wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        refuse(model, args, kwargs, Handle)
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = Handle()
        with _replaced_attention(model, told) as whole, _replaced(model, "forward", compressor.forward(whole)):
            return plain(*args, **kwargs)

    with _replaced(model, "generate", generate), _replaced(model, TAKEN, label):
        yield compressor.report


@contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an instance, as it was afterwards (accelerate sets a `forward` of its own there, too)."""
    own = vars(thing)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        own.pop(name, None)
        own |= before


@contextmanager
def _replaced_attention(model: PreTrainedModel, told: Wording | None) -> Iterator[AttachedModel]:
    """The model on layer caches; its attention and its output layer's hooks are as before afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    chosen = [(config, config._attn_implementation) for config in configs.values()]
    head = model.get_output_embeddings()
    hooks = {} if head is None else head._forward_pre_hooks
    before = set(hooks)
    try:
        whole = AttachedModel(model, told)
        try:
            yield whole
        finally:
            whole.forget_lengths()
    finally:
        for config, implementation in chosen:
            config._attn_implementation = implementation
        for key in set(hooks) - before:
            del hooks[key]
