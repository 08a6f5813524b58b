"""A check is steps in order of value. Each has its own limit and its own file, and none stops the next.

A file is written after every measurement of its step, in one move: whatever ends the check leaves what was measured.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.machine import git_commit, versions
from harness.records.atomic_files import write_text
from harness.records.log_folder import now
from tests.gpu_check.card import Card

LEAST_S = 5.0
"""No step begins with less time left."""
LINE = 400
"""Characters of an error."""


class Late(BaseException):
    """A step's time is up. No Exception, or what catches those of a probe would catch it."""


@dataclass(frozen=True)
class Size:
    """What is measured: two prompt lengths, batches of the longer one, slots of every head, and the models' names."""

    model: str
    dtype: str
    lengths: tuple[int, int]
    budget: int
    batches: tuple[int, ...]
    most: int  # largest batch of the boundary search
    steps: int  # decode steps that are timed
    copied: int  # bytes of the copy that shows the memory's bandwidth
    matrix: int  # rows of the square product that shows the arithmetic's
    layer: tuple[int, int, int]  # query heads, KV heads and head dimension of the model, for kernels by themselves
    second: str  # a model that is measured last, if there is time


FULL = Size(
    "shape:llama-3-8b",
    "bfloat16",
    (8192, 32768),
    512,
    (1, 8, 16),
    128,
    12,
    2**31,
    8192,
    (32, 8, 128),
    "shape:gpt-oss-20b",
)
REHEARSAL = Size("tiny", "float32", (48, 96), 16, (1, 3), 3, 3, 2**16, 32, (4, 2, 16), "tiny")


@dataclass(frozen=True)
class Step:
    """Part of a check. body: measures, through `Check.measure` or into `Check.found`."""

    name: str
    limit_s: float
    body: Callable[[Check], None]


@dataclass
class Check:
    """One run of the steps. found: results of the step that runs, by name. seconds: for all of them."""

    card: Card
    size: Size
    out: Path
    seconds: float
    begun: float = field(default_factory=time.perf_counter)
    found: dict[str, Any] = field(default_factory=dict)
    _head: dict[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> Path:
        """Where benches and boundary searches are stored, as `harness board` reads them."""
        return self.out / "records"

    def left_s(self) -> float:
        return self.seconds - (time.perf_counter() - self.begun)

    def run(self, step: Step) -> str:
        """Run a step; how it ended: ok, late, failed, or no time."""
        start, self.found = time.perf_counter(), {}
        self._head = {"step": step.name, "status": "started", "rehearsal": self.card.rehearsal, "at": now()}
        self._head |= {"commit": git_commit(), "versions": versions(), **self.card.facts()}
        self.save()
        status = {"status": "ok"}
        if self.left_s() < LEAST_S:
            status = {"status": "no time"}
        else:
            try:
                with alarm(min(step.limit_s, self.left_s())):
                    step.body(self)
            except Late as late:
                status = {"status": "late", "error": str(late)}
            except Exception as error:  # whatever a step trips over is told, and the next one runs
                status = {"status": "failed", "error": line_of(error)}
        self._head |= {**status, "seconds": round(time.perf_counter() - start, 2)}
        self.save()
        self.card.free()
        return self._head["status"]

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        """Keep what a call returns under `name`, or in its place why there is none; None then.

        What an error held is given back: an out-of-memory of one measurement is no other's.
        """
        value, told = None, None
        try:
            told = value = call()
        except torch.OutOfMemoryError as error:
            told = {"status": "oom", "error": line_of(error)}
        except Exception as error:  # as in `run`
            told = {"status": "failed", "error": line_of(error)}
        self.found[name] = told
        self.card.free()
        self.save()
        return value

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self._head, "results": self.found}, indent=1, default=str)
        write_text(self.out / f"{self._head['step']}.json", text + "\n")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise Late inside after so many seconds, as soon as Python runs: a kernel on the card is waited for."""

    def ring(*_: object) -> None:
        raise Late(f"over its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line_of(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LINE]
