"""The fan-out's own cost: items that do nothing, records included, and two workers against one on real prompts.

One CPU slot and one thread a worker; the driver shares their cores.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from harness.models.assets import asset_folder
from harness.records.run_folder import RunStore
from harness.records.spec import Sweep
from harness.run.driver import run_fanout, store_all
from harness.run.fan import FanOut
from harness.run.progress import PROGRESS_FILE, Progress, Snapshot
from harness.run.ray_pool import RayPool, WorkerShape, connected
from harness.run.schedule import Schedule
from tests.pretend import manifest, record

pytestmark = pytest.mark.bench
ITEMS = 100_000


def make_nothing() -> tuple[Callable[[Sequence[Any], bool], Sequence[Any]], dict[str, Any]]:
    """A worker that gives its work back: one record an item."""
    return (lambda work, careful: [[item] for item in work]), {}


def test_items_that_do_nothing(note: Callable[..., None], tmp_path: Path) -> None:
    """Scheduling, transport and stored records of 100,000 items on two workers, their start included."""
    made = manifest()
    items = [record("a", "64", f"{i}", 1.0, run_id=made.run_id) for i in range(ITEMS)]
    with connected("local"), RunStore(tmp_path, made) as store:
        pool = RayPool[Any, Any](make_nothing, size=2, shape=WorkerShape())
        schedule = Schedule(items, pool, timeout_s=600)
        progress = Progress(store.folder, samples=ITEMS, total=ITEMS, done=0, workers=lambda: schedule.workers)
        start = time.perf_counter()
        store_all(store, schedule, progress)
        seconds = time.perf_counter() - start
        pool.stop()
        assert len(store.done) == ITEMS
    note(f"{ITEMS} items that do nothing, thousands a second", [ITEMS / seconds / 1000], (">=", 2.0))


def test_two_workers_beside_one(note: Callable[..., None], tmp_path: Path) -> None:
    """The same prompts on one worker and on two; throughput while workers are there, and the share they are busy."""
    if not asset_folder("smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not in the cache; run `harness fetch smollm2-135m`")
    sweep = Sweep(methods=("fullkv", "snapkv", "h2o"), tasks=("niah/passkey", "ruler/vt"), limit=12, device="cpu")
    found = {}
    for workers in (1, 2):
        fan = FanOut(address="local", workers=workers)
        folder = run_fanout(sweep, fan, root=tmp_path / str(workers), command=())
        found[workers] = Snapshot.model_validate_json((folder / PROGRESS_FILE).read_text())
    one, two = found[1], found[2]
    note("throughput of 2 workers over that of 1", [one.worker_s / (two.worker_s / 2)], (">=", 1.8))
    note("seconds of workers over those of items, 1 worker", [one.worker_s / one.busy_s], ("<=", 1.02))
