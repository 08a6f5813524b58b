"""`harness.attached`: a transformers model whose own `generate` compresses its cache after the prompt.

Inside the context, `generate` prefills every prompt with the full cache, lets the policy compress it and decodes on
what is left, through the same prefill, policies and layer caches as `harness.engine.engine`: greedy tokens are the
engine's. Rows of a batch go through one by one, each at its own length, left padding taken off. Sampling, stopping
criteria and streamers are those of transformers. Any other call of the model inside the context is the plain model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.generate.forward import CacheReport, Compressor, Handle
from harness.plan.methods import plan_budget, plan_method
from harness.records.spec import FirstToken
from methods.base import Budget, KVPolicy

TAKEN = "kv_policy_method"  # attribute of a model in such a context: by which method
ALLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "use_cache": (None, True),
    "guidance_scale": (None, 1, 1.0),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "cache_implementation": (None, "dynamic"),
    "custom_generate": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_model": (None,),
    "inputs_embeds": (None,),
}
"""Options of `generate` that need the whole cache, or a cache of their own, with the values that do not."""


@contextmanager
def attached(
    model: PreTrainedModel,
    *,
    method: str,
    budget: int | float | str | None = None,
    first_token: FirstToken = "compressed",
    params: Mapping[str, Any] | None = None,
    revision: str = "unknown",
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
    >>> report.kv_bytes / report.full_bytes == 48 / 181
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
        revision: of the model (`LoadedModel.spec.revision`), by which compilerkv finds its tables.

    Yields:
        What the last `generate` kept, row by row.

    Raises:
        HarnessError: an unknown method, parameter or budget; a model whose attention cannot be replaced, or that is in
            such a context already; inside, a `generate` that needs another cache (beams, an assistant, a static cache).
            The model is as before on every way out.
    """
    if not isinstance(model, PreTrainedModel):
        raise HarnessError(f"{type(model).__name__} is no transformers model; give one, a peft model after its merge")
    taken = vars(model).get(TAKEN)
    if taken is not None:
        raise HarnessError(f"this model is attached to {taken} already; leave that context before another")
    spec, policy = plan_method(method, params, revision=revision)
    label = spec.label
    compressor = Compressor(label, policy, _budget(label, policy, budget), first_token)
    with _replaced_attention(model) as whole:
        Engine(whole).check([policy], [0] * 8)
    plain: Any = model.generate

    @wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        _refuse(model, args, kwargs)
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = Handle()
        with _replaced_attention(model) as whole, _replaced(model, "forward", compressor.forward(whole)):
            return plain(*args, **kwargs)

    with _replaced(model, "generate", generate), _replaced(model, TAKEN, label):
        yield compressor.report


def _budget(label: str, policy: KVPolicy, budget: int | float | str | None) -> Budget | None:
    if not policy.budgeted:
        return None
    if budget is None or isinstance(budget, bool):
        raise HarnessError(f"method {label} needs a budget, got {budget}; give tokens (512) or a fraction (0.25)")
    return plan_budget(budget)


def _refuse(model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise HarnessError for a `generate` whose options need another cache."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    for name, allowed in ALLOWED.items():
        value = kwargs.get(name, getattr(config, name, None))
        if value not in allowed:
            shown = value if isinstance(value, str | int | float) else type(value).__name__
            raise HarnessError(f"generate({name}={shown}) does not work on a compressed cache; leave {name} out")
    cache = kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, Handle):
        raise HarnessError(f"generate(past_key_values={type(cache).__name__}) is not compressed; leave it out")


@contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an instance, as it was afterwards (accelerate sets a `forward` of its own there, too)."""
    own = vars(thing)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            own.pop(name, None)
        else:
            own[name] = before


@contextmanager
def _replaced_attention(model: PreTrainedModel) -> Iterator[AttachedModel]:
    """The model on layer caches; its attention and its output layer's hooks are as before afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    chosen = [(config, config._attn_implementation) for config in configs.values()]
    head = model.get_output_embeddings()
    hooks = None if head is None else dict(head._forward_pre_hooks)
    try:
        yield AttachedModel(model)
    finally:
        for config, implementation in chosen:
            config._attn_implementation = implementation
        if head is not None and hooks is not None:
            for key in [key for key in head._forward_pre_hooks if key not in hooks]:
                del head._forward_pre_hooks[key]
