"""Seconds of the parts of a computation: by the processor's clock, or by events on a CUDA stream."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch


class StepClock:
    """Seconds from one tick to the next. On CUDA nothing waits until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events = list[torch.cuda.Event]()
        self._times = list[float]()

    def tick(self) -> None:
        if self.device.type != "cuda":
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def seconds(self) -> list[float]:
        """Return those between all ticks so far; on CUDA this waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
            return [first.elapsed_time(last) / 1000 for first, last in pairwise(self._events)]
        return [last - first for first, last in pairwise(self._times)]


class PhaseClock:
    """Adds up seconds by the name of a part. On CUDA nothing waits until `seconds` is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spent: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the seconds of what happens inside towards `name`."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._spent[name] += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def seconds(self, name: str) -> float:
        """Return the seconds that were spent in `name` so far; on CUDA this waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for part, first, last in self._events:
                self._spent[part] += first.elapsed_time(last) / 1000
            self._events.clear()
        return self._spent[name]
