"""Latents that heads share: how many of them each layer has, the bases that they are cut from, and a prompt read so.

What ReCalKV (`methods.recalkv`) needs besides a policy. Letters as in `methods.base`, n groups of g heads, M = g * D
numbers of the keys of a group, M' of the values of all heads, r latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from methods.base import KV, PolicyError, PromptView
from methods.budget import spread
from methods.low_rank import Basis
from methods.rotation import on

Ranks = tuple[int, int]
"""Of the keys of each group of heads, and of a layer's values."""


@dataclass(frozen=True, eq=False)
class Factors:
    """What ranks and bases are cut from. shape: layers, KV heads, numbers of a token's keys and of its values.

    order: [L, H], heads by groups. keys: [L, n, M, M], orthogonal, of each group. values: [L, M', M']. biases: of keys
    and of values, [L, H * D] each. fisher: of keys and of values of each layer.
    """

    shape: tuple[int, int, int, int]
    order: Tensor
    keys: Tensor
    values: Tensor
    biases: tuple[Tensor, Tensor]
    fisher: Sequence[Sequence[float]]

    @classmethod
    def of(cls, found: Mapping[str, Tensor]) -> Factors:
        """Return those of the constants that `harness compile recalkv` makes."""
        layers, heads = found["key_order"].shape
        keys, values = orthonormal(found["key_bases"]), orthonormal(found["value_bases"])
        shape = (layers, heads, keys.shape[1] * keys.shape[2], values.shape[1])
        biases = found["key_bias"].float(), found["value_bias"].float()
        return cls(shape, found["key_order"].long(), keys, values, biases, found["fisher"].float().mean(dim=2).tolist())

    @property
    def groups(self) -> int:
        return int(self.keys.shape[1])

    @property
    def full(self) -> int:
        """Numbers of a token in all layers."""
        return self.shape[0] * (self.shape[2] + self.shape[3])

    @property
    def least(self) -> int:
        """Latents of a token in all layers, one of each group."""
        return self.shape[0] * (self.groups + 1)

    def allotted(self, total: int, ranks: Literal["fisher", "uniform"]) -> list[Ranks]:
        """Share out `total` latents of a token: by Fisher information, or the same in all layers."""
        layers, _, key, value = self.shape
        most, least = [key, value] * layers, [self.groups, 1] * layers
        weights = (
            [float(own) for own in most] if ranks == "uniform" else [own for layer in self.fisher for own in layer]
        )
        room = [a - b for a, b in zip(most, least, strict=True)]
        more = spread(max(0, total - sum(least)), weights, room)
        found = [a + b for a, b in zip(least, more, strict=True)]
        return [(a // self.groups, b) for a, b in zip(found[::2], found[1::2], strict=True)]

    def numbers(self, ranks: Sequence[Ranks]) -> list[int]:
        """Count the latents of a token in each layer."""
        return [key * self.groups + value for key, value in ranks]


@lru_cache(maxsize=1 << 12)
def bases(factors: Factors, at: int, ranks: Ranks, device: torch.device) -> tuple[Basis, Basis]:
    """Return those of a layer's keys and values at ranks, of all heads together."""
    heads, size = factors.shape[1], factors.shape[1] // factors.groups
    own = factors.keys[at, :, :, : ranks[0]].reshape(heads, -1, ranks[0])  # [n * g, D, r]
    joined = torch.zeros(heads, own.shape[1], factors.groups, ranks[0])
    group = torch.arange(factors.groups).repeat_interleave(size)
    joined[factors.order[at], :, group] = own
    columns = joined.flatten(0, 1).flatten(1), factors.values[at, :, : ranks[1]]
    made = zip((bias[at] for bias in factors.biases), columns, strict=True)
    keys, values = (Basis.orthonormal(on(mean, device), on(basis.contiguous(), device)) for mean, basis in made)
    return keys, values


def orthonormal(rounded: Tensor) -> Tensor:
    """Return orthogonal matrices [..., M, M] float32 whose leading columns span what those of rounded ones do."""
    made, upper = torch.linalg.qr(rounded.double())
    found: Tensor = made * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return found.float()


def own_pass(view: PromptView, bases: Sequence[tuple[Basis, Basis]]) -> list[KV]:
    """Run the prompt through the model again, its keys and values cut to bases: what a cache of that model holds."""
    sources = [layer.source for layer in view.layers if layer.source is not None and layer.source.ids is not None]
    if len(sources) < len(view.layers):
        raise PolicyError("recalkv@paper runs the prompt again, whose tokens were not observed here; use `harness run`")
    found: dict[tuple[int, int], Tensor] = {}
    hooks = []

    def cut(basis: Basis, place: tuple[int, int]) -> Any:
        def change(module: Any, given: Any, out: Tensor) -> Tensor:
            latent = (out.float() - basis.mean) @ basis.encoder
            found[place] = (latent @ basis.decoder + basis.mean).to(out.dtype)
            return found[place]

        return change

    model: Any = sources[0].model
    for at, (source, own) in enumerate(zip(sources, bases, strict=True)):
        module: Any = source.module
        for kind, (made, basis) in enumerate(zip((module.k_proj, module.v_proj), own, strict=True)):
            hooks.append(made.register_forward_hook(cut(basis, (at, kind))))
    form, before = view.layers[0].form, model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa" if form.softcap is None and form.sinks is None else "eager")
        model.get_decoder()(input_ids=sources[0].ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    left = []
    for at, layer in enumerate(view.layers):
        split = (1, layer.tokens, layer.kv.keys.shape[1], -1)
        keys, values = (found[at, kind].view(split).transpose(1, 2) for kind in (0, 1))
        assert layer.rotate is not None
        left.append(KV(layer.rotate(keys, layer.kv.positions), values.contiguous(), layer.kv.positions))
    return left
