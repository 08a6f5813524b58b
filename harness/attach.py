"""The seam to transformers, and the only file that touches its internals.

A registered attention function hands every layer to a `LayerCache`, which the cache object ties to the key tensor it
returns; the cache reports tokens *seen*, so positions and RoPE stay true after eviction. Queries arrive after RoPE, with
no code per model. Works on transformers 5.2 and later for models whose attention goes through `AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from harness.cache import LayerCache
from harness.errors import HarnessError

ATTENTION = "kv_policy"
HALF_ROTATION = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "gemma3"}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cache: LayerCache | None = getattr(key, "layer_cache", None)
    if cache is None:
        raise HarnessError(f"{type(module).__name__} does not pass its cache on to attention; this model is unsupported")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise HarnessError(f"{type(module).__name__} uses attention {name}, which is unsupported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = cache.attend(query, scaling=scale, window=sliding_window)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


class _Layer(CacheLayerMixin):
    """One layer as transformers sees it. `seen` counts tokens, not slots."""

    is_sliding = False

    def __init__(self, cache: LayerCache, seen: int) -> None:
        super().__init__()
        self.cache, self.seen = cache, seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        self.cache.append(key_states, value_states)
        key_states.layer_cache = self.cache  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.seen, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.2


class AttachedModel:
    """A causal language model whose attention runs through `LayerCache` objects.

    Raises HarnessError when the model's attention cannot be replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        try:
            model.set_attn_implementation(ATTENTION)
        except (ValueError, AttributeError) as error:
            raise HarnessError(f"{type(model).__name__} does not support replaced attention: {error}") from None
        self.layers = int(self.config.num_hidden_layers)
        self.vocab = int(self.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(self, ids: Tensor, caches: Sequence[LayerCache], *, position: int, keep: int = 0) -> Tensor:
        """Logits [R, Q or keep, V] of the tokens `ids` [R, Q], the first of which is at `position`.

        keep: how many last positions to compute logits for; 0 is all.
        """
        cache = Cache(layers=[_Layer(layer, position) for layer in caches])
        at = torch.arange(position, position + ids.shape[1], device=ids.device).unsqueeze(0)
        with torch.inference_mode():
            out = self.model(
                input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=keep
            )
        logits: Tensor = out.logits
        return logits

    def rotate(self, keys: Tensor, by: int) -> Tensor:
        """Keys [..., D] moved by `by` positions under the model's RoPE (half-rotation layout).

        Raises HarnessError for a model type whose RoPE layout has not been checked.
        """
        if self.config.model_type not in HALF_ROTATION:
            raise HarnessError(f"re-assigning positions is not checked for model type {self.config.model_type!r}")
        rope = self._rope()
        cos, sin = rope(keys, torch.tensor([[by]], device=keys.device))
        scale = float(getattr(rope, "attention_scaling", 1.0))
        cos, sin = cos[0, 0].float() / scale, sin[0, 0].float() / scale  # [rotated dimensions]
        width = cos.shape[-1]
        turned, rest = keys[..., :width].float(), keys[..., width:]
        first, second = turned.chunk(2, dim=-1)
        out = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([out.to(keys.dtype), rest], dim=-1)

    def _rope(self) -> Any:
        for module in self.model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                return module
        raise HarnessError(f"{type(self.model).__name__} has no rotary embedding; positions cannot be re-assigned")
