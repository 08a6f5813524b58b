"""Memory of a process: sizes as typed, limits that hold, peaks that see what is held and nothing else."""

import ctypes
import multiprocessing
import os
import resource
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.engine.compress import Compressed
from harness.errors import HarnessError
from harness.records.measured import ProbeSpec
from harness.speed import memory_limit
from harness.speed.asked import parse_bytes
from harness.speed.children import run_job
from harness.speed.client import Job
from harness.speed.memory_limit import Meter, tensor_bytes
from harness.speed.one_method import Isolated
from harness.speed.server import ServerReady, fork

pytestmark = pytest.mark.xdist_group("memory")
MIB = 2**20


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked process, whose heap is its own from then on, or the name of what it raises."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_report, args=(work, send))
    child.start()
    send.close()
    found = receive.recv()
    child.join()
    return found


def _report(work: Callable[[], Any], send: Connection) -> None:
    try:
        send.send(work())
    except Exception as error:
        send.send(f"{type(error).__name__}: {error}")


SIZES = {
    **{"4GiB": 4 * 2**30, "512MiB": 512 * MIB, "512 mib": 512 * MIB, "1.5GB": 1_500_000_000, 123: 123},
    **{"2e9": 2_000_000_000, "1k": 1000, "3Ki": 3072, "7B": 7, "1TiB": 2**40},
}


def test_sizes() -> None:
    assert {text: parse_bytes(text) for text in SIZES} == SIZES


NO_SIZE = ("", "GiB", "4 apples", "-1", "1.2.3MiB", "4iB", "nan", "inf", "1e", "4GiBs")


@pytest.mark.parametrize(
    ("text", "says"),
    [*((text, "is no size; write 4GiB") for text in NO_SIZE), *((t, "leaves no memory") for t in ("0", "0GiB", "0.2"))],
)
def test_what_is_no_size(text: str, says: str) -> None:
    with pytest.raises(HarnessError, match=says):
        parse_bytes(text)


def test_the_peak_sees_what_was_held_and_let_go() -> None:
    def work() -> int:
        memory_limit.map_from(MIB)
        memory_limit.give_back()
        assert memory_limit.reset_peak()
        before = memory_limit.status_bytes("VmRSS")
        held = bytearray(os.urandom(64 * 1024)) * 16 * 64  # 64 MiB
        del held
        return memory_limit.peak_bytes() - before

    most = max(in_child(work) for _ in range(12))  # a system short of memory takes pages of code away meanwhile
    assert most == pytest.approx(64 * MIB, rel=0.25)


def test_heap_that_was_freed_does_not_hide_what_comes_after() -> None:
    def work() -> int:
        memory_limit.map_from(32 * MIB)
        small = [bytearray(b"x" * 4096) for _ in range(8192)]  # 32 MiB of heap
        top = bytearray(b"x" * 4096)
        del small
        memory_limit.give_back()
        memory_limit.reset_peak()
        before = memory_limit.status_bytes("VmRSS")
        held = bytearray(b"x") * (16 * MIB)
        assert held[-1] == top[-1]
        return memory_limit.peak_bytes() - before

    assert in_child(work) == pytest.approx(16 * MIB, rel=0.1)


def test_a_peak_that_cannot_be_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "PROC", tmp_path / "nothing")
    assert not memory_limit.reset_peak()
    assert memory_limit.peak_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended cgroup v2 tree: this process in user/session, the memory controller handed on by user."""
    proc, tree = tmp_path / "proc", tmp_path / "tree"
    (tree / "user" / "session").mkdir(parents=True)
    proc.mkdir()
    (proc / "cgroup").write_text("4:memory:/old\n0::/user/session\n")
    (proc / "status").write_text("VmSize:  900 kB\nVmRSS:  100 kB\n")
    (tree / "user" / "cgroup.subtree_control").write_text("cpu memory\n")
    (tree / "user" / "session" / "cgroup.subtree_control").write_text("\n")
    monkeypatch.setattr(memory_limit, "PROC", proc)
    monkeypatch.setattr(memory_limit, "CGROUPS", tree)
    return tree


def _refuse(error: Exception, *_: object) -> None:
    raise error


def test_a_cgroup_where_one_can_be_made(groups: Path) -> None:
    assert memory_limit.apply(1000 * 1024) == memory_limit.Limit("cgroup", 1000 * 1024)
    own = groups / "user" / f"kv-harness-probe-{os.getpid()}"
    assert (own / "memory.max").read_text() == str(900 * 1024)  # what is resident stays with the old group
    assert (own / "memory.swap.max").read_text() == "0"
    assert (own / "cgroup.procs").read_text() == str(os.getpid())


def test_the_cgroup_of_an_ended_process_is_removed(groups: Path) -> None:
    own = groups / "user" / "kv-harness-probe-77"
    own.mkdir()
    memory_limit.leave_cgroup(77)
    assert not own.exists()
    memory_limit.leave_cgroup(78)


def test_without_permission_it_is_an_address_space_and_says_so(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(Path, "mkdir", lambda _: _refuse(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(resource, "setrlimit", lambda what, value: asked.append((what, value)))
    monkeypatch.setattr(memory_limit, "swap", lambda: (8192, 0))
    limit = memory_limit.apply(1000 * 1024)
    assert limit == memory_limit.Limit("address space", 1000 * 1024, "no cgroup of its own: Permission denied")
    assert asked == [(resource.RLIMIT_AS, (1800 * 1024, 1800 * 1024))]


def test_swap_in_use_is_noted(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (groups / "user" / "cgroup.subtree_control").write_text("cpu\n")
    monkeypatch.setattr(resource, "setrlimit", lambda what, value: None)
    monkeypatch.setattr(memory_limit, "swap", lambda: (8192, 4096))
    limit = memory_limit.apply(1000 * 1024)
    assert limit.kind == "address space"
    assert "no cgroup v2 with a memory controller" in limit.note and "4096 bytes of swap are in use" in limit.note


def test_a_limit_that_the_system_refuses(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (groups / "user" / "cgroup.subtree_control").unlink()
    monkeypatch.setattr(resource, "setrlimit", partial(_refuse, ValueError("not allowed to raise maximum limit")))
    with pytest.raises(HarnessError, match="memory cannot be limited to 1024000 bytes here: not allowed"):
        memory_limit.apply(1000 * 1024)


def test_a_limit_below_what_is_resident(groups: Path) -> None:
    with pytest.raises(MemoryError, match="a limit of 102400 bytes is not above the 102400 that the loaded model"):
        memory_limit.apply(100 * 1024)


@pytest.mark.parametrize(("extra", "expected"), [(32, "ok"), (96, "MemoryError: ")])
def test_the_address_space_holds(extra: int, expected: str) -> None:
    def work() -> str:
        memory_limit.fill_holes()  # the heap of a long test session may hold 96 MiB that no limit sees
        resident = memory_limit.status_bytes("VmRSS")
        memory_limit.limit_address_space(resident + 64 * MIB, resident)
        bytearray(extra * MIB)
        return "ok"

    assert in_child(work) == expected


def test_an_extra_allocation_is_seen(ready: ServerReady, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB that live inside one prefill are in the peak, even where a warm-up held as much before."""
    plain = Isolated.prefill

    def greedy(self: Isolated, ids: list[int]) -> Compressed:
        held = torch.ones(64 * MIB // 4)
        done = plain(self, ids)
        assert held[-1] == 1
        return done

    def peak() -> int:
        spec = ProbeSpec(method="snapkv", budget="20", tokens=90, batch=2, new_tokens=4, rounds=2)
        found = run_job(partial(fork, ready, 1), Job(spec=spec), 60).result
        assert found is not None and found.measured is not None
        return found.measured.peak_bytes

    before = peak()
    monkeypatch.setattr(Isolated, "prefill", greedy)
    assert peak() - before == pytest.approx(64 * MIB, abs=3 * MIB)


@pytest.mark.parametrize(
    ("make", "peak", "stays"),
    [(lambda: bytearray(32 * MIB), 64, 32), (lambda: torch.ones(32 * MIB // 4), 96, 0)],
    ids=["no tensor: the process's own", "a tensor: the method's"],
)
def test_what_stays(make: Callable[[], object], peak: int, stays: int) -> None:
    def work() -> tuple[int, int, bool]:
        meter = Meter(torch.device("cpu"))
        kept, passing = make(), torch.ones(64 * MIB // 4)
        del passing
        return meter.peak(), meter.stays, kept is None

    assert in_child(work)[:2] == pytest.approx((peak * MIB, stays * MIB), abs=4 * MIB)


def test_tensors_are_counted_once() -> None:
    before = tensor_bytes()
    held = torch.zeros(1000)
    views = held[10:], held.view(10, 100)
    assert tensor_bytes() - before == 4000 and len(views) == 2


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
@pytest.mark.parametrize("filled", [False, True])
def test_what_is_freed_in_a_hole_of_the_heap_does_not_stay_resident(filled: bool) -> None:
    """A hole is made between blocks; without `fill_holes` a large block goes there and stays when it is freed."""

    def work() -> tuple[bool, bool, int]:
        memory_limit.fill_holes()  # those that earlier tests left
        memory_limit.map_from(2**25)  # what follows comes from the heap
        hole, pin = torch.ones(8 * MIB // 4), [bytes(MIB) for _ in range(3)]  # too large for what `fill_holes` leaves
        del hole
        memory_limit.give_back()
        taken = memory_limit.fill_holes() if filled else 0
        memory_limit.map_from(2**17)
        before = memory_limit.status_bytes("VmRSS")
        large = torch.ones(6 * MIB // 4)
        del large
        return memory_limit.status_bytes("VmRSS") - before > 5 * MIB, taken >= 7 * MIB, len(pin)

    assert in_child(work) == (not filled, filled, 3)


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1750)
    meter = Meter(torch.device("cuda"))
    assert asked == ["wait", "empty", "reset"]
    assert (meter.kind, meter.before, meter.peak(), meter.reserved()) == ("cuda allocated", 1000, 750, 4000)
    assert Meter(torch.device("cpu")).reserved() is None


def test_a_device_whose_memory_cannot_be_measured() -> None:
    with pytest.raises(HarnessError, match="memory on device 'mps' cannot be measured; give cpu or cuda"):
        Meter(torch.device("mps"))
