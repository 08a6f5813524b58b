"""How a fanned-out run is getting on: counts, the line that is said, and the seconds of workers."""

from pathlib import Path

import pytest

from harness.run.progress import PROGRESS_FILE, Progress, Snapshot, duration
from harness.run.schedule import Event, Schedule
from tests.pretend import record
from tests.pretend_pool import Workers, done


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3720, "1 h 02 min"), (90_000, "25 h 00 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_samples_and_cells_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(tmp_path, samples=3, total=8, done=2, workers=lambda: 2, spent=lambda: (10.0, 9.0))
    with progress:
        progress.add([record("a", "64", "s1", 1.0), record("b", "64", "s1", None)])
        progress.add([record("a", "64", "s2", 0.5)])
    found = Snapshot.model_validate_json((tmp_path / PROGRESS_FILE).read_text())
    assert found.cells == {"done before": 2, "ok": 2, "failed": 1}
    assert (found.samples, found.samples_left, found.workers, found.total) == (3, 1, 2, 8)
    assert found.left_s is not None and found.left_s == pytest.approx(found.seconds / 2, rel=0.5)
    said = capsys.readouterr().err
    assert "5 of 8 cells (2 done before, 1 failed, 2 ok), 1 samples to do, 2 workers" in said
    assert "busy 90%" in said


def test_workers_are_paid_from_ready_to_the_end() -> None:
    """Two workers of 3 s each, one of them idle for half of it."""

    def fate(worker: int, bundle: list[int], careful: bool) -> Event[str] | None:
        busy = 3.0 if bundle == [0] else 1.5
        return done(worker, bundle, each_s=busy) if pool.now >= busy else None

    pool = Workers(fate, size=2)
    schedule = Schedule(range(2), pool, timeout_s=60.0, clock=lambda: pool.now)
    assert sum(len(found) for found in schedule.run()) == 2
    assert (schedule.busy_s, schedule.worker_s) == (pytest.approx(4.5), pytest.approx(6.0))
