"""Peak memory: what is held is seen, what a process keeps for itself is apart, holes of the heap hide nothing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest
import torch

from harness.errors import HarnessError
from harness.records.measured import ProbeSpec
from harness.speed import memory_limit
from harness.speed.client import Job
from harness.speed.peak_memory import Meter, tensor_bytes
from harness.speed.server import Forked, ServerReady

pytestmark = pytest.mark.xdist_group("memory")
MIB = 2**20
SPEC = ProbeSpec(method="snapkv", budget="20", tokens=90, batch=2, new_tokens=4, rounds=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ready() -> ServerReady:
    return ServerReady.load("tiny", dtype="float32", device="cpu")


def in_child(act: Callable[[], bool]) -> bool:
    """What `act` returns in a forked process, whose heap is its own from then on."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            code = 0 if act() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_an_extra_allocation_is_seen(ready: ServerReady, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB that live inside one prefill are in the peak, even where a warm-up held as much before."""
    from harness.engine.compress import Compressed
    from harness.speed.one_method import Isolated

    plain = Isolated.prefill

    def greedy(self: Isolated, ids: list[int]) -> Compressed:
        held = torch.ones(64 * MIB // 4)
        done = plain(self, ids)
        assert held[-1] == 1
        return done

    def peak() -> int:
        found = Forked(ready, 1).run(Job(spec=SPEC), 60).result
        assert found is not None and found.measured is not None
        return found.measured.peak_bytes

    before = peak()
    monkeypatch.setattr(Isolated, "prefill", greedy)
    assert peak() - before == pytest.approx(64 * MIB, abs=3 * MIB)


def test_what_stays_and_is_no_tensor_is_the_processs_own() -> None:
    def act() -> bool:
        meter = Meter(CPU)
        kept = bytearray(32 * MIB)
        passing = torch.ones(64 * MIB // 4)
        del passing
        found = meter.peak()
        return len(kept) == 32 * MIB and abs(meter.stays - 32 * MIB) < 4 * MIB and abs(found - 64 * MIB) < 4 * MIB

    assert in_child(act)


def test_a_tensor_that_stays_is_the_methods() -> None:
    def act() -> bool:
        meter = Meter(CPU)
        kept = torch.ones(32 * MIB // 4)
        found = meter.peak()
        return kept.nbytes == 32 * MIB and meter.stays < 4 * MIB and abs(found - 32 * MIB) < 4 * MIB

    assert in_child(act)


def test_tensors_are_counted_once() -> None:
    before = tensor_bytes()
    held = torch.zeros(1000)
    views = held[10:], held.view(10, 100)
    assert tensor_bytes() - before == 4000 and len(views) == 2


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
def test_what_is_freed_in_a_hole_of_the_heap_does_not_stay_resident() -> None:
    """A hole is made between small blocks; without `fill_holes` a large block goes there and stays when it is freed."""

    def left(filled: bool) -> Callable[[], bool]:
        def act() -> bool:
            memory_limit.fill_holes()  # those that earlier tests left
            memory_limit.map_from(2**25)  # what follows comes from the heap
            hole, pin = torch.ones(8 * MIB // 4), [bytes(5000) for _ in range(100)]
            del hole
            memory_limit.give_back()
            taken = memory_limit.fill_holes() if filled else 0
            memory_limit.map_from(2**17)
            before = memory_limit.status_bytes("VmRSS")
            large = torch.ones(6 * MIB // 4)
            del large
            stays = memory_limit.status_bytes("VmRSS") - before > 5 * MIB
            return len(pin) == 100 and stays != filled and (taken >= 7 * MIB) == filled

        return act

    assert in_child(left(False)) and in_child(left(True))


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1750)
    meter = Meter(torch.device("cuda"))
    assert asked == ["wait", "reset"]
    assert (meter.kind, meter.before, meter.peak()) == ("cuda allocated", 1000, 750)


def test_a_device_whose_memory_cannot_be_measured() -> None:
    with pytest.raises(HarnessError, match="memory on device 'mps' cannot be measured; give cpu or cuda"):
        Meter(torch.device("mps"))
