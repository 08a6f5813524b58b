"""From one model's cache to another's of the same shape: by mean and deviation of each channel of each head.

Source: Q-KVComm, https://arxiv.org/abs/2512.17914: keys after RoPE, `(x - mean_s) / deviation_s *
deviation_r + mean_r`. Theirs averages over tokens before it squares, so that its deviation is over texts; here both are
over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from methods.base import KV, Needs
from methods.stored import CodedKV

LEAST = 1e-6
"""A deviation that is divided by."""


@dataclass
class Moments:
    """Sums over tokens of a model's cache. sums: by name, of numbers and of squares, [H, D] float64."""

    tokens: int = 0
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def see(self, model: AttachedModel, ids: Sequence[int]) -> None:
        """Add a text."""
        with torch.inference_mode():
            for at, layer in enumerate(prefill(model, ids, Needs()).layers):
                for what in ("keys", "values"):
                    x = getattr(layer, what)[0].double().cpu()  # [H, T, D]
                    own, squares = self.sums.get(f"{at}.{what}", (0, 0))
                    self.sums[f"{at}.{what}"] = own + x.sum(dim=1), squares + x.square().sum(dim=1)
        self.tokens += len(ids)

    def tensors(self, side: str) -> dict[str, Tensor]:
        """Mean and deviation of every channel, float32. side: `sender` or `receiver`."""
        found = {}
        for name, (own, squares) in self.sums.items():
            mean = own / self.tokens
            found[f"{side}.{name}.mean"] = mean.float()
            found[f"{side}.{name}.deviation"] = (squares / self.tokens - mean.square()).clamp(min=0).sqrt().float()
        return found


class Between:
    """Takes caches of a sender to those of a receiver. tensors: `Moments.tensors` of both."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.tensors = {name: x.to(device) for name, x in tensors.items()}

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Between:
        return cls(load_file(path), device)

    def taken(self, kvs: Iterable[KV]) -> list[KV]:
        """The receiver's KV of each layer. Codes are read first: what they are scaled with is the sender's."""
        return [self._taken(kv, at) for at, kv in enumerate(kvs)]

    def _taken(self, kv: KV, at: int) -> KV:
        plain = KV(*kv.load(), kv.positions) if isinstance(kv, CodedKV) else kv
        keys, values = (self._moved(getattr(plain, what), f"{at}.{what}") for what in ("keys", "values"))
        return replace(plain, keys=keys, values=values)

    def _moved(self, x: Tensor, name: str) -> Tensor:
        """X [1, H, S, D]."""
        mean, deviation, to_mean, to_deviation = (
            self.tensors[f"{side}.{name}.{moment}"].unsqueeze(1)
            for side in ("sender", "receiver")
            for moment in ("mean", "deviation")
        )
        return ((x.float() - mean) / deviation.clamp(min=LEAST) * to_deviation + to_mean).to(x.dtype)
