"""The pool of actors on a real Ray of this machine."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle, exceptions
from ray.util import placement_group_table

from harness.errors import HarnessError
from harness.run import ray_pool
from harness.run.ray_pool import Handler, RayPool, WorkerShape, connected
from harness.run.schedule import Done, Event, Lost, Raised, Refused, Schedule, WorkerReady

pytestmark = pytest.mark.xdist_group("ray")
Call = Callable[[], Any]
WAIT_S = 120.0  # until a test gives up
ONE = WorkerShape()


@pytest.fixture(scope="module", autouse=True)
def _ray(cluster: str) -> Iterator[None]:
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # workers need not find the tests
    ray.init(address=cluster, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(here)


def calls() -> tuple[Handler[Call, Any], Mapping[str, Any]]:
    """A handler whose work is functions to call."""
    about = {"pid": os.getpid(), "gpus": ray.get_gpu_ids()}
    return lambda work, careful: [careful if call is None else call() for call in work], about


def fail(error: Exception | None = None) -> None:
    raise error or RuntimeError(threading.Lock())  # which cannot be pickled


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def until(path: Path) -> Call:
    """Waits for a file."""

    def call() -> str:
        while not path.exists():
            time.sleep(0.01)
        return "late"

    return call


@contextmanager
def pool_of(
    size: int = 1, make: Callable[[], Any] = calls, shape: WorkerShape = ONE, **options: Any
) -> Iterator[RayPool[Call, Any]]:
    pool = RayPool[Call, Any](make, size=size, shape=shape, **options)
    try:
        yield pool
    finally:
        pool.stop()


def events(pool: RayPool[Call, Any], count: int) -> list[Event[Any]]:
    """The next `count` of them."""
    found: list[Event[Any]] = []
    deadline = time.monotonic() + WAIT_S
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += pool.wait(1.0)
    assert len(found) == count
    return found


def one(pool: RayPool[Call, Any], worker: int, *work: Call | None, careful: bool = False) -> Event[Any]:
    """What comes of one bundle."""
    pool.submit(worker, work, careful=careful)  # type: ignore[arg-type]
    return events(pool, 1)[0]


def test_results_come_in_order_of_completion(tmp_path: Path) -> None:
    told: dict[int, Mapping[str, Any]] = {}
    with pool_of(2, accept=told.__setitem__) as pool:
        assert pool.starting == 2
        assert {event.worker for event in events(pool, 2) if isinstance(event, WorkerReady)} == {0, 1}
        assert pool.starting == 0 and told[0]["pid"] != told[1]["pid"]
        assert told[0]["host"] == socket.gethostname() and abs(told[0]["time"] - time.time()) < WAIT_S
        pool.submit(0, [until(tmp_path / "go"), os.getpid], careful=False)
        pool.submit(1, [os.getpid], careful=False)
        pool.submit(1, [lambda: "second"], careful=False)
        found = events(pool, 1) + events(pool, 1)
        (tmp_path / "go").touch()
        found += events(pool, 1)
        assert all(isinstance(event, Done) and event.seconds > 0 for event in found)
        results = [(event.worker, event.results) for event in found if isinstance(event, Done)]
        assert results == [(1, [told[1]["pid"]]), (1, ["second"]), (0, ["late", told[0]["pid"]])]
        assert pool.wait(0) == []  # no work, no event


def test_a_killed_worker_is_lost_and_another_one_takes_its_place() -> None:
    lines: list[str] = []
    with pool_of(tell=lambda worker, line: lines.append(line)) as pool:
        events(pool, 1)
        pool.submit(0, [die], careful=False)
        pool.submit(0, [os.getpid], careful=False)  # is lost with it
        (lost,) = events(pool, 1)
        assert isinstance(lost, Lost) and (lost.worker, lost.node, lost.memory) == (0, False, False)
        assert lost.why.startswith("ActorDiedError: The actor is dead because its worker process has died")
        assert lines == [f"lost: {lost.why}"] and "\n" not in lost.why
        pool.replace(0)
        assert events(pool, 1) == [WorkerReady(1)]
        assert one(pool, 1, lambda: 1).results == [1]  # type: ignore[union-attr]


def test_refusals_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(make=partial(fail, FileNotFoundError(2, "no such file", "weights"))) as pool:
        (event,) = events(pool, 1)
        assert isinstance(event, Refused) and event.why.startswith("FileNotFoundError: ") and "weights" in event.why
    with pool_of(accept=lambda worker, about: fail(HarnessError("has other versions"))) as pool:
        assert events(pool, 1) == [Refused(0, "has other versions")] and pool.starting == 0
    refuse = partial(fail, HarnessError("model m is not here"))
    with pool_of(make=refuse) as pool, pytest.raises(HarnessError, match="^model m is not here$"):
        list(Schedule([os.getpid], pool, timeout_s=WAIT_S).run())
    assert pool.starting == 0
    monkeypatch.setattr(ray_pool, "DIED_STARTING", 1)
    with pool_of(make=die) as pool, pytest.raises(HarnessError, match="^workers die before they are ready"):
        list(Schedule([os.getpid], pool, timeout_s=WAIT_S).run())
    assert pool.starting == 0


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stopping_ends_all_workers_even_busy_ones(tmp_path: Path) -> None:
    told: dict[int, Mapping[str, Any]] = {}
    with pool_of(2, accept=told.__setitem__) as pool:
        events(pool, 2)
        pool.submit(0, [until(tmp_path / "never")], careful=False)
    eventually(lambda: not any(psutil.pid_exists(about["pid"]) for about in told.values()))
    pool.stop()  # twice is fine
    assert pool.starting == 0 and pool.wait(0) == []


def test_a_worker_with_several_gpus_has_a_placement_group() -> None:
    told: dict[int, Mapping[str, Any]] = {}
    shape = WorkerShape(cpus=1, gpus=2)
    with pool_of(shape=shape, accept=told.__setitem__) as pool:
        assert events(pool, 1) == [WorkerReady(0)] and len(told[0]["gpus"]) == 2
        (group,) = [own for own in placement_group_table().values() if own["state"] == "CREATED"]
        assert group["strategy"] == "STRICT_PACK" and list(group["bundles"].values()) == [shape.resources]
        assert one(pool, 0, lambda: "here").results == ["here"]  # type: ignore[union-attr]
    eventually(lambda: {own["state"] for own in placement_group_table().values()} == {"REMOVED"})
    with pool_of(shape=WorkerShape(gpus=1), accept=told.__setitem__) as pool:
        assert events(pool, 1) == [WorkerReady(0)] and len(told[0]["gpus"]) == 1
    assert len(placement_group_table()) == 1


LINES: list[tuple[int, str]] = []


@pytest.fixture(scope="module")
def ready_pool(_ray: None) -> Iterator[RayPool[Call, Any]]:
    """One worker, which logs into LINES. Its tests leave it alive and idle."""
    with pool_of(tell=lambda worker, line: LINES.append((worker, line))) as pool:
        assert events(pool, 1) == [WorkerReady(0)]
        yield pool


def test_care_and_logged_lines_go_both_ways(ready_pool: RayPool[Call, Any]) -> None:
    for careful in (False, True):
        assert one(ready_pool, 0, None, careful=careful).results == [careful]  # type: ignore[union-attr]
    assert LINES == []
    one(ready_pool, 0, lambda: logging.getLogger("harness").warning("%d left", 3))
    assert LINES == [(0, "3 left")]


def test_an_exception_leaves_the_worker_alive(ready_pool: RayPool[Call, Any]) -> None:
    for error, told in (
        (ValueError("two\nlines"), Raised(0, "ValueError: two lines")),
        (MemoryError("no room"), Raised(0, "MemoryError: no room", memory=True)),
        (HarnessError("told"), Raised(0, "told")),
    ):
        assert one(ready_pool, 0, partial(fail, error)) == told
    strange = one(ready_pool, 0, fail, os.getpid)
    assert isinstance(strange, Raised) and "RuntimeError" in strange.why and "\n" not in strange.why
    assert isinstance(one(ready_pool, 0, os.getpid), Done)


ENDS = [
    (exceptions.NodeDiedError("gone"), True, False),
    (exceptions.ActorUnavailableError("no answer", None), True, False),
    (exceptions.ObjectLostError("ab", None, ""), True, False),
    (exceptions.OutOfMemoryError("2 worker(s) were killed due to the node running low on memory."), False, True),
    (exceptions.WorkerCrashedError(), False, False),
    (exceptions.GetTimeoutError("slow"), False, False),
]


@pytest.mark.parametrize(("error", "node", "memory"), ENDS, ids=lambda value: type(value).__name__)
def test_whose_fault_an_end_is(ready_pool: RayPool[Call, Any], error: Exception, node: bool, memory: bool) -> None:
    lost = ready_pool._lost(0, error)
    assert isinstance(lost, Lost) and (lost.node, lost.memory) == (node, memory)
    assert lost.why.startswith(type(error).__name__) and len(lost.why) < 250


def test_a_full_object_store_is_no_room(ready_pool: RayPool[Call, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(work: Sequence[Call], careful: bool) -> None:
        raise exceptions.ObjectStoreFullError("full")

    monkeypatch.setattr(ready_pool._members[0], "actor", SimpleNamespace(do=SimpleNamespace(remote=full)))
    with pytest.raises(MemoryError, match="full"):
        ready_pool.submit(0, [os.getpid], careful=False)
    monkeypatch.undo()
    assert isinstance(one(ready_pool, 0, os.getpid), Done)


def test_an_address_without_a_cluster_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody listens there
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
            with pytest.raises(HarnessError, match="^no Ray cluster at") as error, connected(address):
                pass
            assert address in str(error.value) and "\n" not in str(error.value)
    for address in ("", "nowhere", ":6379", "host:", "host:port", "host:-1"):
        with pytest.raises(HarnessError, match="is no address; give auto, local, host:port"), connected(address):
            pass
