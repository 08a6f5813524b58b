"""The seam to transformers, and the only file that touches its internals.

A registered attention function hands every layer to a `LayerCache`, which the cache object ties to the tensors it
returns; the cache reports tokens *seen*, so positions and RoPE stay true after eviction. Queries arrive after RoPE,
with no code per model. Works on transformers 5.2 and later for models whose attention goes through
`AttentionInterface`; others are refused.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from harness.engine.layer_cache import LayerCache
from harness.engine.states import States
from harness.engine.transformers_cache import STATES, ModelLayers, shorter
from harness.engine.types import PromptFailed
from harness.errors import HarnessError
from harness.models.wording import Wording
from methods.base import Sizes
from methods.views import Form, LayerSource

ATTENTION = "kv_policy"
ADVICE = "use a model of full, sliding-window or linear attention layers"
KNOWN = {"softcap", "s_aux", "position_ids"}  # arguments; the last is for packed batches alone
SCALED = ("inv_freq", "max_seq_len_cached")  # of dynamic RoPE, changed by a longer text
HALF_ROTATION = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "smollm3", "granite", "olmo2"),
    *("olmo3", "gemma2", "gemma3", "gemma3_text", "gpt_oss"),
}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,  # in the sixth place, where kvpress's wrapper of every registered attention puts it
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cache: LayerCache | None = getattr(key, "layer_cache", None)
    tied = getattr(value, "layer_cache", None) is cache
    if cache is None or not tied:
        raise HarnessError(f"{type(module).__name__} changes keys or values after its cache; this model is unsupported")
    for states in (key, value):
        del states.layer_cache  # type: ignore[attr-defined]  # or a cycle would keep a prompt's KV alive
    _refuse_unknown(module, {"mask": attention_mask, **kwargs})
    span = kwargs.get("sliding_window")
    window = shorter(span, module.config)
    if isinstance(cache, _Probe):
        cache.module, cache.span = module, span
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    sinks = None if sinks is None else sinks.view(1, key.shape[1], -1)
    form = Form(scaling, window, kwargs.get("softcap"), sinks)
    return cache.attend(query, form).transpose(1, 2), None


def _refuse_unknown(module: Any, given: dict[str, Any]) -> None:
    """Refuse attention that sees what follows, and any tensor or number that would change what it computes."""
    if not getattr(module, "is_causal", True) or given.get("is_causal") is False:
        raise HarnessError(f"{type(module).__name__} sees tokens that follow; give a model that is causal")
    odd = [name for name, own in given.items() if isinstance(own, Tensor | float) and name not in KNOWN]
    if odd:
        raise HarnessError(f"{type(module).__name__} uses attention {', '.join(odd)}, which is unsupported")


AttentionInterface.register(ATTENTION, _attention)


class _Probe(LayerCache):
    """Answers a single token, which sees itself alone, and notes which module asked and how far back it looks.

    span: the sliding window that its layer was given, also where it is no shorter than the context. heads: of queries,
    and of keys and values.
    """

    module: torch.nn.Module | None = None
    window: int | None = None
    span: int | None = None
    heads = (0, 0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.values = values

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        self.window, self.heads = form.window, (queries.shape[1], self.values.shape[1])
        return self.values.repeat_interleave(queries.shape[1] // self.values.shape[1], dim=1)


def _tidy(head: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hidden states [R, Q, E] whose strides are those of their shape; of the last tokens alone they are not.

    With the strides of a longer prompt `linear` would copy the head's whole weight (half precision on a CPU).
    """
    hidden, *rest = given
    return hidden.reshape(-1, hidden.shape[-1]).contiguous().view(hidden.shape), *rest


def _paired(product: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One row [1, ..., 1, E] twice, since a processor may round a product of one row as none of several."""
    hidden, *rest = given
    if hidden.numel() == hidden.shape[-1] and hidden.dim() > 1:
        hidden = torch.cat([hidden, hidden])
        hidden.is_pair = True  # type: ignore[attr-defined]  # tells `_single`: two rows may be two
    return hidden, *rest


def _single(product: torch.nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """The first of two rows that are one."""
    return out[:1] if getattr(given[0], "is_pair", False) else out


class AttachedModel:
    """A causal language model whose attention runs through `LayerCache` objects.

    layers: how many keep keys and values; every list of layers is of these. chunks: of each, how many tokens its chunks
    have, which see themselves alone; None without. mixed: whether other layers carry `States`. stepwise: whether these
    take one token at a time, but for a prompt's beginning. wording: how it is asked to repeat a prompt; None where the
    tokenizer is unknown.
    Raises HarnessError when the model's attention cannot be replaced, which one token sent through it shows.
    """

    def __init__(self, model: PreTrainedModel, wording: Wording | None = None) -> None:
        self.wording = wording
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.config = model.config.get_text_config(decoder=True)
        try:
            model.set_attn_implementation(ATTENTION)
        except (ValueError, AttributeError) as error:
            raise HarnessError(f"{type(model).__name__} does not support replaced attention: {error}") from None
        if self.config._attn_implementation != ATTENTION:  # transformers only warns
            raise HarnessError(f"{type(model).__name__} has attention code of its own, which is not replaced; {ADVICE}")
        if not getattr(self.config, "is_causal", True):
            raise HarnessError(f"{type(model).__name__} sees tokens that follow; give a model that is causal")
        if not hasattr(self.config, "num_hidden_layers"):
            raise HarnessError(f"{type(model).__name__} has no number of layers in its config; {ADVICE}")
        self.vocab = int(self.config.vocab_size)
        self._layers = ModelLayers(type(model).__name__, self.config, ADVICE)
        self.mixed, self.layers = bool(self._layers.carrying), len(self._layers.attending)
        self.chunks = self._layers.chunks
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_tidy)
        if self.device.type == "cpu" and self.dtype in (torch.bfloat16, torch.float16):
            for product in (own for own in model.modules() if isinstance(own, torch.nn.Linear)):
                product.register_forward_pre_hook(_paired)
                product.register_forward_hook(_single)
        self.reach, self.stepwise = math.inf, False
        self._probe()

    def sizes(self, tokens: int) -> Sizes:
        """Of a prompt in this model's compressible layers."""
        return Sizes(tokens, len(self.compressible), *self.heads)

    def forward(
        self,
        ids: Tensor,
        caches: Sequence[LayerCache],
        *,
        position: int,
        states: States | None = None,
        at: Tensor | None = None,
        keep: int = 0,
        grad: bool = False,
    ) -> Tensor:
        """Logits [R, Q or keep, V] of the tokens `ids` [R, Q], the first of which is at `position`.

        states: of the tokens before, which become those after; None where nothing follows a first token. at: [1, Q],
        positions on the device, where a captured step is to read them anew each time. keep: how many last positions to
        compute logits for; 0 is all. grad: what the caches bring is differentiated. Raises PromptFailed for tokens
        beyond a window that is taken for the whole context.
        """
        states = States() if states is None else states
        if self.mixed and position and not states.tensors:
            raise HarnessError(f"{type(self.model).__name__} cannot go on at {position} without its layers' states")
        if position + ids.shape[1] > self.reach:
            what = f"{position + ids.shape[1]} tokens, more than the model's context and its sliding window"
            raise PromptFailed(f"{what} of {self.reach}; shorten the prompt")
        self.forget_lengths()
        if at is None:
            at = torch.arange(position, position + ids.shape[1], device=ids.device).unsqueeze(0)
        cuts, parts = self._cuts(position, position + ids.shape[1]), list[Tensor]()
        with torch.enable_grad() if grad else torch.inference_mode():
            for start, end in pairwise(cuts):
                own = slice(start - position, end - position)
                parts.append(self._pass(ids[:, own], at[:, own], caches, start, states, keep))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)[:, -keep:]

    def _cuts(self, position: int, end: int) -> list[int]:
        """Where tokens that come at once are parted: at the ends of chunks, or after each where layers are stepwise."""
        chunk = 1 if self.stepwise and position else min((own for own in self.chunks if own), default=end)
        return [position, *range((position // chunk + 1) * chunk, end, chunk), end]

    def _pass(
        self, ids: Tensor, at: Tensor, caches: Sequence[LayerCache], position: int, states: States, keep: int
    ) -> Tensor:
        """`forward` of tokens that go through the model at once."""
        cache = self._layers.cache(caches, position, states)
        out = self.model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        self._layers.take(cache, states)
        return out.logits  # type: ignore[no-any-return]

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise PromptFailed for a token id that the model has no embedding of."""
        table: Any = self.model.get_input_embeddings()
        count = int(table.weight.shape[0])
        unknown = next((token for token in ids if not 0 <= token < count), None)
        if unknown is not None:
            raise PromptFailed(f"token id {unknown} is none of this model's {count}; use its own tokenizer")

    def forget_lengths(self) -> None:
        """Set back RoPE that scales with the longest text so far: a forward depends on no other."""
        for rotary, prefix in self._dynamic:
            first: Tensor = getattr(rotary, f"{prefix}original_inv_freq")
            setattr(rotary, f"{prefix}inv_freq", first.to(getattr(rotary, f"{prefix}inv_freq").device))
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)

    @contextmanager
    def same_lengths(self) -> Iterator[None]:
        """RoPE that scales with the longest text is afterwards as it was for the texts before."""
        names = [(rotary, f"{prefix}{name}") for rotary, prefix in self._dynamic for name in SCALED]
        before = [(rotary, name, getattr(rotary, name)) for rotary, name in names]
        try:
            yield
        finally:
            for rotary, name, own in before:
                setattr(rotary, name, own)

    @cached_property
    def _dynamic(self) -> list[tuple[torch.nn.Module, str]]:
        """Rotary embeddings of dynamic NTK scaling, with the prefix that their attributes have for a layer type."""
        found = []
        for module in self.model.modules():
            kind = getattr(module, "rope_type", None)
            kinds = {f"{layer}_": own for layer, own in kind.items()} if isinstance(kind, dict) else {"": kind}
            found += [(module, prefix) for prefix, own in kinds.items() if isinstance(own, str) and "dynamic" in own]
        return found

    def _continues(self, ids: Tensor, probes: Sequence[LayerCache], states: States) -> bool:
        """Whether two tokens at once, or what they leave of the first recurrent state, depend on what it was before.

        It does not in transformers' Mamba layers (Jamba, Zamba), whose scan of several tokens begins with nothing.
        """
        key = next((key for key in states.tensors if key[1] == STATES[1]), None)
        if key is None:
            return True
        after = []
        for more in (0.0, 1.0):
            own = States({**states.copy().tensors, key: states.tensors[key] + more})
            logits = self.forward(ids, probes, position=1, states=own)
            after.append((logits, own.tensors[key]))
        return not all(torch.equal(*pair) for pair in zip(*after, strict=True))

    @contextmanager
    def sources(self, wanted: bool) -> Iterator[list[LayerSource]]:
        """A list that a forward inside fills, layer by layer; it stays empty when not `wanted`.

        Raises HarnessError inside when attention is called without `hidden_states=`, or with a RoPE that is no cosines
        and sines.
        """
        found: list[LayerSource] = []
        tokens: list[Tensor] = []  # of the forward that is under way

        def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rope = kwargs.get("position_embeddings")
            if "hidden_states" not in kwargs or isinstance(rope, Tensor):  # Llama-4's is one of complex numbers
                raise HarnessError(f"{type(module).__name__} hides its hidden states; run methods that need none")
            own = LayerSource(self.model, module, kwargs["hidden_states"], rope, tokens[-1] if tokens else None)
            at = next(calls) % self.layers
            found[at:] = [own] if at == len(found) else [found[at].then(own), *found[at + 1 :]]

        calls, modules = count(), dict.fromkeys(self.attention) if wanted else []  # a module may serve many layers
        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
        if wanted:
            table = self.model.get_input_embeddings()
            hooks.append(table.register_forward_pre_hook(lambda _, given: tokens.append(given[0])))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def rotate(self, keys: Tensor, by: int | Tensor) -> Tensor:
        """Keys [..., D] moved under the model's RoPE (halves rotated) by some positions, or each by its own [...].

        Raises HarnessError for a model type whose RoPE layout has not been checked.
        """
        if self.config.model_type not in HALF_ROTATION:
            raise HarnessError(f"re-assigning positions is not checked for model type {self.config.model_type!r}")
        frequencies: Tensor = getattr(*self._rotary)
        distance = by.unsqueeze(-1) if isinstance(by, Tensor) else by
        angle = distance * frequencies.to(keys.device, torch.float32).repeat(2)  # [..., rotated dimensions]
        cos, sin, width = angle.cos(), angle.sin(), angle.shape[-1]
        turned, rest = keys[..., :width].float(), keys[..., width:]
        first, second = turned.chunk(2, dim=-1)
        out = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([out.to(keys.dtype), rest], dim=-1)

    @cached_property
    def _rotary(self) -> tuple[torch.nn.Module, str]:
        """Where radians a position of each rotated pair are, as the last forward used them: a module and their name.

        Gemma 3 has a set per layer type.
        """
        for module in self.model.modules():
            for name in ("full_attention_inv_freq", "inv_freq"):
                if isinstance(getattr(module, name, None), Tensor):
                    return module, name
        raise HarnessError(f"{type(self.model).__name__} has no rotary embedding; positions cannot be re-assigned")

    def _probe(self) -> None:
        name, probes, states = type(self.model).__name__, [_Probe() for _ in range(self.layers)], States()
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        try:
            self.forward(token, probes, position=0, states=states)
            if states.tensors:
                self.stepwise = not self._continues(token.expand(1, 2), probes, states)
        except HarnessError:
            raise
        except Exception as error:  # what a model that knows other caches trips over is its own affair
            why = " ".join(str(error).split())
            raise HarnessError(f"{name} does not run on a replaced cache ({why}); {ADVICE}") from error
        self.windows = [probe.window for probe in probes]  # tokens that each layer looks back; None for all
        self._layers.check_windows(name, self.windows)
        taken = [probe.span for probe in probes if probe.window is None and probe.span is not None] + self._layers.taken
        self.reach = min(taken, default=math.inf)  # tokens up to which all of these windows see everything
        spans = zip(self.windows, self.chunks, strict=True)
        self.compressible = [i for i, own in enumerate(spans) if own == (None, None)]  # what policies see
        self.heads = next((probes[i].heads for i in self.compressible), probes[0].heads)
        self.attention = [probe.module for probe in probes if probe.module is not None]
        if len(self.attention) < self.layers or {key[0] for key in states.tensors} != {*self._layers.carrying}:
            raise HarnessError(f"{name} has layers with attention of their own; {ADVICE}")
