"""A receiver in a process of its own, as the sender has it: it stays, and another is started where one has ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from pydantic import ValidationError
from torch import Tensor

from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.models.source import AUTO_MAP
from harness.plan.receivers import MOMENTS, PlannedReceiver
from harness.relay.message import pack_tensors
from harness.relay.wire import Ask, Reply
from harness.speed.client import CLOSE_S, LOAD_S, last_line

ANSWER_S = 3600.0
"""Most that a request may take."""


@dataclass
class _Process:
    """A receiver that runs.

    replies: the descriptor that it answers on. rest: read of it and not yet a line. has: digests of its constants.
    """

    own: subprocess.Popen[bytes]
    replies: int
    errors: IO[bytes]
    rest: bytes = b""
    has: set[str] = field(default_factory=set)

    def end(self) -> None:
        """Kill it and whatever it started."""
        with suppress(OSError):
            os.killpg(self.own.pid, signal.SIGKILL)
        self.own.wait()
        with suppress(OSError):  # bytes that it did not take
            self.own.stdin.close()  # type: ignore[union-attr]
        os.close(self.replies)
        self.errors.close()


class Receiver:
    """A process with the model of `loaded`, or another: started at the first request, ended with this object."""

    def __init__(self, loaded: LoadedModel, other: PlannedReceiver | None = None) -> None:
        spread = any(own.startswith("device_map") for own in loaded.spec.loaded_as)
        device, own = AUTO_MAP if spread else loaded.spec.device, loaded.spec
        typed, spec = (loaded.typed, own) if other is None else (other.typed, other.spec)
        self.revision, self.name = spec.revision, spec.name
        self.command = [sys.executable, "-m", "harness.relay.receiver", typed, "--dtype", own.dtype]
        self.command += ["--device", device, "--threads", str(torch.get_num_threads())]
        self.command += ["--trust-remote-code"] if own.trust_remote_code else []
        self.command += [] if other is None else ["--map", str(other.folder / MOMENTS)]
        self._process: _Process | None = None
        self._end: weakref.finalize[..., Receiver] | None = None

    def ask(self, ask: Ask, message: bytes = b"", constants: Mapping[str, Tensor] | None = None) -> tuple[Reply, float]:
        """What it says to a request, and the seconds until it had taken the message.

        constants: of the model, by digest, that the message is read with; each receiver gets them once. Raises
        HarnessError when it cannot load the model, ended, or takes longer than `ANSWER_S`; the next request starts
        another one.
        """
        if self._process is not None and self._process.own.poll() is not None:
            self.end()  # it died with nothing to do
        process = self._process or self._begun()
        assert process.own.stdin is not None
        new = {digest: x for digest, x in (constants or {}).items() if digest not in process.has}
        packed = pack_tensors(new)
        process.has |= new.keys()
        try:
            asked = ask.model_copy(update={"size": len(message), "constants": len(packed)})
            process.own.stdin.write(asked.model_dump_json().encode() + b"\n" + packed)
            process.own.stdin.flush()
            start = time.perf_counter()
            process.own.stdin.write(message)
            process.own.stdin.flush()
        except OSError:
            raise self._gone(process) from None
        seconds = time.perf_counter() - start
        return self._heard(process, ANSWER_S), seconds

    def end(self) -> None:
        """End the process, if there is one."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _begun(self) -> _Process:
        read, write = os.pipe()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        try:
            own = subprocess.Popen(
                [*self.command, "--reply", str(write)],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                pass_fds=(write,),
                start_new_session=True,  # an interrupt is for the sender, which then ends the receiver
                env=quiet | os.environ | {"PYTHONPATH": path},
            )
        finally:
            os.close(write)
        self._process = process = _Process(own, read, errors)
        self._end = weakref.finalize(self, process.end)
        first = self._heard(process, LOAD_S)
        if first.error is None and first.revision != self.revision:
            first = first.model_copy(update={"error": f"it loaded revision {first.revision[:12]} of {self.name}"})
        if first.error is not None:
            self.end()
            raise HarnessError(f"the receiver cannot answer: {first.error}")
        return process

    def _heard(self, process: _Process, seconds: float) -> Reply:
        deadline = time.monotonic() + seconds
        while b"\n" not in process.rest:
            if not select.select([process.replies], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.end()
                raise HarnessError(f"the receiver does not answer after {seconds:g} s; it was ended")
            part = os.read(process.replies, 2**20)
            if not part:
                raise self._gone(process)
            process.rest += part
        line, _, process.rest = process.rest.partition(b"\n")
        try:
            return Reply.model_validate_json(line)
        except ValidationError as error:
            self.end()
            raise HarnessError(f"the receiver says what cannot be read ({error.errors()[0]['msg']})") from None

    def _gone(self, process: _Process) -> HarnessError:
        with suppress(subprocess.TimeoutExpired):
            process.own.wait(CLOSE_S)
        said, code = last_line(process.errors), process.own.returncode
        self.end()
        return HarnessError(f"the receiver ended ({code}){said and ': '}{said}")
