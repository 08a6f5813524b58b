"""The scheduler without Ray: pretend workers on a pretend clock, which die, hang, refuse and run out of memory."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.run.schedule import (
    BUNDLE_ITEMS,
    DEPTH,
    NODES_LOST,
    Event,
    GivenUp,
    Item,
    Lost,
    Raised,
    Refused,
    Schedule,
    WorkerReady,
)
from tests.pretend_pool import Fate, Workers, done

Ended = dict[int, tuple[Item[int], str | GivenUp]]
Bad = type[Lost] | type[Raised]


def finish(pool: Workers, count: int, **options: Any) -> Ended:
    """What became of items 0 to count - 1, each of which must end once, in order of ending."""
    ended: Ended = {}
    schedule = Schedule(range(count), pool, **{"timeout_s": 5.0, **options}, clock=lambda: pool.now)
    for item, outcome in chain.from_iterable(schedule.run()):
        assert item.work not in ended
        ended[item.work] = item, outcome
    assert set(ended) == set(range(count))
    return ended


def given_up(ended: Ended) -> dict[int, GivenUp]:
    """Those without a result; the results of the others must be their own."""
    assert all(outcome == str(index) for index, (_, outcome) in ended.items() if isinstance(outcome, str))
    return {index: outcome for index, (_, outcome) in ended.items() if isinstance(outcome, GivenUp)}


def ending(when: Callable[[list[int]], bool], end: Callable[[int], Event[str]], each_s: float = 1.0) -> Fate:
    """Bundles end so `when` they are such; with all others all is well."""
    return lambda worker, bundle, careful: end(worker) if when(bundle) else done(worker, bundle, each_s=each_s)


class Chaos:
    """Fates by dice, as long as there is trouble left; then all goes well. It never refuses the last worker."""

    def __init__(self, dice: random.Random, *, trouble: int, size: int) -> None:
        self.dice, self.trouble, self.refusals, self.hung = dice, trouble, size - 1, set[int]()
        self.each_s = dice.choice([0.001, 0.1, 1.0, 5.0])

    def strikes(self) -> bool:
        self.trouble = max(0, self.trouble - 1)
        return self.trouble > 0 and self.dice.random() < 0.5

    def start(self, worker: int) -> Event[str] | None:
        if not self.strikes():
            return WorkerReady(worker)
        kind = self.dice.randrange(3)
        if kind == 0 and self.refusals:
            self.refusals -= 1
            return Refused(worker, "refused")
        return Lost(worker, "died young", node=self.dice.random() < 0.5) if kind == 1 else None

    def fate(self, worker: int, bundle: list[int], careful: bool) -> Event[str] | None:
        if worker in self.hung:
            return None
        if not self.strikes():
            return done(worker, bundle, each_s=self.each_s)
        memory = self.dice.random() < 0.3
        kind = self.dice.randrange(5)
        if kind == 0:
            self.hung.add(worker)
        lost = Lost(worker, "died", node=kind == 2, memory=memory)
        return {1: lost, 2: lost, 3: Raised(worker, "raised", memory)}.get(kind)


@settings(deadline=None)
@given(
    dice=st.randoms(use_true_random=False),
    count=st.integers(0, 40),
    size=st.integers(1, 4),
    trouble=st.integers(0, 80),
    tries=st.integers(1, 4),
)
def test_every_item_ends_once_and_only_the_guilty_are_given_up(
    dice: random.Random, count: int, size: int, trouble: int, tries: int
) -> None:
    chaos = Chaos(dice, trouble=trouble, size=size)
    pool = Workers(chaos.fate, size=size, start=chaos.start)
    pool.full = [False, *(dice.random() < 0.1 for _ in range(trouble))]
    try:
        ended = finish(pool, count, tries=tries)
    except HarnessError as error:
        if "no room" in str(error) and not any(pool.held.values()):
            return
        raise
    charged, uprooted = Counter[int](), Counter[int]()
    for event, bundle, _ in pool.bad:
        node = isinstance(event, Lost) and event.node
        (uprooted if node else charged).update(bundle if node or len(bundle) == 1 else ())
    assert all(item.tries == charged[index] for index, (item, _) in ended.items())
    lost = given_up(ended)
    assert all(charged[index] < tries for index in ended if index not in lost)
    for index, outcome in lost.items():
        starved = any(careful and bundle == [index] for _, bundle, careful in pool.bad)
        assert charged[index] == tries or uprooted[index] > NODES_LOST or (outcome.status == "oom" and starved)


@pytest.mark.parametrize("kind", [Lost, Raised])
@pytest.mark.parametrize("each_s", [0.001, 1.0])
def test_a_poison_item_is_given_up_and_all_others_end_well(kind: Bad, each_s: float) -> None:
    pool = Workers(ending(lambda bundle: 17 in bundle, lambda worker: kind(worker, "died"), each_s), size=2)
    ended = finish(pool, 60, tries=3)
    assert given_up(ended) == {17: GivenUp("failed", "given up after 3 tries: died")}
    assert all(item.tries == 0 for index, (item, _) in ended.items() if index != 17)
    assert sum(bundle == [17] for _, bundle, _ in pool.bad) == 3
    assert pool.made == 2 + (len(pool.bad) if kind is Lost else 0)  # every lost worker has been replaced, no other


def test_a_lost_bundle_is_taken_apart_and_goes_first() -> None:
    deaths = list[list[int]]()

    def fate(worker: int, bundle: list[int], careful: bool) -> Event[str]:
        if len(bundle) >= 4 and not deaths:
            deaths.append(bundle)
            return Lost(worker, "died")
        return done(worker, bundle, each_s=0.01)

    pool = Workers(fate)
    ended = finish(pool, 100, tries=1)
    assert not given_up(ended) and all(item.tries == 0 for item, _ in ended.values())
    (lost,) = deaths
    behind, *later = pool.bundles[pool.bundles.index(lost) + 1 :]
    assert later[: len(lost)] == [[index] for index in lost]
    assert later[len(lost)][0] == behind[0] == lost[-1] + 1


@pytest.mark.parametrize(("losses", "lives"), [(NODES_LOST, True), (NODES_LOST + 1, False)])
def test_lost_nodes_are_not_charged_but_not_for_ever(losses: int, lives: bool) -> None:
    left = [losses]

    def fate(worker: int, bundle: list[int], careful: bool) -> Event[str]:
        left[0] -= 0 in bundle
        return Lost(worker, "its node died", node=True) if 0 in bundle and left[0] >= 0 else done(worker, bundle)

    ended = finish(Workers(fate), 3, tries=1)
    assert not any(item.tries for item, _ in ended.values())
    told = GivenUp("failed", f"its node was lost {NODES_LOST + 1} times, last: its node died")
    assert given_up(ended) == ({} if lives else {0: told})


@pytest.mark.parametrize("kind", [Lost, Raised])
@pytest.mark.parametrize("cured", [True, False])
def test_out_of_memory_is_tried_once_more_with_care(kind: Bad, cured: bool) -> None:
    def fate(worker: int, bundle: list[int], careful: bool) -> Event[str]:
        starved = bundle == [1] and not (careful and cured)
        return kind(worker, "no memory", memory=True) if starved else done(worker, bundle)

    pool = Workers(fate)
    ended = finish(pool, 4)
    assert [careful for _, bundle, careful in pool.sent if bundle == [1]] == [False, True]
    assert not any(careful for _, bundle, careful in pool.sent if bundle != [1])
    assert given_up(ended) == ({} if cured else {1: GivenUp("oom", "no memory (also in the smallest steps)")})


def test_a_bundle_that_runs_out_of_memory_is_taken_apart_before_any_care() -> None:
    pool = Workers(ending(lambda bundle: len(bundle) > 2, lambda worker: Lost(worker, "no memory", memory=True), 0.01))
    assert not given_up(finish(pool, 100, tries=1)) and pool.bad
    assert not any(careful for _, _, careful in pool.sent)


def test_a_worker_that_hangs_is_replaced_and_its_item_charged() -> None:
    hung = set[int]()

    def fate(worker: int, bundle: list[int], careful: bool) -> Event[str] | None:
        hung.update({worker} if bundle == [1] else ())
        return None if bundle == [1] else done(worker, bundle)

    pool = Workers(fate, size=2)
    ended = finish(pool, 6, timeout_s=30.0, tries=2)
    assert given_up(ended) == {1: GivenUp("failed", "given up after 2 tries: no answer in 30 s")}
    assert len(hung) == 2 and not hung & set(pool.held) and pool.made == 4
    assert 60 <= pool.now < 62  # each was let until its time was up


def test_time_behind_another_bundle_is_no_hanging() -> None:
    asked = Counter[int]()

    def fate(worker: int, bundle: list[int], careful: bool) -> Event[str] | None:
        asked.update(bundle)
        return done(worker, bundle) if asked[bundle[0]] > 4 else None  # 4 s each where 5 are let

    pool = Workers(fate)
    assert not given_up(finish(pool, 6, tries=1)) and not pool.bad and pool.now == 24


@pytest.mark.parametrize("young", [True, False])
def test_without_workers_a_run_ends_after_a_while(young: bool) -> None:
    asked = Counter[int]()

    def start(worker: int) -> Event[str] | None:
        asked[worker] += 1  # those that die before they are ready are no workers
        return Lost(worker, "died young", node=True) if young and asked[worker] > 10 else None

    pool = Workers(done, start=start)
    with pytest.raises(HarnessError, match="^no worker in 60 s; ask for fewer"):
        finish(pool, 3, start_s=60.0)
    assert 60 < pool.now < 62


def test_refusals_end_a_run_when_no_worker_is_left() -> None:
    def start(worker: int) -> Event[str]:
        return WorkerReady(worker) if worker == 0 else Refused(worker, "model m is not here")

    pool = Workers(ending(lambda bundle: bundle != [0], lambda worker: Lost(worker, "died")), start=start)
    ended = list[Any]()
    with pytest.raises(HarnessError, match="^model m is not here$"):
        ended.extend(chain.from_iterable(Schedule(range(3), pool, timeout_s=5.0, clock=lambda: pool.now).run()))
    assert [item.work for item, _ in ended] == [0]
    with pytest.raises(HarnessError, match="^of no use$"):
        finish(Workers(done, size=3, start=lambda worker: Refused(worker, "of no use")), 2)


def test_work_that_finds_no_room_waits_for_what_is_out() -> None:
    pool = Workers(done)
    pool.full = [False, True, False, True]
    assert not given_up(finish(pool, 5)) and not pool.full and pool.bundles == [[0], [1], [2], [3], [4]]
    pool = Workers(done)
    pool.full = [True]
    with pytest.raises(HarnessError, match="raise the object store"):
        finish(pool, 2)


@pytest.mark.parametrize(("each_s", "largest"), [(0.0001, BUNDLE_ITEMS), (0.09, 11), (3.0, 1)])
def test_bundles_grow_with_short_items_and_shrink_to_the_end(each_s: float, largest: int) -> None:
    pool = Workers(lambda worker, bundle, careful: done(worker, bundle, each_s=each_s), size=3)
    assert not given_up(finish(pool, 5000))
    sizes = list(map(len, pool.bundles))
    assert max(sizes) == largest and sizes[0] == 1 == sizes[-1]
    assert list(chain.from_iterable(pool.bundles)) == list(range(5000))
    left = 5000
    for size in sizes:  # a worker's share of half of what is left
        assert size == 1 or size <= left / (2 * DEPTH * 3)
        left -= size


def test_a_worker_that_comes_late_joins_in_beside_a_refused_one() -> None:
    asked = Counter[int]()

    def start(worker: int) -> Event[str] | None:
        asked[worker] += 1
        if worker == 2:
            return Refused(worker, "other versions")
        return WorkerReady(worker) if worker == 0 or asked[worker] > 8 else None

    pool = Workers(done, size=3, start=start)
    assert not given_up(finish(pool, 40)) and {worker for worker, _, _ in pool.sent} == {0, 1}
    assert finish(Workers(done, start=lambda worker: None), 0) == {}  # nothing to do needs no worker
