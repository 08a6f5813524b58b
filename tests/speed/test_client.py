"""Probes: what is measured, in processes that end well, hang, run out of memory, or are killed."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from harness.errors import HarnessError
from harness.records.measured import ProbeResult, ProbeSpec
from harness.speed import memory_limit, server
from harness.speed.children import run_job
from harness.speed.client import Job, Prober
from harness.speed.measure import Round, draw_prompts, measure
from harness.speed.server import ServerReady, fork
from methods.registry import make_policy

pytestmark = pytest.mark.xdist_group("memory")
MIB = 2**20
SPEC = ProbeSpec(method="snapkv", budget="20", tokens=90, batch=2, new_tokens=4, rounds=2)
HEAVY = SPEC.model_copy(update={"tokens": 3000, "method": "h2o", "rounds": 500})


TINY = {"model": "tiny", "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    with Prober(**TINY, threads=2) as own:
        yield own


def processes_of(group: int) -> list[int]:
    """Ids of live processes of a process group."""
    dead = ("zombie", "dead")
    return [p.pid for p in psutil.process_iter(["status"]) if p.info["status"] not in dead and _group(p.pid) == group]


def _group(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def children() -> set[str]:
    """Ids of this process's children, the dead ones that nobody waited for included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {child for task in tasks for child in task.read_text().split()}


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_measurement(ready: ServerReady) -> None:
    found = measure(ready.model, make_policy("snapkv"), SPEC, vocabulary=ready.vocabulary)
    assert (found.tokens, found.batch, found.new_tokens, found.rounds) == (90, 2, 4, 2)
    assert found.kv_bytes == (20 * 2 * (2 * 16 * 4 + 4),) * 4
    assert found.ttft_s.median >= found.prefill_s.low + found.compress_s.low
    assert found.tokens_per_s == pytest.approx(2 / found.tpot_s.median)
    assert found.predicted_bytes > 0 and found.memory == "resident set" and found.model_bytes > 0
    assert ready.vocabulary == list(range(5, 261))  # the tiny tokenizer's first five are special


@pytest.mark.parametrize(("warm_up", "rounds", "expected"), [(True, 2, 3), (False, 1, 1)])
def test_a_warm_up_is_a_round_more_whose_seconds_are_dropped(
    ready: ServerReady, monkeypatch: pytest.MonkeyPatch, warm_up: bool, rounds: int, expected: int
) -> None:
    ran = (Round([(second, 0.0, 0.0, second)], [second], (1,), False) for second in range(1, expected + 1))
    monkeypatch.setattr("harness.speed.measure.run_round", lambda *_: next(ran))
    found = measure(ready.model, make_policy("snapkv"), SPEC.model_copy(update={"warm_up": warm_up, "rounds": rounds}))
    assert next(ran, None) is None
    assert (found.prefill_s.low, found.prefill_s.high) == (1 + warm_up, expected)


def test_prompts() -> None:
    given = tuple(range(90))
    first, second = draw_prompts(SPEC.model_copy(update={"ids": given}), [7, 9]).tolist()
    assert tuple(first) == given and set(second) == {7, 9} and len(second) == 90
    assert torch.equal(draw_prompts(SPEC, range(50)), draw_prompts(SPEC, range(50)))
    assert not torch.equal(draw_prompts(SPEC, range(50)), draw_prompts(SPEC.model_copy(update={"seed": 1}), range(50)))
    many = SPEC.model_copy(update={"batch": 700, "distinct": 4})
    assert draw_prompts(many, range(50)).shape == (4, 90) and len(draw_prompts(SPEC, range(50))) == 2
    with pytest.raises(HarnessError, match="a probe of 90 tokens was given 2 ids"):
        draw_prompts(SPEC.model_copy(update={"ids": (1, 2)}), range(50))


def test_a_probe_twice_the_same(prober: Prober) -> None:
    first, second = prober.ask(SPEC).measured, prober.ask(SPEC).measured
    assert first and second
    assert (first.kv_bytes, first.predicted_bytes) == (second.kv_bytes, second.predicted_bytes)
    assert first.model_bytes == pytest.approx(prober.model_bytes, rel=0.05)
    assert prober.limit is None


def test_a_limit_large_enough_and_one_too_small(prober: Prober) -> None:
    spec = SPEC.model_copy(update={"tokens": 2000, "warm_up": False, "method": "fullkv", "batch": 16, "rounds": 1})
    for _ in range(2):
        assert prober.ask(spec, prober.model_bytes + 200 * MIB).status == "ok"
        assert prober.limit is not None and prober.limit.kind in ("cgroup", "address space")
        assert prober.ask(spec, prober.model_bytes + 12 * MIB).status == "oom"
    below = prober.ask(SPEC, prober.model_bytes // 2)
    assert below.status == "oom" and "that the loaded model takes" in (below.error or "")


def test_a_hang_is_killed_and_the_server_goes_on(prober: Prober) -> None:
    hung = prober.ask(HEAVY, timeout_s=0.3)
    assert hung == ProbeResult(status="timeout", error="not finished after 0.3 s; killed")
    assert processes_of(prober._server.pid) == [prober._server.pid]
    assert prober.ask(SPEC).status == "ok"


@contextmanager
def killed_at_work(server: int, *, child: bool) -> Iterator[None]:
    """Kill the server, or its child, as soon as it has one."""

    def kill() -> None:
        wait_until(lambda: len(processes_of(server)) == 2)
        os.kill(next(pid for pid in processes_of(server) if child == (pid != server)), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


def test_a_child_killed_from_outside_is_out_of_memory(prober: Prober) -> None:
    with killed_at_work(prober._server.pid, child=True):
        found = prober.ask(HEAVY, timeout_s=60)
    assert found.status == "oom" and "killed by SIGKILL" in (found.error or "")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "snapkw"}, "unknown method 'snapkw'"),
        ({"set": {"recent": "many"}}, "recent"),
        ({"budget": None}, "snapkv needs a budget"),
        ({"budget": "lots"}, "budget 'lots' is not a number"),
        ({"ids": (1, 2)}, "was given 2 ids"),
    ],
)
def test_what_cannot_be_run_fails_in_one_line(prober: Prober, changed: dict[str, object], words: str) -> None:
    found = prober.ask(SPEC.model_copy(update=changed))
    assert found.status == "failed" and words in (found.error or "") and "\n" not in (found.error or "")


def test_no_process_is_left() -> None:
    own = Prober(**TINY, threads=1).__enter__()
    server = own._server
    assert server.stdin is not None
    server.stdin.write(Job(spec=HEAVY).model_dump_json().encode() + b"\n")
    server.stdin.flush()
    wait_until(lambda: len(processes_of(server.pid)) == 2)
    own.__exit__(KeyboardInterrupt, None, None)
    wait_until(lambda: not processes_of(server.pid))


def test_a_server_that_dies_is_one_error_and_takes_its_child_along() -> None:
    with Prober(**TINY, threads=1) as own:
        server = own._server.pid
        dies = pytest.raises(HarnessError, match=r"the probe server of tiny ended \(-9\).*; try again")
        with killed_at_work(server, child=False), dies:
            own.ask(HEAVY)
        wait_until(lambda: not processes_of(server))
        with pytest.raises(HarnessError, match="the probe server of tiny ended"):
            own.ask(SPEC)


def test_a_model_that_cannot_be_loaded() -> None:
    with pytest.raises(HarnessError, match="unknown model 'tinny'; did you mean 'tiny'"):
        Prober(model="tinny").__enter__()


def _raise(error: Exception) -> None:
    raise error


def _crash() -> None:
    faulthandler.disable()  # or pytest reports it
    os.kill(os.getpid(), signal.SIGSEGV)


def _abort() -> None:
    faulthandler.disable()
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


@pytest.mark.parametrize(
    ("act", "status", "words"),
    [
        (partial(_raise, MemoryError()), "oom", "MemoryError"),
        (partial(_raise, torch.OutOfMemoryError("CUDA out of memory.")), "oom", "CUDA out of memory"),
        (
            lambda: _raise(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
            "oom",
            "DefaultCPU",
        ),
        (partial(_raise, RuntimeError("could not create a primitive")), "oom", "primitive"),
        (partial(_raise, OSError(12, "Cannot allocate memory")), "oom", "Cannot allocate"),
        (partial(_raise, RuntimeError("shapes\ndiffer")), "failed", "RuntimeError: shapes differ"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "oom", "killed by SIGKILL"),
        (_crash, "failed", "killed by SIGSEGV"),
        (lambda: os._exit(3), "failed", "exit code 3"),
        (_abort, "oom", "killed by SIGABRT: terminate called"),
        (lambda: time.sleep(60), "timeout", "not finished after"),
    ],
)
def test_how_a_child_may_end(
    ready: ServerReady, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], status: str, words: str
) -> None:
    before = children()
    monkeypatch.setattr(server, "measure", lambda *args, **kwargs: act())
    found = run_job(partial(fork, ready, 1), Job(spec=SPEC), 0.5 if status == "timeout" else 30).result
    assert found is not None and found.status == status and words in (found.error or "")
    assert children() == before


def test_what_a_child_prints_is_no_reply(ready: ServerReady, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = server.measure

    def loud(*args: object, **kwargs: object) -> object:
        os.write(1, b'{"result": null}\n')
        print("nonsense")
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(server, "measure", loud)
    found = run_job(partial(fork, ready, 1), Job(spec=SPEC), 30).result
    assert found is not None and found.status == "ok"


def test_a_limit_on_a_gpu_is_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[float, torch.device]] = []
    device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: shares.append(args))
    assert server.set_limit(device, 2000) == memory_limit.Limit("allocator fraction", 2000)
    assert server.set_limit(device, 99000).kind == "allocator fraction"
    assert shares == [(0.25, device), (1.0, device)]
    with pytest.raises(MemoryError, match="not above the 1000 that the loaded model takes"):
        server.set_limit(device, 1000)


@pytest.mark.gpu
def test_a_probe_on_a_gpu() -> None:
    with Prober(model="tiny", dtype="float32", device="cuda") as own:
        found = own.ask(SPEC, own.model_bytes + 500 * MIB)
        assert found.status == "ok" and found.measured and found.measured.memory == "cuda allocated"
        assert own.ask(SPEC, own.model_bytes).status == "oom"
        assert own.ask(SPEC, own.model_bytes + 500 * MIB).status == "ok"  # in the same process, its limit lifted
