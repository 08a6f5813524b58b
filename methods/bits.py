"""Codes of 1 to 8 bits, packed without a gap: 3 bits take 3 bytes for 8 codes."""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor


def packed(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., D] uint8 below 2 ** bits into bytes [..., D * bits / 8]; D must be divided by `per_unit`.

    Sizes that are no power of two are split into such (3 bits: 2 and 1), the lower bits first. Of each the first part
    of the channels lies in the lowest bits of the bytes, the next ones above.
    """
    found = [_together(codes >> low & (1 << width) - 1, width) for width, low in _planes(bits)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def unpacked(held: Tensor, bits: int) -> Tensor:
    """Return the codes [..., D] that `packed` made into `held`."""
    dim = held.shape[-1] * 8 // bits
    parts = torch.split(held, [dim * width // 8 for width, _ in _planes(bits)], dim=-1)
    planes = (_apart(part, width) << low for part, (width, low) in zip(parts, _planes(bits), strict=True))
    return reduce(torch.bitwise_or, planes)


def per_unit(bits: int) -> int:
    """Return how many codes fill whole bytes; `packed` takes multiples of it."""
    return 8 // (bits & -bits)


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """Sizes that are powers of two, largest first, and the bit that each begins at."""
    low = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, low
            low += width


def _together(codes: Tensor, width: int) -> Tensor:
    parts = codes.chunk(8 // width, dim=-1)
    return reduce(torch.bitwise_or, (part << at * width for at, part in enumerate(parts)))


def _apart(held: Tensor, width: int) -> Tensor:
    if width == 8:
        return held
    return torch.cat([held >> at & (1 << width) - 1 for at in range(0, 8, width)], dim=-1)
