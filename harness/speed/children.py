"""Processes that answer probes, seen from the server: a fresh one for each probe, or one that stays and answers all."""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from pydantic import ValidationError

from harness.records.measured import ProbeResult
from harness.speed import memory_limit
from harness.speed.client import LOAD_S, Job, Reply, last_line

OUT_OF_MEMORY = (
    *("allocate memory", "defaultcpuallocator", "not enough memory", "out of memory", "bad_alloc"),
    "could not create a primitive",  # oneDNN without memory for its scratch; seen under a limit, where the model ran
    "cublas_status_alloc_failed",
)
LOOK_S = 0.5  # between two looks whether the client is still there

Start = Callable[[Job | None, int, IO[bytes]], int]
"""Starts a process that writes its reply to a descriptor and what else it prints to a file; returns its id."""
StartStaying = Callable[[int, int, IO[bytes]], int]
"""Starts a process that reads a job a line from the first descriptor and writes a reply a line to the second.

Its first reply comes before any job and tells the model's bytes, or why the model cannot be loaded.
"""


def run_job(start: Start, job: Job | None, timeout_s: float) -> Reply:
    """Have a process of its own answer a job, or killed when its time is up. A None job asks for the model's bytes."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as errors:
        try:
            child = start(job, write, errors)
        finally:
            os.close(write)
        told = _told(read, child, timeout_s)
        os.close(read)
        return _reply(told, child, errors, timeout_s, ends=True)


@dataclass
class _Child:
    """A process that stays. jobs, replies: descriptors to write to and to read from."""

    pid: int
    jobs: int
    replies: int
    errors: IO[bytes]


class Resident:
    """A process that holds the model and answers job after job, and another in its place once it ended.

    It ends with an error that leaves its device useless, when its time is up, and when it dies.
    """

    def __init__(self, start: StartStaying) -> None:
        self._start = start
        self._child: _Child | None = None

    def answer(self, job: Job | None, timeout_s: float) -> Reply:
        """As `run_job`. Where a process has to be started first, loading the model has a limit of its own."""
        if self._child is not None and os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.end()  # it died with nothing to do
        if self._child is None:
            self._child = self._begun()
            first = self._heard(LOAD_S)
            if job is None or first.error is not None or first.result is not None:
                return first
        assert job is not None
        with suppress(BrokenPipeError):  # then its end is what is read
            os.write(self._child.jobs, job.model_dump_json().encode() + b"\n")
        return self._heard(timeout_s)

    def end(self) -> None:
        """End the process, if there is one."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGKILL)
            os.waitpid(self._child.pid, 0)
            self._forget()

    def _begun(self) -> _Child:
        (asked, jobs), (replies, reply) = os.pipe(), os.pipe()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        try:
            return _Child(self._start(asked, reply, errors), jobs, replies, errors)
        finally:
            os.close(asked)
            os.close(reply)

    def _heard(self, timeout_s: float) -> Reply:
        assert self._child is not None
        told = _told(self._child.replies, self._child.pid, timeout_s)
        ends = not told or not told.endswith(b"\n")
        reply = _reply(told, self._child.pid, self._child.errors, timeout_s, ends=ends)
        if ends:
            self._forget()
        elif reply.last or reply.error is not None:
            self.end()
        return reply

    def _forget(self) -> None:
        assert self._child is not None
        os.close(self._child.jobs)
        os.close(self._child.replies)
        self._child.errors.close()
        self._child = None


def spawn(options: Sequence[str], jobs: int, reply: int, errors: IO[bytes]) -> int:
    """Start a server that stays (`StartStaying`). options: of its command line, model first."""
    command = [sys.executable, "-m", "harness.speed.server", *options, "--stay", "--reply", "3"]
    moves = [(jobs, 0), (errors.fileno(), 1), (errors.fileno(), 2), (reply, 3)]
    actions = [(os.POSIX_SPAWN_DUP2, *move) for move in moves]
    os.set_inheritable(reply, True)  # it may be 3 already, and then no move makes it so
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)


def ended(status: int, said: str) -> ProbeResult:
    """Say what became of a child that ended without a reply, by waitpid's status and the last line it printed."""
    tail, code = f": {said}" if said else "", os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return ProbeResult(status="oom", error="killed by SIGKILL, as the kernel does when memory runs out" + tail)
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    empty = any(words in said.lower() for words in OUT_OF_MEMORY)
    return ProbeResult(status="oom" if empty else "failed", error=f"the probe ended without a result, {how}{tail}")


def _told(read: int, child: int, timeout_s: float) -> bytes | None:
    """Read a line of a child, or all that it writes until it ends; None when its time is up.

    Ends it when the client is gone.
    """
    deadline, client, parts = time.monotonic() + timeout_s, os.getppid(), list[bytes]()
    while (left := deadline - time.monotonic()) > 0:
        if select.select([read], [], [], min(left, LOOK_S))[0]:
            part = os.read(read, 2**16)
            parts.append(part)
            if not part or part.endswith(b"\n"):
                return b"".join(parts)
        elif os.getppid() != client:
            os.kill(child, signal.SIGKILL)
            os._exit(1)
    return None


def _reply(told: bytes | None, child: int, errors: IO[bytes], timeout_s: float, *, ends: bool) -> Reply:
    """What a child told, or what became of it instead. ends: whether it is to have ended, or to be killed."""
    status = 0
    if told is None:
        os.kill(child, signal.SIGKILL)
    if ends:
        _, status = os.waitpid(child, 0)
        memory_limit.leave_cgroup(child)
    if told is None:
        return Reply(result=ProbeResult(status="timeout", error=f"not finished after {timeout_s:g} s; killed"))
    try:
        return Reply.model_validate_json(told)
    except ValidationError:
        return Reply(result=ended(status, last_line(errors)))
