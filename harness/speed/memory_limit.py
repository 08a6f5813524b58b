"""Memory of this process: what it holds, the peak of what runs in it, and a hard limit on it (Linux).

A limit is a cgroup v2 of its own where one can be made, else an address space (RLIMIT_AS) that leaves room for the
limit above what is mapped but not resident, such as libraries: resident plus new mappings stay below the limit.
"""

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from harness.errors import HarnessError

PROC = Path("/proc/self")
MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt
HOLES = range(24, 15, -1)  # powers of two of bytes: 16 MiB to 64 KiB
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limit:
    """A limit in force."""

    kind: Literal["cgroup", "address space", "allocator fraction"]
    bytes: int
    note: str = ""
    """Why it is not of the better kind, and what may soften it; empty where there is nothing to say."""


def status_bytes(field: str) -> int:
    """Read a field of /proc/self/status in bytes: VmRSS (resident), VmHWM (its peak), VmSize (mapped), VmSwap."""
    lines = (PROC / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def reset_peak() -> bool:
    """Set VmHWM back to the present; False where the system refuses."""
    try:
        (PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the most bytes that were resident since `reset_peak`; where that was refused, since the start."""
    try:
        return status_bytes("VmHWM")
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Return freed heap to the system, so that it hides nothing that is allocated later (glibc only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def map_from(size: int) -> None:
    """Map every allocation from `size` bytes on by itself, so that it is gone once freed (glibc only).

    Also stops glibc from raising that size on its own as memory is freed.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 returns. arena: bytes of the heap."""

    _fields_ = (("arena", ctypes.c_size_t), ("others", ctypes.c_size_t * 9))


def fill_holes() -> int:
    """Take the free blocks inside the heap for good, untouched, so that large allocations are mapped (glibc only).

    An allocation of any size goes into a hole that fits it, and what is freed there stays resident, whatever
    `map_from` says; nor does an address-space limit see it. Call `map_from` afterwards: this changes its sizes. Returns
    the bytes taken, none of them resident.
    """
    taken = 0
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        heap, malloc, free = libc.mallinfo2, libc.malloc, libc.free
        heap.restype, malloc.restype = _Heap, ctypes.c_void_p
        malloc.argtypes, free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
        for option, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 0), (M_TOP_PAD, 0)):
            libc.mallopt(option, value)
        give_back()
        for size in (2**power for power in HOLES):
            before = heap().arena
            while (block := malloc(size)) is not None:
                if heap().arena > before:  # no hole of that size is left
                    free(block)
                    break
                taken += size
        give_back()
        libc.mallopt(M_TOP_PAD, 2**17)  # as glibc sets it
    return taken


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


def apply(limit_bytes: int) -> Limit:
    """Hold this process below `limit_bytes`, what it holds already included.

    Raises MemoryError when it holds more than that already, HarnessError where no limit can be set.
    """
    resident = status_bytes("VmRSS")
    if limit_bytes <= resident:
        raise MemoryError(f"a limit of {limit_bytes} bytes is not above the {resident} that the loaded model takes")
    refused = join_cgroup(limit_bytes - resident)
    if not refused:
        return Limit("cgroup", limit_bytes)
    limit_address_space(limit_bytes, resident)
    note = f"no cgroup of its own: {refused}"
    if swapped := swap()[1]:
        note += f"; {swapped} bytes of swap are in use, so peaks of resident memory may come out too low"
    return Limit("address space", limit_bytes, note)


def limit_address_space(limit_bytes: int, resident: int) -> None:
    """Set RLIMIT_AS to what is mapped but not resident, plus the limit. Raises HarnessError where it is refused."""
    wanted = status_bytes("VmSize") - resident + limit_bytes
    try:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))
    except (OSError, ValueError) as error:
        raise HarnessError(f"memory cannot be limited to {limit_bytes} bytes here: {error}") from None


def join_cgroup(room: int) -> str:
    """Move this process into a cgroup v2 of its own with `room` bytes and no swap; return why it cannot, or "".

    What was allocated before stays with the old cgroup, so `room` is of new memory alone.
    """
    parent = _delegated()
    if parent is None:
        return "no cgroup v2 with a memory controller that may be divided"
    own = _own_group(parent, os.getpid())
    try:
        own.mkdir()
        (own / "memory.max").write_text(str(room), encoding="ascii")
        with suppress(FileNotFoundError):  # a kernel without swap accounting
            (own / "memory.swap.max").write_text("0", encoding="ascii")
        (own / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    except OSError as error:
        with suppress(OSError):
            own.rmdir()
        return error.strerror or str(error)
    return ""


def leave_cgroup(pid: int) -> None:
    """Remove the cgroup of a process that has ended, if it made one."""
    parent = _delegated()
    if parent is not None:
        with suppress(OSError):
            _own_group(parent, pid).rmdir()


def swap(meminfo: Path = MEMINFO) -> tuple[int, int]:
    """Return this machine's bytes of swap, and those of them in use; none where the system does not tell."""
    try:
        pairs = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        total, free = (int(pairs.get(name, "0").split()[0]) * 1024 for name in ("SwapTotal", "SwapFree"))
    except (OSError, ValueError):
        return 0, 0
    return total, total - free


def _own_group(parent: Path, pid: int) -> Path:
    return parent / f"kv-harness-probe-{pid}"


def _delegated() -> Path | None:
    """The cgroup, this process's or the one above, that hands its memory controller on to groups below it."""
    try:
        lines = (PROC / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for here in [CGROUPS / line[3:].lstrip("/") for line in lines if line.startswith("0::")]:
        for group in (here, here.parent) if here != CGROUPS else (here,):
            with suppress(OSError):
                if "memory" in (group / "cgroup.subtree_control").read_text(encoding="ascii").split():
                    return group
    return None


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
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.kind, self.before = "cuda allocated", torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            self.tensors = tensor_bytes()
            give_back()
            if not reset_peak():
                print("the peak cannot be reset here: that of the whole process is taken", file=sys.stderr)
            self.kind, self.before = "resident set", status_bytes("VmRSS")
        else:
            raise HarnessError(f"memory on device {str(device)!r} cannot be measured; give cpu or cuda")

    def peak(self) -> int:
        """Return the most bytes that were held above the start. Ask once, when what was measured is over."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        highest = peak_bytes()
        gc.collect()
        give_back()
        left = status_bytes("VmRSS") - self.before
        self.stays = max(0, left - max(0, tensor_bytes() - self.tensors))
        return max(0, highest - self.before - self.stays)

    def reserved(self) -> int | None:
        """Return the most bytes that the CUDA allocator had from the device, the model's included; None on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None


def tensor_bytes() -> int:
    """Count the bytes of the CPU tensors that this process holds, those frozen by `gc.freeze` apart."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
