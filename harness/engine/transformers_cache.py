"""What transformers takes for its own cache: a model's layers and what each keeps, keys and values in `LayerCache`s.

Layers without keys and values (linear attention, Mamba, convolutions) keep states, which are put into transformers' own
layers before every forward and taken out after it. Some keep both, some nothing.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from harness.engine.layer_cache import LayerCache
from harness.engine.states import States
from harness.errors import HarnessError

STATES = ("conv_states", "recurrent_states")  # of a layer that has any
CLASSES = {  # transformers' own, by what a layer keeps
    "DynamicLayer",  # keys and values
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",  # states
    "LinearAttentionAndFullAttentionLayer",  # both
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",  # nothing
}
NOTHING = ("moe", "mlp")  # types that keep nothing; older transformers gives them a layer of states, which stay empty


class Layer(CacheLayerMixin):
    """One layer as transformers sees it. `seen` counts tokens, not slots. chunk: as in `ModelLayers.chunks`."""

    is_sliding = False

    def __init__(self, cache: LayerCache, seen: int, chunk: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.seen, self.chunk = cache, seen, chunk
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.chunk and self.seen and self.seen % self.chunk == 0:
            self.cache.restart()
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


class ModelLayers:
    """The layers of a model by what they keep.

    attending: numbers of those with keys and values. carrying: of those with states. windows: of each attending one,
    how far the config lets it look back; None where that is no shorter than the context. chunks: of each attending one,
    how many tokens its chunks have, each of which sees itself alone; None where a chunk ends no earlier than the
    context, whose length is then in `taken`. Raises HarnessError for a model of another kind of layer, or of none that
    attends.
    """

    def __init__(self, name: str, config: Any, advice: str) -> None:
        if vars(config).get("kv_lora_rank"):  # asked by its name, it may be told by layers alone
            raise HarnessError(f"{name} has latent attention, which caches no keys and values of its heads; {advice}")
        try:
            self._kinds = DynamicCache(config=config).layers
        except KeyError as error:  # a type that transformers' cache does not know
            raise HarnessError(f"{name} has layers of type {error.args[0]}; {advice}") from None
        types = getattr(config, "layer_types", None) or [type(kind).__name__ for kind in self._kinds]
        if other := {own for own, kind in zip(types, self._kinds, strict=False) if type(kind).__name__ not in CLASSES}:
            raise HarnessError(f"{name} has layers of type {', '.join(sorted(other))}; {advice}")
        self.attending = [i for i, kind in enumerate(self._kinds) if isinstance(kind, DynamicLayer)]
        stateful = [hasattr(kind, STATES[0]) and types[i] not in NOTHING for i, kind in enumerate(self._kinds)]
        self.carrying = [i for i, own in enumerate(stateful) if own]
        if not self.attending:
            raise HarnessError(f"{name} has no layer that keeps keys and values, so there is nothing to compress")
        self.windows = [
            None
            if types[i] == "chunked_attention"
            else shorter(getattr(self._kinds[i], "sliding_window", None), config)
            for i in self.attending
        ]
        chunk = getattr(config, "attention_chunk_size", None)
        spans = [chunk if types[i] == "chunked_attention" else None for i in self.attending]
        self.chunks = [shorter(span, config) for span in spans]
        self.taken = [span for span, own in zip(spans, self.chunks, strict=True) if span is not None and own is None]

    def check_windows(self, name: str, told: Sequence[int | None]) -> None:
        """Refuse a model whose config limits how far a layer looks back, while its attention is told otherwise.

        told: of each attending layer, the sliding window that its attention was given.
        """
        for i, (own, said) in enumerate(zip(told, self.windows, strict=True)):
            if own != said:
                what = f"a sliding window of {own} in attention layer {i}, where its config says {said}"
                raise HarnessError(f"{name} has {what}; give one whose config and code agree")

    def cache(self, caches: Sequence[LayerCache], position: int, states: States) -> Cache:
        """What is kept of the tokens before `position`. caches: of the attending layers."""
        layers = [copy.deepcopy(kind) if i in self.carrying else kind for i, kind in enumerate(self._kinds)]
        for i, cache, chunk in zip(self.attending, caches, self.chunks, strict=True):
            own = Layer(cache, position, chunk)
            if i in self.carrying:
                for name in ("update", "get_mask_sizes", "get_seq_length"):
                    setattr(layers[i], name, getattr(own, name))
            else:
                layers[i] = own
        for (i, name, number), x in states.tensors.items():
            layer: Any = layers[i]
            getattr(layer, name)[number] = x
            getattr(layer, f"is_{name}_initialized")[number] = layer.has_previous_state[number] = True
            if name == STATES[0]:
                layer.conv_kernel_size[number] = x.shape[-1]
        return Cache(layers=layers)

    def take(self, cache: Cache, states: States) -> None:
        """Put into `states` what a forward left of them in its cache."""
        for i in self.carrying:
            for name in STATES:
                found = getattr(cache.layers[i], name).items()
                states.tensors |= {(i, name, number): x for number, x in found if x is not None}


def shorter(span: int | None, config: Any) -> int | None:
    """A window or chunk of tokens; None where it is no shorter than the context: every token is seen."""
    context = getattr(config, "max_position_embeddings", None) or math.inf
    return None if span is None or span >= context else span
