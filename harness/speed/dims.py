"""The shapes of a model, as far as they decide how much memory a probe takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from harness.errors import HarnessError

FLOAT32 = 4


@dataclass(frozen=True)
class Dims:
    """The shapes of a model.

    windows: sliding window of each layer, None where attention is full. number: bytes of one.
    """

    windows: tuple[int | None, ...]
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    number: int

    @classmethod
    def of(cls, config: Any, dtype_bytes: int) -> Dims:
        """Read a transformers text config; a field that it leaves out has the value that models take for it."""
        heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
        types = getattr(config, "layer_types", None) or ["full_attention"] * int(config.num_hidden_layers)
        window = getattr(config, "sliding_window", None)
        if window and window >= (getattr(config, "max_position_embeddings", None) or math.inf):
            window = None  # all that there is
        return cls(
            windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            hidden=hidden,
            intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
            vocab=int(config.vocab_size),
            number=dtype_bytes,
        )

    @property
    def slot(self) -> int:
        """Bytes of the keys and values of a slot of all KV heads of a layer."""
        return 2 * self.kv_heads * self.head_dim * self.number

    @property
    def seen(self) -> int:
        """Layers that policies see."""
        return sum(window is None for window in self.windows)

    @property
    def up(self) -> int:
        """Bytes of a float32 copy of a number, 0 where it is one."""
        return FLOAT32 if self.number < FLOAT32 else 0


def check_layers(config: Any) -> None:
    """Raise HarnessError for layers of another kind than full and sliding-window attention."""
    other = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if other:
        what = f"memory of {', '.join(sorted(other))} layers is not predicted"
        raise HarnessError(f"{what}, which bench, serve-bench and boundary do; measure this model with `harness run`")
