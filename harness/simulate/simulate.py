"""A fanned-out run on paper: the real schedule, with simulated workers and a simulated clock.

Real: `harness.run.schedule`, so which bundles are made, who gets them and what becomes of those of a lost node. As in
`harness.run.driver`: everything is planned before the first worker starts, the longest items go first, and records are
written every `STORE_S`. Simulated: workers, busy for the seconds of their items, and a driver that is busy for `Costs`
and does one thing at a time. Left out: the network, many nodes reading weights at once, items that fail.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from harness.errors import HarnessError
from harness.run.progress import duration
from harness.run.schedule import STORE_S, GivenUp, Item, Schedule
from harness.simulate.pool import Cluster, Costs, Share, SimulatedClock, SimulatedPool
from harness.simulate.workload import Work

WINDOW_S = 10.0  # of the peak rates
SATURATED = 0.9  # utilisation below which a size is called too large


@dataclass(frozen=True)
class SimulatedRun:
    cluster: Cluster
    makespan_s: float
    plan_s: float  # until the first worker starts
    driver_s: float  # that the driver was busy, planning not included
    longest_s: float  # of the longest item
    items: int
    given_up: int
    nodes_lost: int
    shares: dict[Share, float]  # worker-seconds by what they went into; their sum is workers times makespan
    records: tuple[float, float]  # written per second, as the mean and as the most in `WINDOW_S`
    nbytes: tuple[float, float]  # the same of bytes

    @property
    def worker_s(self) -> float:
        return self.cluster.workers * self.makespan_s

    @property
    def utilisation(self) -> float:
        return self.share("work")

    def share(self, of: Share) -> float:
        return self.shares.get(of, 0.0) / self.worker_s

    @property
    def limit(self) -> Share:
        """What takes most of the time that is not work."""
        return max(("start", "driver", "tail", "lost"), key=self.share)

    @property
    def busy(self) -> float:
        """Share of the time after planning in which the driver does something."""
        return self.driver_s / max(self.makespan_s - self.plan_s, 1e-9)


class _Log:
    """The driver's writing: records are held and appended as in `harness.run.driver`."""

    def __init__(self, costs: Costs, clock: SimulatedClock) -> None:
        self.costs, self.clock = costs, clock
        self.held: list[Work] = []
        self.items = self.given_up = 0
        self.last = clock.now
        self.records, self.nbytes = Counter[int](), Counter[int]()  # by window

    def take(self, ended: Sequence[tuple[Item[Work], GivenUp | None]]) -> None:
        for item, outcome in ended:
            self.clock.spend(self.costs.record_s * item.work.records)
            self.held.append(item.work)
            self.items += 1
            self.given_up += outcome is not None
        if self.held and self.clock.now - self.last >= STORE_S:
            self.append()

    def append(self) -> None:
        nbytes = sum(work.nbytes for work in self.held)
        self.clock.spend(self.costs.append_s + self.costs.byte_s * nbytes)
        window = int(self.clock.now // WINDOW_S)
        self.records[window] += sum(work.records for work in self.held)
        self.nbytes[window] += round(nbytes)
        self.held, self.last = [], self.clock.now

    def rates(self, counted: Counter[int]) -> tuple[float, float]:
        """So many a second: the mean, and the most in a window."""
        mean = counted.total() / self.clock.now
        return mean, max(mean, max(counted.values()) / WINDOW_S)


def simulate(work: Sequence[Work], cluster: Cluster, costs: Costs) -> SimulatedRun:
    """Run `work` on a cluster. Raises HarnessError when it takes no time, or no node lasts until an item is done."""
    if not any(item.seconds > 0 for item in work):
        raise HarnessError("no items with seconds to simulate; give a run with records")
    clock = SimulatedClock()
    clock.spend(costs.plan_token_s * sum(item.tokens for item in work))
    plan_s = clock.now
    pool = SimulatedPool(cluster, costs, clock, size=min(cluster.workers, len(work)))
    order = sorted(work, key=lambda item: item.order, reverse=True)
    log = _Log(costs, clock)
    for ended in Schedule[Work, None](order, pool, timeout_s=math.inf, start_s=math.inf, clock=clock).run():
        log.take(ended)
        pool.doze = not log.held
    log.append()
    pool.stop()
    pool.shares["tail"] += (cluster.workers - min(cluster.workers, len(work))) * clock.now
    return SimulatedRun(
        cluster=cluster,
        makespan_s=clock.now,
        plan_s=plan_s,
        driver_s=clock.busy - plan_s,
        longest_s=max(item.seconds for item in work),
        items=log.items,
        given_up=log.given_up,
        nodes_lost=pool.nodes_lost,
        shares=dict(pool.shares),
        records=log.rates(log.records),
        nbytes=log.rates(log.nbytes),
    )


def sizes(nodes: int, gpus: int) -> list[tuple[int, int]]:
    """List (nodes, GPUs of each): 1 x 1, doubled up to one whole node, then whole nodes, doubled up to all of them."""
    return [*((1, n) for n in _doubled(gpus)), *((n, gpus) for n in _doubled(nodes)[1:])]


def _doubled(most: int) -> list[int]:
    return [*(2**i for i in range((most - 1).bit_length())), most]


def table(outcomes: Sequence[SimulatedRun]) -> str:
    lines = [_line(outcome) for outcome in outcomes]
    if not any(outcome.nodes_lost for outcome in outcomes):
        lines = [{name: text for name, text in line.items() if name not in ("losses", "nodes lost")} for line in lines]
    return tabulate(lines, headers="keys", stralign="right", disable_numparse=True)


def _line(outcome: SimulatedRun) -> dict[str, str]:
    megabytes = [rate / 1e6 for rate in outcome.nbytes]
    return {
        "nodes x GPUs": f"{outcome.cluster.nodes} x {outcome.cluster.gpus}",
        "makespan": duration(outcome.makespan_s),
        "utilised": _percent(outcome.utilisation),
        "start-up": _percent(outcome.share("start")),
        "for driver": _percent(outcome.share("driver")),
        "tail": _percent(outcome.share("tail")),
        "losses": _percent(outcome.share("lost")),
        "nodes lost": str(outcome.nodes_lost),
        "driver busy": _percent(outcome.busy),
        "records/s (peak)": f"{outcome.records[0]:.3g} ({outcome.records[1]:.3g})",
        "MB/s (peak)": f"{megabytes[0]:.2g} ({megabytes[1]:.2g})",
        "longest item": _percent(outcome.longest_s / outcome.makespan_s),
        "GPU-hours": f"{outcome.worker_s / 3600:,.1f}",
    }


def saturation(outcomes: Sequence[SimulatedRun]) -> str:
    """Say in one line where more workers stop to pay, and why. outcomes: by size, the smallest first."""
    last = outcomes[-1]
    over = next((outcome for outcome in outcomes if outcome.utilisation < SATURATED), last)
    size = f"{over.cluster.nodes} x {over.cluster.gpus}"
    if over.utilisation >= SATURATED:
        begin = (
            f"not saturated up to {size}: workers are {_percent(over.utilisation)} utilised; what most is lost to is"
        )
    else:
        begin = f"saturated from {size} on, where workers are {_percent(over.utilisation)} utilised;"
    end = "" if over is last or over.limit == last.limit else f"; at {last.cluster.nodes} x {last.cluster.gpus}, "
    return f"{begin} {_why(over)}{end}{_why(last) if end else ''}"


def _why(outcome: SimulatedRun) -> str:
    share = _percent(outcome.share(outcome.limit))
    match outcome.limit:
        case "start":
            models = f"starting workers {duration(outcome.cluster.start_s)}"
            return f"start-up ({share}): planning takes {duration(outcome.plan_s)} on the driver alone, {models}"
        case "driver":
            return f"the driver ({share}): it is busy {_percent(outcome.busy)} of the time after planning"
        case "lost":
            return f"lost nodes ({share}): {outcome.nodes_lost} of them, with what they did and their workers' starts"
        case _:
            longest = f"the longest item takes {duration(outcome.longest_s)} of {duration(outcome.makespan_s)}"
            return f"the tail ({share}): workers have nothing left to do while others finish; {longest}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
