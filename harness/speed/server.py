"""The server of `harness.speed.client.Prober`: it loads the model once and forks a child for every probe.

    python -m harness.speed.server MODEL --dtype float32 --device cpu --threads 2 --reply 3

reads a JSON line a probe (`Job`) and writes one (`Reply`) to the descriptor --reply. The server computes on one thread,
so that it holds no thread pool when it forks; a child sets its own number of threads. A GPU cannot be used after a
fork: there, one child holds the model and answers all probes (--stay), and the server starts another in its place after
an error that leaves the GPU useless, a probe whose time is up, or its death.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import sys
from collections.abc import Callable, Iterable, Sequence
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
from harness.speed.children import OUT_OF_MEMORY, Resident, run_job, spawn
from harness.speed.client import LOAD_S, Job, Reply
from harness.speed.measure import measure
from harness.speed.memory_limit import Limit
from methods.base import Needs

BROKEN = ("cuda error", "triton error", "cublas_status", "cudnn_status", "device-side assert")
"""Words of errors after which a process can compute nothing more on its GPU."""
SPARE = 64 * 2**20
"""Bytes that a probe may leave behind in a process that stays: workspaces of libraries."""


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
        model = AttachedModel(loaded.model, loaded.wording)
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
        limit, last = None, False
        try:
            policy = plan_method(job.spec.method, job.spec.set, revision=self.loaded.spec.revision).policy
            self._touch()
            if job.limit_bytes is not None:
                limit = set_limit(self.model.device, job.limit_bytes)
            measured = measure(self.model, policy, job.spec, vocabulary=self.vocabulary)
            result = ProbeResult(status="ok", measured=measured)
        except Exception as error:  # whatever a probe trips over is its result
            result = failure(error)
            last = result.status == "failed" and breaks(error)
        return Reply(result=result, limit=limit, last=last)

    def allocated(self) -> int:
        """Count the bytes of this process's tensors where the model is."""
        if self.model.device.type == "cuda":
            return torch.cuda.memory_allocated(self.model.device)
        return memory_limit.tensor_bytes()

    def tidied(self, before: int) -> bool:
        """Give back what a probe took and lift its limit; False where that fails, or more than `before` is held."""
        gc.collect()  # frames that an error kept, and the caches in them
        try:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0, self.model.device)
            return self.allocated() <= before + SPARE
        except RuntimeError:  # an error of the GPU comes when it is waited for
            return False

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


def breaks(error: Exception) -> bool:
    """Whether an error may have left the GPU useless for this process."""
    return any(words in str(error).lower() for words in BROKEN)


Answer = Callable[[Job | None, float], Reply]


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


def _send(reply: int, message: Reply) -> None:
    with open(reply, "wb", closefd=False) as stream:
        stream.write(message.model_dump_json().encode() + b"\n")


def stay(load: Callable[[], ServerReady], jobs: Iterable[str], reply: int) -> None:
    """Load the model, tell what it takes, and answer jobs in this process until they end or it is spent."""
    try:
        ready = load()
    except HarnessError as error:
        _send(reply, Reply(error=str(error)))
        return
    _send(reply, Reply(model_bytes=ready.held_bytes()))
    before = ready.allocated()
    for line in jobs:
        answered = ready.answer(Job.model_validate_json(line))
        last = answered.last or not ready.tidied(before)
        _send(reply, answered.model_copy(update={"last": last}))
        if last:
            return


def _starter(options: argparse.Namespace) -> tuple[Answer, Callable[[], None]]:
    """What answers jobs, and what ends it: a child for each on a CPU, one child for all on a GPU."""
    if resolve_device(options.device).type == "cpu":
        ready = ServerReady.load(options.model, dtype=options.dtype, device="cpu")
        gc.collect()
        gc.freeze()
        memory_limit.give_back()
        return partial(run_job, partial(fork, ready, options.threads)), lambda: None
    given = ("--dtype", options.dtype, "--device", options.device, "--threads", str(options.threads))
    resident = Resident(partial(spawn, (options.model, *given)))
    return resident.answer, resident.end


def serve(options: argparse.Namespace, reply: int) -> int:
    """Answer jobs until standard input ends."""
    torch.set_num_threads(1)
    try:
        answer, end = _starter(options)
    except HarnessError as error:
        _send(reply, Reply(error=str(error)))
        return 2
    first = answer(None, LOAD_S)
    if first.result is not None:
        first = Reply(error=f"model {options.model} cannot be probed: {first.result.error}")
    _send(reply, first)
    if first.error is not None:
        return 2
    for line in sys.stdin:
        try:
            job = Job.model_validate_json(line)
        except ValidationError as error:
            _send(reply, Reply(result=failure(error)))
        else:
            _send(reply, answer(job, job.timeout_s))
    end()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve probes, or run a single one; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.speed.server", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reply", type=int, required=True, help="descriptor to answer on")
    parser.add_argument("--stay", action="store_true", help="answer every job of standard input in this process")
    options = parser.parse_args(arguments)
    if not options.stay:
        return serve(options, options.reply)
    memory_limit.die_with_parent(os.getppid())
    torch.set_num_threads(options.threads)
    stay(partial(ServerReady.load, options.model, dtype=options.dtype, device=options.device), sys.stdin, options.reply)
    return 0


if __name__ == "__main__":
    sys.exit(main())
