"""Limits on memory: sizes as typed, a cgroup where one can be made, an address space elsewhere, and that they hold."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.speed import memory_limit

pytestmark = pytest.mark.xdist_group("memory")
MIB = 2**20


def in_child(work: Callable[[], object]) -> object:
    """What `work` returns in a forked process, or the name of what it raises."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_report, args=(work, send))
    child.start()
    send.close()
    found: object = receive.recv()
    child.join()
    return found


def _report(work: Callable[[], object], send: Connection) -> None:
    try:
        send.send(work())
    except Exception as error:
        send.send(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("4GiB", 4 * 2**30), ("512MiB", 512 * MIB), ("512 mib", 512 * MIB), ("1.5GB", 1_500_000_000), (123, 123)),
        *(("2e9", 2_000_000_000), ("1k", 1000), ("3Ki", 3072), ("7B", 7), ("1TiB", 2**40)),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert memory_limit.parse_bytes(text) == expected


NO_SIZE = ("", "GiB", "4 apples", "-1", "1.2.3MiB", "4iB", "nan", "inf", "1e", "4GiBs")


@pytest.mark.parametrize(
    ("text", "says"),
    [*((text, "is no size; write 4GiB") for text in NO_SIZE), *((t, "leaves no memory") for t in ("0", "0GiB", "0.2"))],
)
def test_what_is_no_size(text: str, says: str) -> None:
    with pytest.raises(HarnessError, match=says):
        memory_limit.parse_bytes(text)


def test_the_peak_sees_what_was_held_and_let_go() -> None:
    def work() -> int:
        memory_limit.map_from(MIB)
        memory_limit.give_back()
        assert memory_limit.reset_peak()
        before = memory_limit.status_bytes("VmRSS")
        held = bytearray(os.urandom(64 * 1024)) * 16 * 64  # 64 MiB
        del held
        return memory_limit.peak_bytes() - before

    assert in_child(work) == pytest.approx(64 * MIB, rel=0.05)


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


def test_a_cgroup_where_one_can_be_made(groups: Path) -> None:
    limit = memory_limit.apply(1000 * 1024)
    assert limit == memory_limit.Limit("cgroup", 1000 * 1024)
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
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    asked: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(Path, "mkdir", refuse)
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
    def refuse(what: int, value: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    (groups / "user" / "cgroup.subtree_control").unlink()
    monkeypatch.setattr(resource, "setrlimit", refuse)
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
