"""A pool of Ray actors for `harness.run.schedule`: one per GPU or CPU slot, each with what it works with loaded once.

The actor is the only thing here that runs elsewhere. It never writes to the run folder: results and log lines go back
to the driver. An actor is not restarted by Ray; the schedule decides what is done about a lost one.
"""

import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from typing import Any, Generic, TypeVar

import ray
from ray import exceptions
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from harness.errors import HarnessError, shown
from harness.run.schedule import Done, Event, Lost, Raised, Refused, WorkerReady
from harness.stopping import stopping

W = TypeVar("W")
R = TypeVar("R")
Handler = Callable[[Sequence[W], bool], Sequence[R]]
"""Does a bundle, one result per piece of work; the second argument asks for the smallest steps."""

CONNECT_S = 5.0
DIED_STARTING = 3  # workers in a row, per worker wanted, that may die before they are ready
LOW_MEMORY = "low on memory"  # what Ray's memory monitor says of a worker it killed
NODE = ("node has died", "node died", "preempted")


@dataclass(frozen=True)
class WorkerShape:
    """What a worker takes of its node. More than one GPU: all of one node, held together by a placement group."""

    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        return {name: own for name, own in (("CPU", self.cpus), ("GPU", self.gpus)) if own}


@contextmanager
def connected(address: str) -> Iterator[tuple[Mapping[str, float], str]]:
    """Connect to Ray for as long as the context lasts: CPUs, GPUs and others of all its nodes now, and its dashboard.

    address: `auto` for a cluster that runs on this machine (or RAY_ADDRESS), else one of our own; `local` for one of
    our own; otherwise that of a cluster's head, `host:port` or `ray://host:port`. Raises HarnessError for none there.
    """
    if address not in ("auto", "local"):
        _check_reachable(address)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    own = {"include_dashboard": False, **quiet}
    try:
        try:
            context = ray.init(address=address, **(own if address == "local" else quiet))
        except ConnectionError:
            if address != "auto":
                raise
            context = ray.init(address="local", **own)
    except (exceptions.RayError, ConnectionError, RuntimeError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise HarnessError(f"no Ray cluster at {shown(address)}: {why}; see `ray status`") from None
    try:
        resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        with stopping():  # Ray sets a handler of its own, which would end a run as failed
            yield resources, getattr(context, "dashboard_url", "") or ""
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise HarnessError(f"--ray {shown(address)} is no address; give auto, local, host:port or ray://host:port")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:  # ValueError: a host that no name may be
        raise HarnessError(f"no Ray cluster at {shown(address)}: {error}; start one with `ray start --head`") from None


class Worker:
    """What runs in an actor. make: called once, there; what it raises refuses the worker."""

    def __init__(self, make: Callable[[], tuple[Handler[Any, Any], Mapping[str, Any]]]) -> None:
        self.make = make
        self.logged = BufferingHandler(sys.maxsize)

    def start(self) -> dict[str, Any]:
        """Make what it works with, and tell what the driver should know of this worker."""
        logging.getLogger("harness").addHandler(self.logged)
        self.handler, about = self.make()
        context = ray.get_runtime_context()
        return {**about, "node": context.get_node_id()[:12], "host": socket.gethostname(), "time": time.time()}

    def do(self, work: Sequence[Any], careful: bool) -> tuple[Sequence[Any], float, list[str]]:
        """Do a bundle; return its results, its seconds, and what was logged."""
        start = time.perf_counter()
        results = self.handler(work, careful)
        lines = [record.getMessage() for record in self.logged.buffer]
        self.logged.flush()
        return results, time.perf_counter() - start, lines


@dataclass
class _Member:
    """A worker as the driver knows it. tasks: its bundles, in the order in which it does them."""

    actor: Any
    group: Any
    tasks: list[Any] = field(default_factory=list)
    ready: bool = False


class RayPool(Generic[W, R]):
    """`size` workers of one shape.

    make: as for `Worker`; a HarnessError that it raises refuses the worker for good. accept: called with what each new
    worker tells of itself; a HarnessError refuses it. tell: called with a worker's number and a line for its log.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Handler[W, R], Mapping[str, Any]]],
        *,
        size: int,
        shape: WorkerShape,
        accept: Callable[[int, Mapping[str, Any]], None] = lambda worker, about: None,
        tell: Callable[[int, str], None] = lambda worker, line: None,
    ) -> None:
        self.make, self.size, self.shape, self.accept, self.tell = ray.put(make), size, shape, accept, tell
        self._members: dict[int, _Member] = {}
        self._made = self._died_starting = 0
        for _ in range(size):
            self._start()

    @property
    def starting(self) -> int:
        return sum(not member.ready for member in self._members.values())

    def submit(self, worker: int, work: Sequence[W], *, careful: bool) -> None:
        """Give a worker a bundle. Raises MemoryError when the object store has no room for it."""
        member = self._members[worker]
        try:
            member.tasks.append(member.actor.do.remote(list(work), careful))
        except exceptions.ObjectStoreFullError as error:
            raise MemoryError(str(error)) from None

    def wait(self, seconds: float) -> list[Event[R]]:
        """Events of the first task of every worker; a worker's others cannot end before it."""
        first = {member.tasks[0]: number for number, member in self._members.items() if member.tasks}
        if not first:
            time.sleep(min(seconds, 0.05))
            return []
        ended, _ = ray.wait(list(first), num_returns=1, timeout=seconds)
        if ended:  # whatever else has ended by now comes along
            ended, _ = ray.wait(list(first), num_returns=len(first), timeout=0)
        return [self._event(first[task], task) for task in ended]

    def replace(self, worker: int) -> None:
        self._end(worker)
        if len(self._members) < self.size:
            self._start()

    def stop(self) -> None:
        for worker in list(self._members):
            self._end(worker)

    def _start(self) -> None:
        options: dict[str, Any] = {"num_cpus": self.shape.cpus, "num_gpus": self.shape.gpus, "max_restarts": 0}
        group = None
        if self.shape.gpus > 1:
            group = placement_group([self.shape.resources], strategy="STRICT_PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group=group)
        actor: Any = ray.remote(Worker).options(**options).remote(self.make)
        self._members[self._made] = _Member(actor, group, [actor.start.remote()])
        self._made += 1

    def _end(self, worker: int) -> None:
        member = self._members.pop(worker, None)
        if member is None:
            return
        with suppress(exceptions.RayError):  # it may be gone already
            ray.kill(member.actor, no_restart=True)
        if member.group is not None:
            remove_placement_group(member.group)

    def _event(self, worker: int, task: Any) -> Event[R]:
        member = self._members[worker]
        try:
            found = ray.get(task, timeout=CONNECT_S)
        except exceptions.RayTaskError as error:
            return self._raised(worker, error)
        except (exceptions.RayError, exceptions.GetTimeoutError) as error:
            return self._lost(worker, error)
        member.tasks.pop(0)
        if not member.ready:
            return self._admit(worker, found)
        results, seconds, lines = found
        for line in lines:
            self.tell(worker, line)
        return Done(worker, results, seconds)

    def _admit(self, worker: int, about: Mapping[str, Any]) -> Event[R]:
        try:
            self.accept(worker, about)
        except HarnessError as error:
            self._end(worker)
            return Refused(worker, str(error))
        self._members[worker].ready, self._died_starting = True, 0
        return WorkerReady(worker)

    def _raised(self, worker: int, error: exceptions.RayTaskError) -> Event[R]:
        """An exception of our code in the actor, which lives on."""
        member, cause = self._members[worker], error.cause
        why = " ".join(str(cause).split())[:300]
        why = why if isinstance(cause, HarnessError) else f"{type(cause).__name__}: {why}"
        self.tell(worker, why)
        if not member.ready:
            self._end(worker)
            return Refused(worker, why)
        member.tasks.pop(0)
        return Raised(worker, why, memory=isinstance(cause, MemoryError))

    def _lost(self, worker: int, error: exceptions.RayError | exceptions.GetTimeoutError) -> Event[R]:
        text = " ".join(str(error).split())
        why = _reason(text, type(error).__name__)
        self.tell(worker, f"lost: {why}")
        if not self._members[worker].ready:
            self._died_starting += 1
            if self._died_starting > DIED_STARTING * self.size:
                self._end(worker)
                return Refused(worker, f"workers die before they are ready ({why}); see the logs of Ray")
        # the last: of a result whose node went
        node = exceptions.NodeDiedError | exceptions.ActorUnavailableError | exceptions.ObjectLostError
        gone = isinstance(error, node) or any(word in text for word in NODE)
        gone = gone or (isinstance(error, exceptions.ActorDiedError) and bool(getattr(error, "preempted", False)))
        memory = isinstance(error, exceptions.OutOfMemoryError) or LOW_MEMORY in text
        return Lost(worker, why, node=gone, memory=memory)


def _reason(text: str, kind: str) -> str:
    """What Ray says of a death without the names of actors, so that equal deaths read alike, in one short line."""
    said = re.search(r"The actor (?:is dead|died) because.*", text)
    return f"{kind}: {(said.group() if said else text)[:200]}".rstrip(": ")
