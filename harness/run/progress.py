"""How a fanned-out run is getting on: a line while it runs, and `progress.json` in its folder for `harness status`."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from harness.records.atomic_files import write_text
from harness.records.record import Record
from harness.records.spec import Frozen

PROGRESS_FILE = "progress.json"
EVERY_S = {True: 1.0, False: 30.0}  # on a terminal, elsewhere


Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, lt=1e12)]


class Snapshot(Frozen):
    cells: dict[str, Count]  # of this and earlier sessions, by status
    total: Count  # cells of the whole run
    samples: Count  # that this session has to do, or did
    samples_left: Count
    tokens: Count  # of prompts and generations in this session
    seconds: Seconds  # of this session
    workers: Count
    worker_s: Seconds = 0.0  # that workers were ready for work, over all of them
    busy_s: Seconds = 0.0  # those that items took of them
    left_s: Seconds | None  # None before anything is done
    at: Seconds  # seconds since the epoch, by the driver's clock

    def line(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.cells.items()))
        cells = f"{sum(self.cells.values())} of {self.total} cells ({counts or 'none yet'})"
        return f"{cells}, {self.samples_left} samples to do, {self.workers} workers, {self.pace()}"

    def pace(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        busy = f", busy {self.busy_s / self.worker_s:.0%}" if self.worker_s else ""
        left = "" if self.left_s is None else f", {duration(self.left_s)} left"
        return f"{rate:,.0f} tokens/s{busy}{left}"


def duration(seconds: float) -> str:
    """Write seconds as 1 h 02 min, 3 min 20 s or 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


@dataclass
class Progress:
    """Counts records and says so now and then. A context: the last word is said at its end."""

    folder: Path  # of the run
    samples: int  # to be done now
    total: int  # cells of the whole run
    done: int  # cells that earlier sessions did
    workers: Callable[[], int]  # asks how many there are now
    spent: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)  # asks for `worker_s` and `busy_s`

    def __post_init__(self) -> None:
        self.cells = Counter[str]({"done before": self.done} if self.done else {})
        self.left, self.tokens = self.samples, 0
        self.start = self.said = time.monotonic()
        self._every = EVERY_S[sys.stderr.isatty()]

    def add(self, records: Sequence[Record]) -> None:
        """records: of whole samples."""
        self.cells.update(record.status for record in records)
        prompts = {(record.task, record.sample_id): record.prompt_tokens for record in records}
        self.tokens += sum(prompts.values()) + sum(len(record.token_ids) for record in records)
        self.left -= len(prompts)
        if time.monotonic() - self.said >= self._every:
            self.say()

    def say(self) -> None:
        """The time left is that of as many samples at the pace so far."""
        seconds, ended = time.monotonic() - self.start, self.samples - self.left
        worker_s, busy_s = self.spent()
        now = Snapshot(
            cells=dict(self.cells),
            total=self.total,
            samples=self.samples,
            samples_left=max(0, self.left),
            tokens=self.tokens,
            seconds=seconds,
            workers=self.workers(),
            worker_s=worker_s,
            busy_s=busy_s,
            left_s=seconds / ended * self.left if ended else None,
            at=time.time(),
        )
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{now.line():<110}", file=sys.stderr, end=end, flush=True)
        write_text(self.folder / PROGRESS_FILE, now.model_dump_json() + "\n")
        self.said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.say()
        if sys.stderr.isatty():
            print(file=sys.stderr)
