"""What only a CUDA card can do, and its stand-in: time by its own clock, memory by its allocator.

`NoCard` runs everything once on the CPU and tells nothing of it: a rehearsal has no figures.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.speed.gpu import describe


class Card:
    """The CUDA device of this process."""

    rehearsal = False
    device = torch.device("cuda")
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    """Attention kernels of torch that are tried."""

    def facts(self) -> dict[str, Any]:
        """What the card is and how it runs at this moment."""
        own = describe(self.device)["gpu"]
        return {"device": own["name"], "cuda": torch.version.cuda, **own}

    def ms(self, call: Callable[[], Any], *, repeat: int = 10, warm: int = 2) -> float | None:
        """Median milliseconds of a call by events, after some that are not counted."""
        for _ in range(warm):
            call()
        spent = []
        for _ in range(repeat):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
            spent.append(first.elapsed_time(last))
        return median(spent)

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Most bytes that a call allocates above what is held."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def held(self) -> int | None:
        """Bytes that tensors hold now."""
        return torch.cuda.memory_allocated()

    def backend(self, name: str) -> AbstractContextManager[Any]:
        """Inside, torch's attention is computed by that kernel or not at all."""
        return sdpa_kernel(getattr(SDPBackend, name))

    def free(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        with suppress(RuntimeError):  # of a card that is no longer usable, which `alive` tells
            torch.cuda.empty_cache()

    def alive(self) -> bool:
        """Say whether the card still takes work from this process: after some errors it takes no more."""
        try:
            torch.ones(1, device=self.device).item()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False
        return True


class NoCard(Card):
    """A CPU in its place: every call is made once, and no figure comes of it."""

    rehearsal = True
    device = torch.device("cpu")
    backends = ("MATH",)

    def facts(self) -> dict[str, Any]:
        return {"device": "cpu"}

    def ms(self, call: Callable[[], Any], *, repeat: int = 10, warm: int = 2) -> float | None:
        call()
        return None

    def peak(self, call: Callable[[], Any]) -> int | None:
        call()
        return None

    def held(self) -> int | None:
        return None

    def free(self) -> None: ...

    def alive(self) -> bool:
        return True
