"""One process that holds the model and answers all probes, as on a GPU: what it outlives, and what ends it."""

import gc
import io
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch

from harness.errors import HarnessError
from harness.records.measured import ProbeSpec
from harness.speed import server
from harness.speed.children import Resident, spawn
from harness.speed.client import ALLOCATOR, Job, Prober, Reply
from harness.speed.server import SPARE, ServerReady, stay
from methods.base import LayerView
from methods.snapkv import SnapKV
from tests.speed.test_client import TINY, children

pytestmark = pytest.mark.xdist_group("memory")
ACTS: dict[str, Callable[[], object]] = {}


class Acting(SnapKV):
    """Does what stands in `ACTS` in the place of scoring a layer."""

    def score(self, view: LayerView) -> torch.Tensor:
        ACTS["h2o"]()
        return super().score(view)


def acting(ready: ServerReady, jobs: int, reply: int, errors: IO[bytes]) -> int:
    """A server that stays, forked from the test; where h2o is asked for, `Acting` runs."""
    child = os.fork()
    if child:
        return child
    try:
        gc.freeze()  # what the test session holds is no part of this process's
        os.dup2(errors.fileno(), 2)
        plain = server.plan_method

        def planned(method: str, *given: Any, **named: Any) -> Any:
            return SimpleNamespace(policy=Acting()) if method in ACTS else plain(method, *given, **named)

        server.plan_method = planned
        with os.fdopen(jobs) as lines:
            stay(lambda: ready, lines, reply)
    finally:
        os._exit(0)


@pytest.fixture
def resident(ready: ServerReady) -> Iterator[Resident]:
    before, own = children(), Resident(partial(acting, ready))
    yield own
    own.end()
    assert children() == before


def probe(method: str) -> ProbeSpec:
    return ProbeSpec(method=method, budget="8", tokens=40, new_tokens=2, warm_up=False)


def ask(resident: Resident, method: str = "snapkv", timeout_s: float = 60) -> tuple[str, str, bool]:
    """Status and error of a probe, and whether the process is another one afterwards."""
    pid = resident._child and resident._child.pid
    reply = resident.answer(Job(spec=probe(method)), timeout_s)
    assert reply.result is not None
    return reply.result.status, reply.result.error or "", (resident._child and resident._child.pid) != pid


def _raise(error: Exception) -> None:
    raise error


def _hold_and_raise() -> None:
    """Run out of memory with a layer's keys, and much more, in frames that the error refers to, in a circle."""
    held = torch.ones(2 * SPARE // 4)
    error = torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate more than {held.nbytes} bytes")
    error.circle = error  # type: ignore[attr-defined]
    raise error


KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize(
    ("act", "status", "words", "ends"),
    [
        (partial(_raise, ValueError("shapes\ndiffer")), "failed", "shapes differ", False),
        (partial(_raise, torch.OutOfMemoryError("CUDA out of memory. Tried to")), "oom", "CUDA out of memory", False),
        (partial(_raise, RuntimeError("CUDA error: out of memory")), "oom", "out of memory", False),
        (_hold_and_raise, "oom", "CUDA out of memory", False),
        (partial(_raise, RuntimeError("CUDA error: device-side assert triggered")), "failed", "assert", True),
        (partial(_raise, RuntimeError("Triton Error [CUDA]: an illegal memory access")), "failed", "illegal", True),
        (lambda: KEPT.append(torch.ones(2 * SPARE // 4)) or _raise(ValueError("kept")), "failed", "kept", True),
        (lambda: os._exit(3), "failed", "the probe ended without a result, exit code 3", True),
        (lambda: time.sleep(60), "timeout", "not finished after 0.5 s; killed", True),
    ],
)
def test_what_ends_the_process_and_what_does_not(
    resident: Resident, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], status: str, words: str, ends: bool
) -> None:
    monkeypatch.setitem(ACTS, "h2o", act)
    assert resident.answer(None, 60).model_bytes > 0
    found, error, ended = ask(resident, "h2o", 0.5 if status == "timeout" else 60)
    assert (found, ended) == (status, ends) and words in error
    assert ask(resident) == ("ok", "", ends)


def test_a_death_with_nothing_to_do_costs_no_probe(resident: Resident) -> None:
    resident.answer(None, 60)
    assert resident._child is not None
    os.kill(resident._child.pid, 9)
    os.waitid(os.P_PID, resident._child.pid, os.WEXITED | os.WNOWAIT)
    assert ask(resident) == ("ok", "", True)


def test_on_a_gpu_the_server_has_all_probes_answered_by_such_a_process(
    ready: ServerReady, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def start(options: tuple[str, ...], *rest: Any) -> int:
        given.append(options)
        return acting(ready, *rest)

    monkeypatch.setattr(server, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(server, "spawn", start)
    monkeypatch.setitem(ACTS, "h2o", partial(_raise, RuntimeError("CUDA error: device-side assert triggered")))
    jobs = [Job(spec=probe(method)).model_dump_json() + "\n" for method in ("snapkv", "h2o", "snapkv")]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(jobs)))
    before, (read, write) = children(), os.pipe()
    words = ("tiny", "--dtype", "float32", "--device", "cuda", "--threads", "1")
    assert server.main((*words, "--reply", str(write))) == 0
    os.close(write)
    with os.fdopen(read) as lines:
        first, *replies = map(Reply.model_validate_json, lines)
    assert first.model_bytes > 0 and [r.result and r.result.status for r in replies] == ["ok", "failed", "ok"]
    assert given == [words] * 2 and children() == before


def test_a_model_that_cannot_be_loaded_is_an_error() -> None:
    def load() -> ServerReady:
        raise HarnessError("no such model")

    def start(jobs: int, reply: int, errors: IO[bytes]) -> int:
        child = os.fork()
        if not child:
            stay(load, (), reply)
            os._exit(0)
        return child

    assert Resident(start).answer(None, 60).error == "no such model"


def test_a_process_of_its_own_loads_the_model_once() -> None:
    own = Resident(partial(spawn, ("tiny", "--dtype", "float32", "--device", "cpu", "--threads", "1")))
    assert own.answer(None, 120).model_bytes > 0
    assert [ask(own), ask(own, "snapkw")[::2], ask(own, "h2o")] == [
        ("ok", "", False),
        ("failed", False),
        ("ok", "", False),
    ]
    own.end()


def test_on_a_gpu_what_a_probe_took_is_given_back(ready: ServerReady, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    device = torch.device("cuda:1")
    own = ServerReady(ready.loaded, SimpleNamespace(device=device), [])  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: done.append(args))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    assert own.tidied(1000) and not own.tidied(1000 - SPARE - 1)
    assert done == ["wait", "empty", (1.0, device)] * 2
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: _raise(RuntimeError("CUDA error: misaligned address"))
    )
    assert not own.tidied(1000)


@pytest.mark.parametrize("given", [None, *ALLOCATOR])
def test_the_allocator_grows_its_segments_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    seen: list[dict[str, str]] = []

    def popen(*_: object, env: dict[str, str], **__: object) -> object:
        seen.append(env)
        raise HarnessError("seen")

    monkeypatch.setattr("subprocess.Popen", popen)
    with pytest.raises(HarnessError, match="seen"):
        Prober(**TINY).__enter__()
    wanted = {ALLOCATOR[0]: "expandable_segments:True"} if given is None else {given: "max_split_size_mb:64"}
    assert {name: seen[0][name] for name in ALLOCATOR if name in seen[0]} == wanted
