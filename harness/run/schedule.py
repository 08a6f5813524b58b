"""Which worker does which item when, and what becomes of an item whose worker is lost. Knows no Ray and no torch.

Items go out in bundles of about a second of work, two to a worker, so that a worker never waits for the driver; only
the first of a worker's bundles runs. When a worker is lost the bundle it ran is suspect: a bundle of several items is
taken apart and each goes out alone, an item alone is charged with a try, and after `tries` of them it is given up and
the run goes on without it. What a lost node ran is not charged, because it is no fault of an item. An item whose worker
ran out of memory goes out once more to be done with care, in the smallest steps, and then is given up as `oom`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from harness.errors import HarnessError

W = TypeVar("W")
R = TypeVar("R")
W_contra = TypeVar("W_contra", contravariant=True)

DEPTH = 2  # bundles that a worker holds
BUNDLE_S = 1.0
BUNDLE_ITEMS = 256
STORE_S = 0.5  # a driver writes what came in at least this often
NODES_LOST = 20  # that often an item may be on a node when it goes


@dataclass
class Item(Generic[W]):
    """A piece of work that is done as a whole."""

    work: W
    tries: int = 0  # charged so far
    nodes_lost: int = 0  # how often it was on a node that went
    alone: bool = False  # it goes out by itself
    careful: bool = False  # it is to be done in the smallest steps


@dataclass(frozen=True)
class WorkerReady:
    """A worker that can be given work."""

    worker: int


@dataclass(frozen=True)
class Done(Generic[R]):
    """What came of a worker's first bundle, one result per item, and the seconds it took there."""

    worker: int
    results: Sequence[R]
    seconds: float


@dataclass(frozen=True)
class Raised:
    """A worker's first bundle ended in an exception; the worker lives."""

    worker: int
    why: str
    memory: bool = False  # it says that it ran out of it


@dataclass(frozen=True)
class Lost:
    """A worker that is gone, with all it held."""

    worker: int
    why: str
    node: bool = False  # its node went, which is no fault of what it ran
    memory: bool = False  # it ran out of it


@dataclass(frozen=True)
class Refused:
    """A worker that could not be started as asked and would not be the next time, such as for a missing model."""

    worker: int
    why: str


Event = WorkerReady | Done[R] | Raised | Lost | Refused


@dataclass(frozen=True)
class GivenUp:
    """Why an item has no result."""

    status: Literal["failed", "oom"]
    why: str


class Pool(Protocol[W_contra, R]):
    """Workers, each with a number of its own that is never used again."""

    def submit(self, worker: int, work: Sequence[W_contra], *, careful: bool) -> None:
        """Give a ready worker a bundle, behind those it has."""

    def wait(self, seconds: float) -> list[Event[R]]:
        """Return what happened, as soon as something did; at the latest after `seconds`."""

    def replace(self, worker: int) -> None:
        """Put an end to a worker, if it has none yet, and start another one in its place."""

    @property
    def starting(self) -> int:
        """Workers that may yet be ready."""


@dataclass
class _Held(Generic[W]):
    """Bundles that a worker has, the first of them running since `since`."""

    bundles: deque[list[Item[W]]] = field(default_factory=deque)
    since: float = 0.0
    ready: float = 0.0


class Schedule(Generic[W, R]):
    """Runs items, in the order given, on a pool of workers, of which more may come and others be lost at any time.

    timeout_s: a bundle that runs longer than this has hung, and its worker is replaced. tries: an item is given up when
    it was charged this often. start_s: with no worker at all for this long, nothing will come any more.
    """

    def __init__(
        self,
        items: Sequence[W],
        pool: Pool[W, R],
        *,
        timeout_s: float,
        tries: int = 3,
        start_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.timeout_s, self.tries, self.start_s, self.clock = pool, timeout_s, tries, start_s, clock
        self._queue = deque(map(Item[W], items))
        self._held: dict[int, _Held[W]] = {}
        self._each_s = 0.0  # seconds of an item, the latest counting most; 0 before the first
        self._refusals: list[str] = []
        self._alone_since = clock()
        self._past_s = 0.0  # of workers that are gone
        self.busy_s = 0.0  # seconds that workers say items took

    @property
    def workers(self) -> int:
        """Ready or at work."""
        return len(self._held)

    @property
    def worker_s(self) -> float:
        """Seconds that workers were there, from ready on, over all of them."""
        now = self.clock()
        return self._past_s + sum(now - held.ready for held in self._held.values())

    def run(self) -> Iterator[list[tuple[Item[W], R | GivenUp]]]:
        """Yield what becomes of the items, in order of completion; an empty list when nothing came for a second.

        Raises HarnessError when no worker can be had; what was yielded before stands.
        """
        while self._queue or any(held.bundles for held in self._held.values()):
            self._fill()
            found = [end for event in self.pool.wait(self._patience()) for end in self._handle(event)]
            found += self._expired()
            yield found
            self._check_hope()

    def _fill(self) -> None:
        """Give bundles to the workers that hold the fewest."""
        while self._queue and self._held:
            worker, held = min(self._held.items(), key=lambda pair: len(pair[1].bundles))
            if len(held.bundles) >= DEPTH:
                return
            bundle = self._next_bundle()
            try:
                self.pool.submit(worker, [item.work for item in bundle], careful=bundle[0].careful)
            except MemoryError:  # there is no room to hand work out: what is out comes back first
                self._queue.extendleft(reversed(bundle))
                if not any(held.bundles for held in self._held.values()):
                    none = "no room to hand out work although none is out; raise the object store"
                    raise HarnessError(none) from None
                return
            if not held.bundles:
                held.since = self.clock()
            held.bundles.append(bundle)

    def _next_bundle(self) -> list[Item[W]]:
        """As many fresh items as take `BUNDLE_S`, not more than each worker's share of half of what is left."""
        first = self._queue.popleft()
        bundle = [first]
        size = 1 if not self._each_s else int(min(BUNDLE_S / self._each_s, BUNDLE_ITEMS))
        size = min(size, len(self._queue) // (2 * DEPTH * len(self._held)))
        while len(bundle) < size and not first.alone and not self._queue[0].alone:
            bundle.append(self._queue.popleft())
        return bundle

    def _handle(self, event: Event[R]) -> Iterator[tuple[Item[W], R | GivenUp]]:
        match event:
            case WorkerReady(worker):
                self._held[worker] = _Held(ready=self.clock())
            case Done(worker, results, seconds):
                bundle = self._take_first(worker)
                own = seconds / len(bundle)
                self.busy_s += seconds
                self._each_s = own if not self._each_s else 0.8 * self._each_s + 0.2 * own
                yield from zip(bundle, results, strict=True)
            case Raised(worker, why, memory):
                yield from self._blame(self._take_first(worker), why, memory=memory)
            case Lost(worker, why, node, memory):
                yield from self._lose(worker, why, node=node, memory=memory)
            case Refused(worker, why):
                self._refusals.append(why)

    def _take_first(self, worker: int) -> list[Item[W]]:
        held = self._held[worker]
        held.since = self.clock()
        return held.bundles.popleft()

    def _lose(self, worker: int, why: str, *, node: bool, memory: bool) -> Iterator[tuple[Item[W], GivenUp]]:
        if list(self._held) == [worker]:  # not one that dies before it is ready: that is no worker yet
            self._alone_since = self.clock()
        held = self._held.pop(worker, _Held[W](ready=self.clock()))
        self._past_s += self.clock() - held.ready
        running = held.bundles.popleft() if held.bundles else []
        for bundle in reversed(held.bundles):
            self._queue.extendleft(reversed(bundle))
        self.pool.replace(worker)
        if node:
            yield from self._uproot(running, why)
        else:
            yield from self._blame(running, why, memory=memory)

    def _uproot(self, bundle: list[Item[W]], why: str) -> Iterator[tuple[Item[W], GivenUp]]:
        for item in reversed(bundle):
            item.nodes_lost, item.alone = item.nodes_lost + 1, True
            if item.nodes_lost > NODES_LOST:
                yield item, GivenUp("failed", f"its node was lost {item.nodes_lost} times, last: {why}")
            else:
                self._queue.appendleft(item)

    def _blame(self, bundle: list[Item[W]], why: str, *, memory: bool) -> Iterator[tuple[Item[W], GivenUp]]:
        """Charge an item that was alone; those of a bundle go out alone before anything else."""
        for item in reversed(bundle):
            item.alone = True
            item.tries += len(bundle) == 1
            if memory and item.careful:
                yield item, GivenUp("oom", f"{why} (also in the smallest steps)")
            elif item.tries >= self.tries:
                yield item, GivenUp("oom" if memory else "failed", f"given up after {item.tries} tries: {why}")
            else:
                item.careful = item.careful or (memory and len(bundle) == 1)
                self._queue.appendleft(item)

    def _patience(self) -> float:
        """Seconds until a bundle may have hung, at most one."""
        now = self.clock()
        ends = [held.since + self.timeout_s - now for held in self._held.values() if held.bundles]
        return max(0.0, min([1.0, *ends]))

    def _expired(self) -> list[tuple[Item[W], R | GivenUp]]:
        now, found = self.clock(), list[tuple[Item[W], R | GivenUp]]()
        for worker, held in list(self._held.items()):
            if held.bundles and now - held.since >= self.timeout_s:
                found += self._lose(worker, f"no answer in {self.timeout_s:g} s", node=False, memory=False)
        return found

    def _check_hope(self) -> None:
        if self._held or not self._queue:
            return
        if not self.pool.starting:
            raise HarnessError(self._refusals[-1] if self._refusals else "no worker is left and none can be started")
        if self.clock() - self._alone_since > self.start_s:
            raise HarnessError(
                f"no worker in {self.start_s:g} s; ask for fewer or smaller ones, or see what the cluster says of them"
            )
