"""A method that stores something else than numbers."""

WHAT = "every token as 8-bit codes with one scale for its key and one for its value"

METHOD = '''"""@CLASS@: 8-bit codes with a scale a slot, until a form of storage of your own takes their place.

Source: none yet; give the paper's address here and in `paper=`. Differences: state every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import KV, Kind, LayerPolicy, LayerView, at_least
from methods.registry import method
from methods.stored import Codes, Coding, encode


@dataclass(frozen=True)
class @CLASS@Coding(Coding):
    """How slots become codes; tokens that are decoded become some too, but for the last `residual` of a head."""

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> @CLASS@Codes:  # of n heads, [n, C, D]
        return @CLASS@Codes(self, *_coded(keys), *_coded(values))


@dataclass
class @CLASS@Codes(Codes):
    """keys, values: [n, C, D] int8. key_scale, value_scale: [n, C, 1] float32. All of it counts as cache bytes."""

    coding: @CLASS@Coding
    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.key_scale, self.values, self.value_scale]

    def take(self, streams: Tensor) -> @CLASS@Codes:
        return @CLASS@Codes(self.coding, *(x[streams] for x in self.tensors()))

    @classmethod
    def cat(cls, parts: Sequence[@CLASS@Codes]) -> @CLASS@Codes:
        return cls(parts[0].coding, *map(torch.cat, zip(*(own.tensors() for own in parts), strict=True)))

    def then(self, later: @CLASS@Codes) -> @CLASS@Codes:
        pairs = zip(self.tensors(), later.tensors(), strict=True)
        return @CLASS@Codes(self.coding, *(torch.cat(pair, dim=1) for pair in pairs))

    def decode(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        keys.copy_(self.keys * self.key_scale)
        values.copy_(self.values * self.value_scale)


@method("@NAME@", paper="control, no paper")
@dataclass(frozen=True)
class @CLASS@(LayerPolicy):
    """Every token as 8-bit codes, the last `residual` of a head as they are."""

    residual: int = 32

    def __post_init__(self) -> None:
        at_least(self, 1, "residual")

    @property
    def kind(self) -> Kind:
        return "whole"  # it keeps every token and is given no budget

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        live = [view.tokens] * view.kv.positions.shape[1]
        return encode(view.kv, @CLASS@Coding(residual=self.residual), live, view.refuse)


def _coded(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(dim=-1, keepdim=True) / 127
    codes = x.float() / scale.masked_fill(scale == 0, 1.0)
    return codes.round().clamp(-127, 127).to(torch.int8), scale
'''

TEST = '''"""The contract of @NAME@, and its codes against a plain loop that shares no code with it."""

import pytest

from harness.contract import check_method, make_view
from methods.base import Needs
from methods.registry import make_policy


def test_the_contract_holds() -> None:
    check_method("@NAME@")


def test_codes_are_those_of_a_plain_loop() -> None:
    view, residual = make_view(40, Needs()), 8
    kvs = make_policy("@NAME@", {"residual": residual}).compress(view, 40)
    for layer, kv in zip(view.layers, kvs, strict=True):
        for loaded, plain in zip(kv.load(), (layer.kv.keys, layer.kv.values), strict=True):
            for own, of in zip(loaded[0].tolist(), plain[0].tolist(), strict=True):
                assert own[40 - residual :] == of[40 - residual :]
                for got, x in zip(own[: 40 - residual], of[: 40 - residual], strict=True):
                    step = max(map(abs, x)) / 127
                    assert got == pytest.approx([round(number / step) * step for number in x], abs=1e-5)


def test_stored_bytes_are_those_of_codes_scales_and_positions() -> None:
    [kv, *_] = make_policy("@NAME@", {"residual": 8}).compress(make_view(40, Needs()), 40)
    heads, dim = kv.keys.shape[1], kv.keys.shape[3]
    assert kv.nbytes == heads * (32 * (2 * dim + 2 * 4 + 4) + 8 * (2 * dim * 4 + 4))
'''
