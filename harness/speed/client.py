"""Ask for probes, each in a process of its own or, on a GPU, one after the other in one: the client of `server`."""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

import torch

from harness.errors import HarnessError
from harness.records.measured import ProbeResult, ProbeSpec
from harness.records.spec import Frozen
from harness.speed.memory_limit import Limit

LOAD_S = 1800.0
GRACE_S = 60.0  # beyond the time limits of loading and of a probe, which the server enforces
CLOSE_S = 2.0
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the first is read by every PyTorch, the second from 2.9


class Job(Frozen):
    """What the server is asked, as `Prober.ask` is."""

    spec: ProbeSpec
    limit_bytes: int | None = None
    timeout_s: float = 600.0


class Reply(Frozen):
    """What the server answers. The first reply tells only model_bytes, or the error that kept it from loading."""

    result: ProbeResult | None = None
    limit: Limit | None = None
    model_bytes: int = 0
    error: str | None = None
    last: bool = False  # whether the process that answers ends with this one


class Prober:
    """Asks a server of its own for probes: on a CPU each runs in a fresh process. A context manager.

    model, dtype, device: as in `harness run`. threads: CPU threads of a probe; None for PyTorch's choice. Raises
    HarnessError when the model cannot be loaded, the server ended or does not answer.
    """

    def __init__(self, *, model: str, dtype: str = "auto", device: str = "auto", threads: int | None = None) -> None:
        self.command = [sys.executable, "-m", "harness.speed.server", model, "--dtype", dtype, "--device", device]
        self.command += ["--threads", str(threads or torch.get_num_threads())]
        self.model, self.model_bytes = model, 0
        self.limit: Limit | None = None
        """What held the last probe, if anything; its note is for the reader."""

    def __enter__(self) -> Self:
        read, write = os.pipe()
        self._replies, self._rest, self._errors = read, b"", tempfile.TemporaryFile()
        whole = {} if any(name in os.environ for name in ALLOCATOR) else {ALLOCATOR[0]: "expandable_segments:True"}
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        try:
            self._server: subprocess.Popen[bytes] = subprocess.Popen(
                [*self.command, "--reply", str(write)],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(write,),
                start_new_session=True,  # an interrupt is for the client, which then ends the server
                env={"OMP_WAIT_POLICY": "PASSIVE"}
                | whole  # or a limit on a GPU would count gaps between blocks
                | os.environ
                | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            os.close(write)
        try:
            self.model_bytes = self._read(LOAD_S).model_bytes
        except BaseException:
            self.__exit__(None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the server and whatever it runs."""
        assert self._server.stdin is not None
        with suppress(OSError):
            self._server.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(CLOSE_S if kind is None else 0)  # an idle one ends by itself
        with suppress(OSError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        os.close(self._replies)
        self._errors.close()

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, timeout_s: float = 600.0) -> ProbeResult:
        """Run one probe.

        limit_bytes: of memory for its process, the model included. timeout_s: until it is killed; loading the model
        again, where that is needed first, is not counted. Raises HarnessError when the server ended or does not answer.
        """
        job = Job(spec=spec, limit_bytes=limit_bytes, timeout_s=timeout_s)
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(job.model_dump_json().encode() + b"\n")
            self._server.stdin.flush()
        except OSError:
            raise self._gone() from None
        reply = self._read(LOAD_S + timeout_s + GRACE_S)
        self.limit = reply.limit
        assert reply.result is not None
        return reply.result

    def _read(self, seconds: float) -> Reply:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise HarnessError(f"the probe server of {self.model} does not answer after {seconds:g} s; try again")
            part = os.read(self._replies, 2**16)
            if not part:
                raise self._gone()
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        reply = Reply.model_validate_json(line)
        if reply.error is not None:
            raise HarnessError(reply.error)
        return reply

    def _gone(self) -> HarnessError:
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(CLOSE_S)
        said = last_line(self._errors)
        why = f"({self._server.returncode}){said and ': '}{said}"
        return HarnessError(f"the probe server of {self.model} ended {why}; try again")


def last_line(stream: IO[bytes]) -> str:
    """Return the last line that says something in a file; empty when there is none."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
    lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""
