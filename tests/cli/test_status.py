"""`harness status`: what is told of finished, running, broken off and fanned-out runs, and that nothing is touched."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from harness.cli.status import status_parser
from harness.errors import HarnessError
from harness.records.log_folder import now
from harness.records.run_folder import RunStore
from harness.run.progress import PROGRESS_FILE, Snapshot
from tests.records.test_run_folder import held_by_another, manifest, record
from tests.tiny_run import verb

ROOT = Path(__file__).parents[2]
Captured = pytest.CaptureFixture[str]
SNAPSHOT = Snapshot(
    **{"cells": {"ok": 4}, "total": 6, "samples": 3, "samples_left": 1, "tokens": 90_000, "seconds": 60.0},
    **{"workers": 2, "left_s": 200.0, "at": 0.0, "worker_s": 100.0, "busy_s": 95.0},
)


def status(capsys: Captured, *arguments: str | Path) -> list[str]:
    capsys.readouterr()
    assert verb(status_parser, *arguments) == 0
    return capsys.readouterr().out.splitlines()


def start(root: Path, **changes: Any) -> RunStore:
    """A run of 3 samples under 2 cells: b of the methods, at budget 128."""
    return RunStore(root, manifest(samples=3, cells=2, **changes))


def both(sample: str, **changes: Any) -> list[Any]:
    return [record(sample, method=method, **changes) for method in ("snapkv", "h2o")]


def test_a_finished_run(tmp_path: Path, capsys: Captured) -> None:
    with start(tmp_path) as store:
        store.append([record for sample in "abc" for record in both(sample)])
        store.finish("finished", finished="2025-01-01T01:00:00+00:00")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told = [
        f"{store.folder}: finished 2025-01-01T01:00:00+00:00",
        "  model     tiny, float32 on cpu",
        "  cells     6 of 6 (6 ok)",
        "  samples   0 of 3 left",
    ]
    assert status(capsys, tmp_path) == status(capsys, store.folder) == told
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (store.folder / ".lock").unlink()  # as in a copy
    assert status(capsys, tmp_path) == told


def test_the_state_follows_the_writer(tmp_path: Path, capsys: Captured) -> None:
    with start(tmp_path) as store:
        (first, *_, cells, left) = status(capsys, tmp_path)
        assert first == f"{store.folder}: running, process {os.getpid()}, since 2025-01-01T00:00:00Z"
        assert cells == "  cells     0 of 6 (none yet)" and left == "  samples   3 of 3 left"
    assert "stopped without a word, started 2025-01-01" in status(capsys, tmp_path)[0]
    with FileLock(store.folder / ".lock"):  # which tells no number
        assert "running, another process" in status(capsys, tmp_path)[0]
    with start(tmp_path) as store:
        store.finish("interrupted", finished="later")
    assert status(capsys, tmp_path)[0].endswith(": interrupted later; repeat the command to go on")
    with start(tmp_path) as store:
        store.finish("failed", finished="later", error="disk full")
    assert ": failed later" in status(capsys, tmp_path)[0] and "  error     disk full" in status(capsys, tmp_path)


def test_a_killed_writer_is_no_writer(tmp_path: Path, capsys: Captured) -> None:
    with start(tmp_path) as store:
        folder = store.folder
    with held_by_another(folder) as other:
        assert f"running, process {other.pid}," in status(capsys, tmp_path)[0]
        other.kill()
    assert (folder / ".lock").read_text() == str(other.pid)
    assert "stopped without a word" in status(capsys, tmp_path)[0]
    start(tmp_path).close()  # asking has left no lock


def test_the_last_line_of_a_cell_counts(tmp_path: Path, capsys: Captured) -> None:
    with start(tmp_path) as store:
        store.append([*both("a"), *both("b", status="failed", error="no")])
        store.append([record("c", status="skipped", error="short"), record("b")])
        assert status(capsys, tmp_path)[2:] == [
            "  cells     5 of 6 (1 failed, 3 ok, 1 skipped)",
            "  samples   2 of 3 left",
            "  failed    1 x no (last: niah b h2o 128)",
        ]


def test_reasons_are_grouped_and_the_last_ones_shown(tmp_path: Path, capsys: Captured) -> None:
    with start(tmp_path) as store:
        for number in range(7):
            store.append(both(str(number), status="failed", error=f"why {number}"))
        store.append(both("8", status="oom", error="why 0"))
        store.append(both("9", status="failed", error="why 2"))
        told = status(capsys, tmp_path)
    assert told[4:] == [
        "  failed    2 x why 4 (last: niah 4 h2o 128)",
        "  failed    2 x why 5 (last: niah 5 h2o 128)",
        "  failed    2 x why 6 (last: niah 6 h2o 128)",
        "  oom       2 x why 0 (last: niah 8 h2o 128)",
        "  failed    4 x why 2 (last: niah 9 h2o 128)",
        "            and 3 reasons before these",
    ]


def test_the_pace_of_a_running_fan_out(tmp_path: Path, capsys: Captured) -> None:
    with start(tmp_path, started=now()) as store:
        path = store.folder / PROGRESS_FILE
        assert len(status(capsys, tmp_path)) == 4
        path.write_text(SNAPSHOT.model_copy(update={"at": time.time()}).model_dump_json())
        *_, line = status(capsys, tmp_path)
        assert line.startswith("  workers   2, 1,500 tokens/s, busy 95%, 3 min 20 s left (") and " s ago)" in line
        path.write_text(SNAPSHOT.model_copy(update={"at": time.time() - 3600}).model_dump_json())
        assert len(status(capsys, tmp_path)) == 4  # of an earlier session
        path.write_text('{"cells": 1')
        with pytest.raises(HarnessError, match=f"^{path} is damaged: .*; remove it$"):
            status(capsys, tmp_path)
    assert len(status(capsys, tmp_path)) == 4  # nobody is at work


def test_the_last_lines_of_every_worker(tmp_path: Path, capsys: Captured) -> None:
    with start(tmp_path) as store:
        logs = store.folder / "logs"
        logs.mkdir()
        for worker in (0, 2, 10):
            (logs / f"worker-{worker}.log").write_text("".join(f"line {n} of {worker}\n" for n in range(5)))
        (logs / "worker-x.log").write_text("not ours\n")
    assert status(capsys, tmp_path, "--logs", "2")[4:] == [
        *("  worker-0  line 3 of 0", "  worker-0  line 4 of 0", "  worker-2  line 3 of 2", "  worker-2  line 4 of 2"),
        *("  worker-10 line 3 of 10", "  worker-10 line 4 of 10"),
    ]
    assert len(status(capsys, tmp_path, "--logs")) == 4 + 3 * 3
    assert len(status(capsys, tmp_path)) == 4
    with pytest.raises(HarnessError, match="--logs 0 shows nothing"):
        status(capsys, tmp_path, "--logs", "0")


def test_several_runs_and_none(tmp_path: Path, capsys: Captured) -> None:
    with pytest.raises(HarnessError, match="no run in"):
        status(capsys, tmp_path)
    start(tmp_path).close()
    other = RunStore(tmp_path, manifest(seed=7))
    other.close()
    told = status(capsys, tmp_path)
    assert told.count("") == 1 and len([line for line in told if line.startswith(str(tmp_path))]) == 2
    assert status(capsys, other.folder, other.folder).count(f"{other.folder}: {told[0].partition(': ')[2]}") == 2


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    start(tmp_path).close()
    code = (
        "import sys; from harness.cli import main; main(['status', *sys.argv[1:]])\n"
        "print({'torch', 'pandas', 'numpy', 'transformers', 'ray'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code, tmp_path, "--logs"], cwd=ROOT).endswith(b"set()\n")
