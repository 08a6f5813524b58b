"""The server of `harness.speed.client.Prober`: it loads the model once and forks a child for every probe.

    python -m harness.speed.server MODEL --dtype float32 --device cpu --threads 2 --reply 3

reads a JSON line a probe (`Job`) and writes one (`Reply`) to the descriptor --reply. The server computes on one thread,
so that it holds no thread pool when it forks; a child sets its own number of threads. A GPU cannot be used after a
fork: there, every probe is a process that loads the model itself (--once).
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import torch
from pydantic import ValidationError

from harness.engine.prefill import PrefillLayer
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.load import LoadedModel, load_model, resolve_device
from harness.plan.methods import plan_method
from harness.records.measured import ProbeResult
from harness.speed import memory_limit
from harness.speed.client import LOAD_S, Job, Reply, last_line
from harness.speed.measure import measure
from harness.speed.memory_limit import Limit
from methods.base import Needs

OUT_OF_MEMORY = (
    *("allocate memory", "defaultcpuallocator", "not enough memory", "out of memory", "bad_alloc"),
    "could not create a primitive",  # oneDNN without memory for its scratch; seen under a limit, where the model ran
)
LOOK_S = 0.5  # between two looks whether the client is still there


@dataclass
class ServerReady:
    """A model in this process, attached, with the token ids that prompts are drawn from."""

    loaded: LoadedModel
    model: AttachedModel
    vocabulary: list[int]

    @classmethod
    def load(cls, name: str, *, dtype: str, device: str) -> ServerReady:
        """Load and attach a model. Raises HarnessError for one that cannot be loaded."""
        loaded = load_model(name, dtype=dtype, device=device)
        model = AttachedModel(loaded.model)
        return cls(loaded, model, loaded.words())

    def held_bytes(self) -> int:
        """Count the resident (CPU) or allocated (CUDA) bytes of this process, weights included."""
        self._touch()
        if self.model.device.type == "cuda":
            return torch.cuda.memory_allocated(self.model.device)
        gc.collect()
        memory_limit.give_back()
        return memory_limit.status_bytes("VmRSS")

    def answer(self, job: Job | None) -> Reply:
        """Run a probe in this process, under its limit; without one, tell what the model takes."""
        if job is None:
            return Reply(model_bytes=self.held_bytes())
        limit = None
        try:
            policy = plan_method(job.spec.method, job.spec.set, revision=self.loaded.spec.revision).policy
            self._touch()
            if job.limit_bytes is not None:
                limit = set_limit(self.model.device, job.limit_bytes)
            measured = measure(self.model, policy, job.spec, vocabulary=self.vocabulary)
            result = ProbeResult(status="ok", measured=measured)
        except Exception as error:  # whatever a probe trips over is its result
            result = failure(error)
        return Reply(result=result, limit=limit)

    def _touch(self) -> None:
        """Bring every weight, the code and the threads into this process, so that the limit finds them there."""
        layers = [PrefillLayer(Needs(), 32) for _ in range(self.model.layers)]
        self.model.forward(
            torch.arange(32, device=self.model.device).unsqueeze(0) % self.model.vocab, layers, position=0
        )


def set_limit(device: torch.device, limit_bytes: int) -> Limit:
    """Hold this process below a limit, its model included. Raises MemoryError where that takes more already."""
    if device.type != "cuda":
        return memory_limit.apply(limit_bytes)
    held = torch.cuda.memory_allocated(device)
    if limit_bytes <= held:
        raise MemoryError(f"a limit of {limit_bytes} bytes is not above the {held} that the loaded model takes")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    return Limit("allocator fraction", limit_bytes)


def failure(error: Exception) -> ProbeResult:
    """Turn an exception into a result: `oom` for all that means no memory was left, else `failed`, with one line."""
    line = " ".join(str(error).split())[:300] or type(error).__name__
    empty = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if empty or any(words in line.lower() for words in OUT_OF_MEMORY):
        return ProbeResult(status="oom", error=line)
    told = line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"
    return ProbeResult(status="failed", error=told)


def ended(status: int, said: str) -> ProbeResult:
    """Say what became of a child that ended without a reply, by waitpid's status and the last line it printed."""
    tail, code = f": {said}" if said else "", os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return ProbeResult(status="oom", error="killed by SIGKILL, as the kernel does when memory runs out" + tail)
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    empty = any(words in said.lower() for words in OUT_OF_MEMORY)
    return ProbeResult(status="oom" if empty else "failed", error=f"the probe ended without a result, {how}{tail}")


Start = Callable[[Job | None, int, IO[bytes]], int]
"""Starts a process that writes its reply to a descriptor and what else it prints to a file; returns its id."""


def run_job(start: Start, job: Job | None, timeout_s: float) -> Reply:
    """Wait for a job's reply, or for its time to be up. A None job asks for the model's bytes."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as errors:
        try:
            child = start(job, write, errors)
        finally:
            os.close(write)
        told = _told(read, child, timeout_s)
        os.close(read)
        if told is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        memory_limit.leave_cgroup(child)
        said = last_line(errors)
    if told is None:
        return Reply(result=ProbeResult(status="timeout", error=f"not finished after {timeout_s:g} s; killed"))
    try:
        return Reply.model_validate_json(told)
    except ValidationError:
        return Reply(result=ended(status, said))


def fork(ready: ServerReady, threads: int, job: Job | None, reply: int, errors: IO[bytes]) -> int:
    """Start a child that shares the loaded model with this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        memory_limit.die_with_parent(parent)
        os.dup2(errors.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        torch.set_num_threads(threads)
        _send(reply, ready.answer(job))
    finally:
        os._exit(0)  # nothing of the server's is flushed or ended twice


def spawn(options: Sequence[str], job: Job | None, reply: int, errors: IO[bytes]) -> int:
    """Start a child that loads the model itself. options: of the command line, model first."""
    command = [sys.executable, "-m", "harness.speed.server", *options, "--once", "--reply", "3"]
    with tempfile.TemporaryFile() as given:
        given.write(b"" if job is None else job.model_dump_json().encode())
        given.seek(0)
        moves = [(given.fileno(), 0), (errors.fileno(), 1), (errors.fileno(), 2), (reply, 3)]
        actions = [(os.POSIX_SPAWN_DUP2, *move) for move in moves]
        os.set_inheritable(reply, True)  # it may be 3 already, and then no move makes it so
        return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)


def _told(read: int, child: int, timeout_s: float) -> bytes | None:
    """Read all that a child writes until it ends; None when its time is up. Ends it when the client is gone."""
    deadline, client, parts = time.monotonic() + timeout_s, os.getppid(), list[bytes]()
    while (left := deadline - time.monotonic()) > 0:
        if select.select([read], [], [], min(left, LOOK_S))[0]:
            part = os.read(read, 2**16)
            if not part:
                return b"".join(parts)
            parts.append(part)
        elif os.getppid() != client:
            os.kill(child, signal.SIGKILL)
            os._exit(1)
    return None


def _send(reply: int, message: Reply) -> None:
    with open(reply, "wb", closefd=False) as stream:
        stream.write(message.model_dump_json().encode() + b"\n")


def once(options: argparse.Namespace, reply: int) -> int:
    """Run the one job of standard input, or tell the model's bytes where there is none."""
    memory_limit.die_with_parent(os.getppid())
    torch.set_num_threads(options.threads)
    try:
        ready = ServerReady.load(options.model, dtype=options.dtype, device=options.device)
        text = sys.stdin.read()
        _send(reply, ready.answer(Job.model_validate_json(text) if text else None))
    except HarnessError as error:
        _send(reply, Reply(error=str(error)))
    return 0


def serve(options: argparse.Namespace, reply: int) -> int:
    """Answer jobs until standard input ends."""
    torch.set_num_threads(1)
    try:
        if resolve_device(options.device).type == "cpu":
            ready = ServerReady.load(options.model, dtype=options.dtype, device="cpu")
            gc.collect()
            gc.freeze()
            memory_limit.give_back()
            start: Start = partial(fork, ready, options.threads)
        else:
            given = ("--dtype", options.dtype, "--device", options.device, "--threads", str(options.threads))
            start = partial(spawn, (options.model, *given))
        first = run_job(start, None, LOAD_S)
        if first.result is not None:
            first = Reply(error=f"model {options.model} cannot be probed: {first.result.error}")
    except HarnessError as error:
        first = Reply(error=str(error))
    _send(reply, first)
    if first.error is not None:
        return 2
    for line in sys.stdin:
        try:
            job = Job.model_validate_json(line)
        except ValidationError as error:
            _send(reply, Reply(result=failure(error)))
        else:
            _send(reply, run_job(start, job, job.timeout_s))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve probes, or run a single one; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.speed.server", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reply", type=int, required=True, help="descriptor to answer on")
    parser.add_argument("--once", action="store_true", help="load the model, run one job of standard input, end")
    options = parser.parse_args(arguments)
    return (once if options.once else serve)(options, options.reply)


if __name__ == "__main__":
    sys.exit(main())
