"""Numbers on their way between host and device, so that a GPU is waited for once and not once a layer."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from methods.budget import PolicyError


def placed(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return numbers of the host as a tensor of `device`, which nothing waits for: a GPU copies from pinned memory."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def read(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Return the numbers of tensors of one type, each flat: a GPU is waited for once."""
    flat = torch.cat([x.reshape(-1).to(tensors[0].device) for x in tensors]).tolist()
    ends = accumulate(x.numel() for x in tensors)
    return [flat[end - x.numel() : end] for x, end in zip(tensors, ends, strict=True)]


class Doubt(NamedTuple):
    """What is wrong where a count is not 0. flaws: the count, [] int64. told: the error, from the count."""

    flaws: Tensor
    told: Callable[[int], str]


def settle(doubts: Sequence[Doubt]) -> None:
    """Raise PolicyError for the first doubt that is right. Devices are read once for all of them."""
    counts = read([doubt.flaws for doubt in doubts]) if doubts else []
    for doubt, (count,) in zip(doubts, counts, strict=True):
        if count:
            raise PolicyError(doubt.told(count))
