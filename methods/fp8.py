"""FP8 cache: keys and values as 8-bit floating-point numbers, as inference engines store them.

Source: OCP 8-bit floating point, https://arxiv.org/abs/2209.05433; what engines do with it is in vLLM's documentation,
docs/features/quantization/quantized_kvcache.md (`kv_cache_dtype="fp8"`, without calibration all scales are 1), and
SGLang's (`--kv-cache-dtype fp8_e4m3` or `fp8_e5m2`). A number is divided by its scale, cut off at the largest that the
format has, and rounded. `@unscaled` is that default, `@e5m2` the wider and coarser format, which has no scales there.
With `over` a budget of N buys the bytes of N plain slots, as for `quant`.
Differences: the scale is the prompt's own largest number of a KV head by the format's largest, one for keys and one for
values, where engines calibrate one of a layer or of a head on other prompts; tokens that come later keep it, cut off as
in engines. Codes are decoded before attention, whose queries stay as they are. The last slot of every head is plain, as
a prompt's last token is fed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from methods.coded import CodedPolicy
from methods.registry import method
from methods.slotwise import SlotCoding

Format = Literal["e4m3", "e5m2"]
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALE_BYTES = 4  # float32
PRESETS: dict[str, dict[str, Any]] = {
    "e4m3": {},
    "unscaled": {"scaled": False},
    "e5m2": {"format": "e5m2", "scaled": False},
    "snapkv": {"over": "snapkv"},
}


@method(
    "fp8",
    paper="https://arxiv.org/abs/2209.05433",
    presets=PRESETS,
)
@dataclass(frozen=True)
class Fp8(CodedPolicy):
    """Floating-point numbers of 8 bits, of all tokens or of those that the method `over` keeps."""

    format: Format = "e4m3"
    scaled: bool = True

    @property
    def least_bits(self) -> float:
        return 8

    @property
    def coding(self) -> "Floats":
        return Floats(self.format, self.scaled)


@dataclass(frozen=True)
class Floats(SlotCoding):
    """format: of the numbers. scaled: whether a stream has a scale for keys and one for values; else it is 1."""

    format: Format
    scale: bool

    def slot_bytes(self, key_dim: int, value_dim: int) -> int:
        return key_dim + value_dim

    @property
    def head_bytes(self) -> int:
        return 2 * SCALE_BYTES * self.scale

    def fixed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        if not self.scale:
            return ()
        highest = torch.finfo(FORMATS[self.format]).max
        return tuple(x.abs().amax(dim=(1, 2), keepdim=True).float() / highest for x in (keys, values))

    def held(self, keys: Tensor, values: Tensor, fixed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._coded(x, scale) for x, scale in zip((keys, values), fixed or (None, None), strict=True))

    def read(self, held: Sequence[Tensor], fixed: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        for out, x, scale in zip((keys, values), held, fixed or (None, None), strict=True):
            numbers = self._numbers(x)
            out.copy_(numbers if scale is None else numbers.mul_(scale))

    def scaled(self, held: Sequence[Tensor], fixed: Sequence[Tensor]) -> Sequence[Tensor]:
        return fixed or [self._numbers(x) for x in held]

    def _numbers(self, held: Tensor) -> Tensor:
        return held.view(FORMATS[self.format]).float()

    def _coded(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Bytes [n, C, D] uint8 of numbers; one that is not finite becomes NaN, any other the nearest there is."""
        x, kind = x.float(), FORMATS[self.format]
        if scale is not None:
            x = x / scale.masked_fill(scale == 0, 1.0)
        highest = torch.finfo(kind).max
        return x.clamp(-highest, highest).where(x.isfinite(), torch.nan).to(kind).view(torch.uint8)
