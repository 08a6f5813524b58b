"""Q-KVComm: a layer's codes have 8, 6 or 4 bits, by how much its keys and values suffer from few.

Source: https://arxiv.org/abs/2512.17914 and its released code. How sensitive a layer is, `harness compile qkvcomm`
measures: the mean square error of its keys, plus that of its values, as codes of 4 bits, over 100 texts of at most 512
tokens (quantization.py:77-138). The `share` of the layers that suffer most get 8 bits, the `share` that suffer least
4, the others 6: 6 on average (140-186). A layer's keys have one scale and one zero, its values another: scale = (max -
min) / (2^bits - 1), zero = -min / scale, code = clamp(round(x / scale + zero)), x = (code - zero) * scale. Codes of 6
bits are packed, 4 in 3 bytes.
Differences: its authors code what one model sends another, and the receiver goes on with plain keys and values; here
tokens that are decoded become codes of the prompt's scale and zero, cut off at its least and largest number, once they
leave the `residual`. A layer whose numbers are all equal keeps their value, where theirs becomes 0. Each KV head holds
its layer's scales and zeros; what another method keeps (`over`) has some of each head's own, as heads keep other
tokens. Left out, because they matter to sending alone: which layers are sent (the middle .7 of them, by a Gaussian
over depth), the calibration between two models, and facts extracted into the prompt's text. In the released code the
receiver's prompt holds the whole context as text, so its answers never read the cache sent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from methods.artefact import CompiledPolicy
from methods.base import KV, LayerView, PromptView, Sizes, at_least, at_most
from methods.bits import packed, per_unit, unpacked
from methods.coded import CodedPolicy
from methods.device import read
from methods.registry import method
from methods.slotwise import SlotCoding
from methods.views import POSITION_BYTES

HIGH, MIDDLE, LOW = 8, 6, 4
SCALE_BYTES = 4 * 4
"""Of scale and zero of keys and of values, in single precision."""


@dataclass(frozen=True)
class PerTensor(SlotCoding):
    """Codes of `bits`, with one scale and zero of the keys, and one of the values, of `heads` heads."""

    bits: int
    heads: int = 1

    @property
    def shared(self) -> int:
        return self.heads

    @property
    def head_bytes(self) -> int:
        return SCALE_BYTES

    def slot_bytes(self, key_dim: int, value_dim: int) -> int:
        return (key_dim + value_dim) * self.bits // 8

    def fixed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return scale and zero of keys, and of values, of each stream: [n, 4] float32."""
        return (torch.cat([self._scale(x) for x in (keys, values)], dim=1),)

    def held(self, keys: Tensor, values: Tensor, fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._codes(x, *own) for x, own in zip((keys, values), _parts(fixed[0]), strict=True))

    def read(self, held: Sequence[Tensor], fixed: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        for out, codes, (scale, zero) in zip((keys, values), held, _parts(fixed[0]), strict=True):
            out.copy_((unpacked(codes, self.bits).float() - zero) * scale)

    def _scale(self, x: Tensor) -> Tensor:
        low, high = x.float().reshape(len(x) // self.heads, -1).aminmax(dim=1)
        reach = (high - low) / (2**self.bits - 1)
        scale = reach.masked_fill(reach == 0, 1.0)
        return torch.stack([scale, -low / scale], dim=1).repeat_interleave(self.heads, dim=0)

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = (x.float() / scale + zero).round_().clamp_(0, 2**self.bits - 1)
        return packed(codes.to(torch.uint8), self.bits)


def _parts(scales: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Scale and zero of keys, and of values, [n, 1, 1] each, from [n, 4]."""
    found = scales.unsqueeze(-1).unsqueeze(-1).unbind(1)
    return found[:2], found[2:]


def bits_of(sensitivity: Mapping[int, float], share: float = 0.3) -> dict[int, int]:
    """Return the bits of each layer: the `share` that is most sensitive gets 8, the least sensitive 4, others 6."""
    ranked = sorted(sensitivity, key=lambda layer: -sensitivity[layer])
    ends = int(share * len(ranked))
    bits = [HIGH] * ends + [MIDDLE] * (len(ranked) - 2 * ends) + [LOW] * ends
    return dict(sorted(zip(ranked, bits, strict=True)))


@method(
    "qkvcomm",
    paper="https://arxiv.org/abs/2512.17914",
    code="https://github.com/sparcus-technologies/compressed-vector-language at a55ae69",
    presets={"snapkv": {"over": "snapkv"}},
)
@dataclass(frozen=True)
class QKVComm(CodedPolicy, CompiledPolicy):
    """Codes of 8, 6 or 4 bits by how sensitive a layer is, of all tokens or of those that the method `over` keeps.

    share: of the layers, of those that get 8 bits and of those that get 4.
    """

    METHOD = "qkvcomm"
    unit = per_unit(MIDDLE)

    share: float = 0.3
    residual: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "residual")
        at_least(self, 0, "share")
        at_most(self, 0.5, "share")
        super().__post_init__()

    @property
    def least_bits(self) -> float:
        return LOW

    @property
    def coding(self) -> PerTensor:
        return PerTensor(MIDDLE, residual=self.residual)

    def codings(self, layer: LayerView) -> PerTensor:
        heads = 1 if self.inner else layer.kv.keys.shape[1]
        return PerTensor(self.bits.get(layer.index, MIDDLE), heads, residual=self.residual)

    def neutral(self, view: PromptView) -> dict[str, Tensor]:
        return {"layers": torch.empty(0), "sensitivity": torch.empty(0)}

    @cached_property
    def bits(self) -> dict[int, int]:
        """Of each layer that policies see, by its number in the model; of none without constants."""
        loaded = self._loaded()
        if loaded is None:
            return {}
        layers, sensitivity = (loaded.tensors[name].tolist() for name in ("layers", "sensitivity"))
        return bits_of(dict(zip(layers, sensitivity, strict=True)), self.share)

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        if self.inner is None:
            return super().compress(view, budget)
        plain = sum(layer.kv.slot_bytes * layer.kv.keys.shape[1] for layer in view.layers) * budget
        slots = min(self.slots(budget, view.layers[0].kv), view.tokens)
        while True:  # a method that gives some layers more may give it to those of more bits
            kept = self.inner.compress(view, slots)
            live = read([kv.live for kv in kept])
            spent = sum(self.spent(*own) for own in zip(view.layers, kept, live, strict=True))
            if spent <= plain or slots == 1:
                return [self._encoded(*own) for own in zip(view.layers, kept, live, strict=True)]
            slots = max(1, min(slots - 1, slots * plain // spent))

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        return None if self.inner else super().per_layer(budget, sizes)

    def fitting(self, budget: int, keys: int, values: int, plain: int) -> int:
        """Of the same slots in every layer; `compress` sees to others."""
        own = [PerTensor(bits).slot_bytes(keys, values) + POSITION_BYTES for bits in self.bits.values() or [MIDDLE]]
        spare = ((budget - self.residual) * plain - SCALE_BYTES) * len(own)
        return max(budget, self.residual + spare // sum(own))

    def spent(self, layer: LayerView, kv: KV, live: Sequence[int]) -> int:
        """Return the bytes of a layer's slots, `live` of each head, once they are codes."""
        coding, dims = self.codings(layer), (kv.keys.shape[-1], kv.values.shape[-1])
        coded = [coding.coded(slots, kv) for slots in live]
        plain = (sum(live) - sum(coded)) * kv.slot_bytes
        return plain + sum(coding.nbytes(slots, *dims) for slots in coded)
