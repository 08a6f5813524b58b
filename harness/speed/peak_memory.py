"""Peak memory of what runs after a start, in this process."""

import gc
import sys
from typing import Literal

import torch

from harness.errors import HarnessError
from harness.speed import memory_limit


class Meter:
    """Memory above what is held when it starts, and apart from it what the process keeps for itself.

    On a CPU the peak is VmHWM, reset at the start, less `stays`: what is resident once everything is freed and is no
    tensor. Those are pages of library code, and kernels made for shapes that were not met before. A process pays for
    them once and for every method alike, so they are none of a method's. A tensor that a policy keeps is its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind: Literal["resident set", "cuda allocated"]
        self.stays = 0
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.kind, self.before = "cuda allocated", torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            self.tensors = tensor_bytes()
            memory_limit.give_back()
            if not memory_limit.reset_peak():
                print("the peak cannot be reset here: that of the whole process is taken", file=sys.stderr)
            self.kind, self.before = "resident set", memory_limit.status_bytes("VmRSS")
        else:
            raise HarnessError(f"memory on device {str(device)!r} cannot be measured; give cpu or cuda")

    def peak(self) -> int:
        """Return the most bytes that were held above the start. Ask once, when what was measured is over."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        highest = memory_limit.peak_bytes()
        gc.collect()
        memory_limit.give_back()
        left = memory_limit.status_bytes("VmRSS") - self.before
        self.stays = max(0, left - max(0, tensor_bytes() - self.tensors))
        return max(0, highest - self.before - self.stays)


def tensor_bytes() -> int:
    """Count the bytes of the CPU tensors that this process holds, those frozen by `gc.freeze` apart."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
