"""Workers and time for `harness.run.schedule` that exist on paper only: see `harness.simulate.simulate`."""

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Literal

from harness.errors import HarnessError
from harness.run.schedule import Done, Event, Lost, WorkerReady
from harness.simulate.workload import Work

HOPELESS = 1000  # so many nodes in a row are lost with nothing done in between

Share = Literal["work", "start", "driver", "tail", "lost"]
"""What a worker's time goes into: work that was finished; `start` until it is first ready, planning included;
`driver`, waiting for work between items; `tail`, nothing left to do; `lost` with its node, work and replacement."""


@dataclass(frozen=True)
class Costs:
    """Seconds for which the driver is busy.

    plan_token_s: per prompt token, before any worker starts. bundle_s: to hand out a bundle and take its results.
    token_s: per prompt token handed out. look_s: per worker, each time the driver looks for what has ended. record_s:
    to take a record, count it and make a line of it. append_s: an append of nothing, flushed. byte_s: per byte of it.

    The defaults were measured with the real code (CPU time of all threads of the driver, which had one core of a
    virtual machine with two; Ray 2.60): planning RULER at 8k tokens with SmolLM2's tokenizer, `RayPool` with bundles of
    one item that does nothing and has 0 to 300,000 token ids and their text, `Schedule` and `ray.wait` with 8 to 512
    workers, and `RunStore.append` of records of 1.5 kB, flushed to that machine's disk (wall time).
    """

    plan_token_s: float = 7.4e-6
    bundle_s: float = 1.2e-3
    token_s: float = 2.9e-8
    look_s: float = 1.5e-6
    record_s: float = 8.3e-5
    append_s: float = 4.0e-3
    byte_s: float = 4.5e-9


@dataclass(frozen=True)
class Cluster:
    """What runs the work, one worker a GPU."""

    nodes: int = 1
    gpus: int = 1  # of a node
    start_s: float = 0.0  # from an actor's start until its model is loaded
    mtbf_s: float | None = None  # mean time between losses of one node, None for no losses
    node_s: float = 0.0  # until another node is in the place of a lost one
    seed: int = 42  # of the losses

    @property
    def workers(self) -> int:
        return self.nodes * self.gpus


@dataclass
class SimulatedClock:
    """The driver's time in seconds."""

    now: float = 0.0
    busy: float = 0.0  # that it was not waiting

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds


@dataclass
class _Worker:
    """One worker, and its bundles as (start, end, items).

    slot: its GPU, counted through the cluster. began: since when its slot waits for it. kind: what that time goes into.
    idle: end of its last finished bundle. free: when all it holds is done. lost: when its node went.
    """

    slot: int
    began: float
    kind: Share
    ready: bool = False
    idle: float = 0.0
    free: float = 0.0
    lost: float | None = None
    bundles: deque[tuple[float, float, int]] = field(default_factory=deque)


class SimulatedPool:
    """Workers for `Schedule`, in no time at all.

    doze: nothing would come of returning from `wait` before something happened.
    """

    def __init__(self, cluster: Cluster, costs: Costs, clock: SimulatedClock, *, size: int) -> None:
        self.cluster, self.costs, self.clock = cluster, costs, clock
        self.shares: dict[Share, float] = defaultdict(float)
        self.doze = True
        self.nodes_lost = self._in_a_row = 0
        self._workers: dict[int, _Worker] = {}
        self._numbers, self._order = count(), count()
        self._events: list[tuple[float, int, str, int]] = []
        self._random = Random(cluster.seed)
        self._back: dict[int, float] = {}
        for slot in range(size):
            self._start(slot, began=0.0, kind="start")
        for node in range(-(-size // cluster.gpus)):
            self._doom(node, clock.now)

    @property
    def starting(self) -> int:
        return sum(not worker.ready for worker in self._workers.values())

    def submit(self, worker: int, work: Sequence[Work], *, careful: bool) -> None:
        """Give a worker a bundle: it starts when the driver has sent it and the worker is free."""
        self.clock.spend(self.costs.bundle_s + self.costs.token_s * sum(item.tokens for item in work))
        own = self._workers[worker]
        start = max(own.free, self.clock.now)
        own.free = start + sum(item.seconds for item in work)
        own.bundles.append((start, own.free, len(work)))
        self._push(own.free, "done", worker)

    def wait(self, seconds: float) -> list[Event[None]]:
        """Return what has happened by now, one event a worker as in Ray's pool, or else what happens next."""
        self.clock.spend(self.costs.look_s * len(self._workers))
        upcoming = self._events[0][0] if self._events else math.inf
        patience = math.inf if self.doze and self._events else max(seconds, 1e-6)
        now = self.clock.now = max(self.clock.now, min(upcoming, self.clock.now + patience))
        events: dict[int, Event[None]] = {}
        later = []
        while self._events and self._events[0][0] <= now:
            entry = heapq.heappop(self._events)
            at, _, kind, number = entry
            if kind == "node":
                self._lose_node(number, at)
            elif number in events:
                later.append(entry)
            elif number in self._workers:
                events[number] = self._event(kind, number, at)
        for entry in later:
            heapq.heappush(self._events, entry)
        return list(events.values())

    def replace(self, worker: int) -> None:
        """Start another worker in the place of one, on the node that comes for a lost one."""
        own = self._workers.pop(worker)
        at = self.clock.now if own.lost is None else own.lost
        if not own.ready:
            self.shares[own.kind] += at - own.began
        elif own.bundles and own.bundles[0][0] < at:
            self.shares["driver"] += own.bundles[0][0] - own.idle
            self.shares["lost"] += at - own.bundles[0][0]
        else:
            self.shares["driver"] += at - own.idle
        self._start(own.slot, began=at, kind="lost")

    def stop(self) -> None:
        """Account for what workers did since their last bundle."""
        for own in self._workers.values():
            if own.ready:
                self.shares["tail"] += self.clock.now - own.idle
            else:
                self.shares[own.kind] += self.clock.now - own.began

    def _start(self, slot: int, *, began: float, kind: Share) -> None:
        number = next(self._numbers)
        self._workers[number] = _Worker(slot, began, kind)
        there = max(self.clock.now, self._back.get(slot // self.cluster.gpus, 0.0))
        self._push(there + self.cluster.start_s, "ready", number)

    def _event(self, kind: str, number: int, at: float) -> Event[None]:
        own = self._workers[number]
        if kind == "lost":
            own.lost = at
            return Lost(number, "its node was lost", node=True)
        self._in_a_row = 0 if kind == "done" else self._in_a_row
        if kind == "ready":
            self.shares[own.kind] += at - own.began
            own.ready, own.idle, own.free = True, at, at
            return WorkerReady(number)
        start, end, items = own.bundles.popleft()
        self.shares["driver"] += start - own.idle
        self.shares["work"] += end - start
        own.idle = end
        return Done(number, [None] * items, end - start)

    def _lose_node(self, node: int, at: float) -> None:
        self.nodes_lost += 1
        self._in_a_row += 1
        if self._in_a_row > HOPELESS * self.cluster.nodes:
            raise HarnessError("nodes are lost before anything gets done; give a longer --mtbf-hours")
        self._back[node] = at + self.cluster.node_s
        for number, own in self._workers.items():
            if own.slot // self.cluster.gpus == node:
                self._push(at, "lost", number)
        self._doom(node, at + self.cluster.node_s)

    def _doom(self, node: int, since: float) -> None:
        if self.cluster.mtbf_s is not None:
            self._push(since + self._random.expovariate(1 / self.cluster.mtbf_s), "node", node)

    def _push(self, at: float, kind: str, number: int) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, number))
