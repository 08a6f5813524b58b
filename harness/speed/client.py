"""Measure one method by itself, and ask for that in fresh processes (`Prober`, served by `harness.speed.server`)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from harness.engine.compress import Compressed
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.records.measured import Measured, ProbeResult, ProbeSpec, Spread
from harness.records.spec import Frozen
from harness.speed import memory_limit, predicted_memory
from harness.speed.memory_limit import Limit
from harness.speed.one_method import Isolated
from harness.speed.peak_memory import Meter
from methods.base import Budget, KVPolicy, PolicyError

MAPPED_FROM = 2**17  # while memory is measured: what is freed leaves the resident set at once
MAPPED_FROM_TIMED = 2**25  # while time is measured: glibc's own upper bound, which it reaches after a few forwards
LOAD_S = 1800.0
GRACE_S = 60.0  # beyond a probe's own time limit, which the server enforces
CLOSE_S = 2.0


class Job(Frozen):
    """What the server is asked. limit_bytes: of the whole child, model included. timeout_s: from its start."""

    spec: ProbeSpec
    limit_bytes: int | None = None
    timeout_s: float = 600.0


class Reply(Frozen):
    """What the server answers. The first reply tells only model_bytes, or the error that kept it from loading."""

    result: ProbeResult | None = None
    limit: Limit | None = None
    model_bytes: int = 0
    error: str | None = None


@dataclass
class _Round:
    """One pass over all prompts: (prefill, observe, compress, first token) seconds of each, steps, layer bytes."""

    phases: list[tuple[float, float, float, float]]
    step_s: list[float]
    kv_bytes: tuple[int, ...]


def measure(
    model: AttachedModel, policy: KVPolicy, spec: ProbeSpec, *, vocabulary: Sequence[int] | None = None
) -> Measured:
    """Run `spec` in this process, which should be a fresh one.

    Memory is that of the first round, the cold one: what a warm-up frees would stay in the heap and hide what comes
    after. A short prompt goes first, so that weights and code are resident before; then freed heap is given back.
    During that round large blocks are mapped by themselves and the heap has no holes, so the peak is of what lives and
    not of what the heap has not yet returned. The rounds that follow it are timed with the heap as it would be; the
    first one's seconds count only where `spec.warm_up` is off.

    Args:
        model: attached, in evaluation mode.
        policy: as made for the model.
        spec: its method and set are taken as done.
        vocabulary: token ids that prompts are drawn from; None for all.

    Raises:
        HarnessError: a budget where there is none or none where there is one, ids of another length, an unknown device.
        PolicyError: what the policy refuses.
    """
    budget, prompts = budget_of(policy, spec), draw_prompts(spec, vocabulary or range(model.vocab))
    runner = Isolated(model, policy, budget, chunk=spec.chunk)
    _page_in(model, policy, spec, prompts[0])
    memory_limit.fill_holes()
    memory_limit.map_from(MAPPED_FROM)
    meter = Meter(model.device)
    first = _run(runner, prompts, spec.new_tokens)
    peak = meter.peak()
    timed = [] if spec.warm_up else [first]
    memory_limit.map_from(MAPPED_FROM_TIMED)
    while len(timed) < spec.rounds:
        timed.append(_run(runner, prompts, spec.new_tokens))
    prefill, observe, compress, ttft = zip(*(phase for found in timed for phase in found.phases), strict=True)
    tpot = Spread.of([seconds for found in timed for seconds in found.step_s])
    return Measured(
        **spec.model_dump(include={"tokens", "batch", "new_tokens", "rounds"}),
        prefill_s=Spread.of(prefill),
        observe_s=Spread.of(observe),
        compress_s=Spread.of(compress),
        ttft_s=Spread.of(ttft),
        tpot_s=tpot,
        tokens_per_s=spec.batch / tpot.median,
        kv_bytes=first.kv_bytes,
        model_bytes=meter.before,
        peak_bytes=peak,
        predicted_bytes=predict(model, policy, spec, budget),
        memory=meter.kind,
    )


def predict(model: AttachedModel, policy: KVPolicy, spec: ProbeSpec, budget: int | None) -> int:
    """What `harness.speed.predicted_memory` expects of a probe. budget: slots per layer and KV head."""
    shape = spec.model_dump(include={"tokens", "batch", "new_tokens", "chunk"})
    return predicted_memory.predict(model.config, model.dtype.itemsize, policy, budget=budget, **shape)


def budget_of(policy: KVPolicy, spec: ProbeSpec) -> int | None:
    """Slots per layer and KV head; None for a policy that keeps everything. Raises HarnessError."""
    if not policy.budgeted:
        return None
    if spec.budget is None:
        raise HarnessError(f"method {spec.method} needs a budget; give tokens (128) or a fraction (0.25)")
    try:
        return Budget.parse(spec.budget).resolve(spec.tokens)
    except PolicyError as error:
        raise HarnessError(str(error)) from None


def draw_prompts(spec: ProbeSpec, vocabulary: Sequence[int]) -> list[list[int]]:
    """Token ids of every prompt of the batch, the given ones first. Raises HarnessError."""
    if spec.ids and len(spec.ids) != spec.tokens:
        raise HarnessError(f"a probe of {spec.tokens} tokens was given {len(spec.ids)} ids; give as many or none")
    generator, known = torch.Generator().manual_seed(spec.seed), torch.tensor(vocabulary)
    drawn: list[list[int]] = known[torch.randint(len(known), (spec.batch, spec.tokens), generator=generator)].tolist()
    return [list(spec.ids), *drawn[1:]] if spec.ids else drawn


def _page_in(model: AttachedModel, policy: KVPolicy, spec: ProbeSpec, ids: list[int]) -> None:
    """Run the start of a prompt, so that weights and code are resident and kernels are chosen."""
    short = ids[: min(64, len(ids) - 1)]
    with suppress(PolicyError):  # so short a prompt may be refused
        runner = Isolated(model, policy, max(1, len(short) // 2) if policy.budgeted else None)
        runner.decode([runner.prefill(short)], 2)


def _run(runner: Isolated, prompts: list[list[int]], new_tokens: int) -> _Round:
    done: list[Compressed] = []
    found = _Round([], [], ())
    for ids in prompts:
        done.append(runner.prefill(ids))
        start = time.perf_counter()
        int(done[-1].logits.argmax())  # waits for a GPU
        seconds = (done[-1].prefill_s, done[-1].observe_s, done[-1].compress_s)
        found.phases.append((*seconds, sum(seconds) + time.perf_counter() - start))
    found.kv_bytes = tuple(done[0].layer_bytes)
    found.step_s = runner.decode(done, new_tokens).step_s
    return found


class Prober:
    """Asks a server of its own for probes, each of which runs in a fresh process. A context manager.

    Args:
        model: as in `harness run`.
        dtype: as in `harness run`.
        device: as in `harness run`.
        threads: CPU threads of a probe; None for PyTorch's choice.

    Raises:
        HarnessError: the model cannot be loaded; the server ended or does not answer.
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
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        try:
            self._server: subprocess.Popen[bytes] = subprocess.Popen(
                [*self.command, "--reply", str(write)],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(write,),
                start_new_session=True,  # an interrupt is for the client, which then ends the server
                env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            os.close(write)
        try:
            self.model_bytes = self._read(LOAD_S).model_bytes
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server and whatever it runs."""
        with suppress(OSError):
            self.__dict__["_server"].stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(CLOSE_S if kind is None else 0)  # an idle one ends by itself
        with suppress(OSError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        os.close(self._replies)
        self._errors.close()

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, timeout_s: float = 600.0) -> ProbeResult:
        """Run one probe. limit_bytes: of its process, the model included. timeout_s: on CUDA, loading included."""
        job = Job(spec=spec, limit_bytes=limit_bytes, timeout_s=timeout_s)
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(job.model_dump_json().encode() + b"\n")
            self._server.stdin.flush()
        except OSError:
            raise self._gone() from None
        reply = self._read(timeout_s + GRACE_S)
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
        reply = Reply.model_validate(json.loads(line))
        if reply.error is not None:
            raise HarnessError(reply.error)
        return reply

    def _gone(self) -> HarnessError:
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(CLOSE_S)
        why: Any = self._server.returncode
        said = last_line(self._errors)
        return HarnessError(f"the probe server of {self.model} ended ({why}){said and ': '}{said}; try again")


def last_line(stream: Any) -> str:
    """The last line that says something in a binary file written by another process; empty when there is none."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
    lines: list[str] = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
