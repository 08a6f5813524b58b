"""Pretend workers on a pretend clock, for tests of the scheduler."""

from collections import deque
from collections.abc import Callable, Sequence

from harness.run.schedule import BUNDLE_ITEMS, DEPTH, Done, Event, Lost, WorkerReady

Fate = Callable[[int, list[int], bool], Event[str] | None]
"""What happens to a worker that runs this bundle, carefully or not; None: nothing, for as long as it is let."""


def done(worker: int, bundle: Sequence[int], careful: bool = False, *, each_s: float = 1.0) -> Event[str]:
    """All is well."""
    return Done(worker, [str(piece) for piece in bundle], each_s * len(bundle))


class Workers:
    """A pool of `size` pretend workers. Its clock moves only while it is waited for and nothing happens.

    fate: of a worker's first bundle, asked at every wait. start: of a worker that was started, None for not yet.
    full: of the submits to come, those that find no room. sent: every bundle, with its worker and whether to take care.
    bad: every bad end of a bundle, with what ran; None is a hang.
    """

    def __init__(self, fate: Fate, *, size: int = 1, start: Callable[[int], Event[str] | None] = WorkerReady) -> None:
        self.fate, self.size, self.start = fate, size, start
        self.now, self.made = 0.0, 0
        self.unready = list[int]()
        self.held = dict[int, deque[tuple[list[int], bool]]]()
        self.full = list[bool]()
        self.sent = list[tuple[int, list[int], bool]]()
        self.bad = list[tuple[Event[str] | None, list[int], bool]]()
        while self.made < size:
            self._begin()

    @property
    def starting(self) -> int:
        return len(self.unready)

    @property
    def bundles(self) -> list[list[int]]:
        """What was sent, in order."""
        return [bundle for _, bundle, _ in self.sent]

    def submit(self, worker: int, work: Sequence[int], *, careful: bool) -> None:
        assert len(self.held[worker]) < DEPTH and 0 < len(work) <= BUNDLE_ITEMS
        if self.full and self.full.pop(0):
            raise MemoryError("full")
        self.held[worker].append((list(work), careful))
        self.sent.append((worker, list(work), careful))

    def wait(self, seconds: float) -> list[Event[str]]:
        events = [event for worker in list(self.unready) if (event := self._born(worker)) is not None]
        for worker, bundles in list(self.held.items()):
            if bundles and (event := self.fate(worker, *bundles[0])) is not None:
                events.append(event)
                self._ended(worker, event)
        self.now += 0.0 if events else seconds
        return events

    def replace(self, worker: int) -> None:
        hung = self.held.pop(worker, None)
        if hung is not None:
            self.bad.append((None, *hung[0]))
        if len(self.held) + len(self.unready) < self.size:
            self._begin()

    def _begin(self) -> None:
        self.unready.append(self.made)
        self.made += 1

    def _born(self, worker: int) -> Event[str] | None:
        event = self.start(worker)
        if event is not None:
            self.unready.remove(worker)
        if isinstance(event, WorkerReady):
            self.held[worker] = deque()
        return event

    def _ended(self, worker: int, event: Event[str]) -> None:
        if not isinstance(event, Done):
            self.bad.append((event, *self.held[worker][0]))
        if isinstance(event, Lost):
            del self.held[worker]
        else:
            self.held[worker].popleft()
