"""The seam to transformers, and the only file that touches its internals.

A registered attention function hands every layer to a `LayerCache`, which the cache object ties to the tensors it
returns; the cache reports tokens *seen*, so positions and RoPE stay true after eviction. Queries arrive after RoPE,
with no code per model. Works on transformers 5.2 and later for models whose attention goes through
`AttentionInterface`; others are refused.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from harness.engine.layer_cache import LayerCache
from harness.engine.states import States
from harness.engine.types import PromptFailed
from harness.errors import HarnessError
from methods.base import Sizes
from methods.views import Form, LayerSource

ATTENTION = "kv_policy"
ADVICE = "use a model of full, sliding-window or linear attention layers"
STATES = ("conv_states", "recurrent_states")  # of a layer that has any
LAYERS = {  # classes of transformers' own caches, by what a layer keeps
    "DynamicLayer",  # keys and values
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",  # states
    "LinearAttentionAndFullAttentionLayer",  # both
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",  # nothing
}
HALF_ROTATION = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "smollm3", "granite", "olmo2"),
    *("olmo3", "gemma2", "gemma3", "gemma3_text", "gpt_oss"),
}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
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
    span = kwargs.get("sliding_window")
    window = span if span is None or span < _context(module.config) else None  # no shorter: every token is seen
    if isinstance(cache, _Probe):
        cache.module, cache.span = module, span
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    sinks = None if sinks is None else sinks.view(1, key.shape[1], -1)
    form = Form(scaling, window, kwargs.get("softcap"), sinks)
    return cache.attend(query, form).transpose(1, 2), None


def _context(config: Any) -> float:
    """Tokens that a model was made for."""
    return getattr(config, "max_position_embeddings", None) or math.inf


AttentionInterface.register(ATTENTION, _attention)


class _Layer(CacheLayerMixin):
    """One layer as transformers sees it. `seen` counts tokens, not slots."""

    is_sliding = False

    def __init__(self, cache: LayerCache, seen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.seen = cache, seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        self.cache.append(key_states, value_states)
        for states in (key_states, value_states):
            states.layer_cache = self.cache  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.seen, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.2


def _kinds(model: PreTrainedModel, config: Any) -> list[Any]:
    """What transformers' own cache would keep of each layer. Raises HarnessError for a kind that is not known here."""
    kinds = DynamicCache(config=config).layers
    types = getattr(config, "layer_types", None) or [type(kind).__name__ for kind in kinds]
    if other := {own for own, kind in zip(types, kinds, strict=True) if type(kind).__name__ not in LAYERS}:
        raise HarnessError(f"{type(model).__name__} has layers of type {', '.join(sorted(other))}; {ADVICE}")
    return kinds


class _Probe(LayerCache):
    """Answers a single token, which sees itself alone, and notes which module asked and how far back it looks.

    span: the sliding window that its layer was given, also where it is no shorter than the context.
    """

    module: torch.nn.Module | None = None
    window: int | None = None
    span: int | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.values = values

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        self.window = form.window
        return self.values.repeat_interleave(queries.shape[1] // self.values.shape[1], dim=1)


def _tidy(head: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hidden states [R, Q, E] whose strides are those of their shape; of the last tokens alone they are not.

    With the strides of a longer prompt `linear` would copy the head's whole weight (half precision on a CPU).
    """
    hidden, *rest = given
    return hidden.reshape(-1, hidden.shape[-1]).view(hidden.shape), *rest


class AttachedModel:
    """A causal language model whose attention runs through `LayerCache` objects.

    layers: how many keep keys and values; every list of layers is of these. mixed: whether some carry `States`.
    stepwise: whether these, but for a prompt's beginning, take one token at a time.
    Raises HarnessError when the model's attention cannot be replaced, which one token sent through it shows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.config = model.config.get_text_config(decoder=True)
        try:
            model.set_attn_implementation(ATTENTION)
        except (ValueError, AttributeError) as error:
            raise HarnessError(f"{type(model).__name__} does not support replaced attention: {error}") from None
        self.vocab = int(self.config.vocab_size)
        self._kinds = _kinds(model, self.config)
        self._attending = [i for i, kind in enumerate(self._kinds) if isinstance(kind, DynamicLayer)]
        self._carrying = [i for i, kind in enumerate(self._kinds) if hasattr(kind, STATES[0])]
        self.mixed, self.layers = bool(self._carrying), len(self._attending)
        if not self.layers:
            raise HarnessError(f"{type(model).__name__} has no attention layers, so no cache to compress; {ADVICE}")
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_tidy)
        self.reach, self.stepwise = math.inf, False
        self._probe()

    def sizes(self, tokens: int) -> Sizes:
        """Of a prompt in this model."""
        heads = int(self.config.num_attention_heads)
        kv_heads = int(getattr(self.config, "num_key_value_heads", None) or heads)
        return Sizes(tokens, len(self.compressible), heads, kv_heads)

    def forward(
        self,
        ids: Tensor,
        caches: Sequence[LayerCache],
        *,
        position: int,
        states: States | None = None,
        keep: int = 0,
        grad: bool = False,
    ) -> Tensor:
        """Logits [R, Q or keep, V] of the tokens `ids` [R, Q], the first of which is at `position`.

        states: of the tokens before, which become those after; None where nothing follows a first token. keep: how many
        last positions to compute logits for; 0 is all. grad: what the caches bring is differentiated. Raises
        PromptFailed for tokens beyond a window that is taken for the whole context.
        """
        states = States() if states is None else states
        if self.mixed and position and not states.tensors:
            raise HarnessError(f"{type(self.model).__name__} cannot go on at {position} without its layers' states")
        if position + ids.shape[1] > self.reach:
            what = f"{position + ids.shape[1]} tokens, more than the model's context and its sliding window"
            raise PromptFailed(f"{what} of {self.reach}; shorten the prompt")
        self.forget_lengths()
        with torch.enable_grad() if grad else torch.inference_mode():
            if not (self.stepwise and position):
                return self._pass(ids, caches, position, states, keep)
            steps = [self._pass(one, caches, position + i, states, 1) for i, one in enumerate(ids.split(1, dim=1))]
        return torch.cat(steps[-keep:], dim=1)

    def _pass(self, ids: Tensor, caches: Sequence[LayerCache], position: int, states: States, keep: int) -> Tensor:
        """`forward` of tokens that go through the model at once."""
        cache = self._cache(caches, position, states)
        at = torch.arange(position, position + ids.shape[1], device=ids.device).unsqueeze(0)
        out = self.model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        for i in self._carrying:
            own = ((name, number, x) for name in STATES for number, x in getattr(cache.layers[i], name).items())
            states.tensors |= {(i, name, number): x for name, number, x in own if x is not None}
        return out.logits  # type: ignore[no-any-return]

    def _cache(self, caches: Sequence[LayerCache], position: int, states: States) -> Cache:
        """What transformers is given: every layer of the model, with what it keeps of the tokens before `position`."""
        layers = [copy.deepcopy(kind) for kind in self._kinds]
        for i, cache in zip(self._attending, caches, strict=True):
            own = _Layer(cache, position)
            if i not in self._carrying:
                layers[i] = own
                continue
            for name in ("update", "get_mask_sizes", "get_seq_length"):
                setattr(layers[i], name, getattr(own, name))
        for (i, name, number), x in states.tensors.items():
            getattr(layers[i], name)[number] = x
            getattr(layers[i], f"is_{name}_initialized")[number] = True
            layers[i].has_previous_state[number] = True
            if name == "conv_states":
                layers[i].conv_kernel_size[number] = x.shape[-1]
        return Cache(layers=layers)

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
        """Whether what two tokens at once leave of the first recurrent state depends on what it was before them.

        It does not in transformers' Mamba layers (Jamba, Zamba), whose scan of several tokens begins with nothing.
        """
        key = next((key for key in states.tensors if key[1] == STATES[1]), None)
        if key is None:
            return True
        after = []
        for more in (0.0, 1.0):
            own = States({**states.copy().tensors, key: states.tensors[key] + more})
            self.forward(ids, probes, position=1, states=own)
            after.append(own.tensors[key])
        return not torch.equal(*after)

    @contextmanager
    def sources(self, wanted: bool) -> Iterator[list[LayerSource]]:
        """A list that a forward inside fills, layer by layer; it stays empty when not `wanted`.

        Raises HarnessError inside when a layer's attention is not called with `hidden_states=`.
        """
        found: list[LayerSource] = []

        def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if "hidden_states" not in kwargs:
                raise HarnessError(f"{type(module).__name__} hides its hidden states; run methods that need none")
            own = LayerSource(self.model, module, kwargs["hidden_states"], kwargs.get("position_embeddings"))
            at = next(calls) % self.layers
            found[at:] = [own] if at == len(found) else [found[at].then(own), *found[at + 1 :]]

        calls, modules = count(), dict.fromkeys(self.attention) if wanted else []  # a module may serve many layers
        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def rotate(self, keys: Tensor, by: int) -> Tensor:
        """Keys [..., D] moved by `by` positions under the model's RoPE (half-rotation layout).

        Raises HarnessError for a model type whose RoPE layout has not been checked.
        """
        if self.config.model_type not in HALF_ROTATION:
            raise HarnessError(f"re-assigning positions is not checked for model type {self.config.model_type!r}")
        frequencies: Tensor = getattr(*self._rotary)
        angle = by * frequencies.to(keys.device, torch.float32).repeat(2)  # [rotated dimensions]
        cos, sin, width = angle.cos(), angle.sin(), angle.shape[0]
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
        taken = [probe.span for probe in probes if probe.window is None and probe.span is not None]
        self.reach = min(taken, default=math.inf)  # tokens up to which all of these windows see everything
        self.compressible = [i for i, window in enumerate(self.windows) if window is None]  # what policies see
        self.attention = [probe.module for probe in probes if probe.module is not None]
        if len(self.attention) < self.layers or {key[0] for key in states.tensors} != {*self._carrying}:
            raise HarnessError(f"{name} has layers with attention of their own; {ADVICE}")
