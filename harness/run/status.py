"""How a run is getting on, read from its folder. It changes nothing there and loads no model."""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from harness.errors import HarnessError, line_of
from harness.records.atomic_files import LOCK_FILE, open_plain
from harness.records.plain_files import of_json, read_plain
from harness.records.record import Record, RunManifest
from harness.records.run_folder import DONE, load_run
from harness.run.progress import PROGRESS_FILE, Snapshot, duration

TAIL_BYTES = 1 << 20  # of a log, in which its last lines are
REASONS = 5  # that are shown


def run_status(folder: Path) -> Iterator[str]:
    """What there is to say of a run. Raises HarnessError when a file of it is missing or damaged."""
    writer = _writer(folder)  # first: a run that ends meanwhile is told with all its records
    manifest, records = load_run(folder)
    yield line_of(f"{folder}: {_state(manifest, writer)}")
    yield _line("model", f"{manifest.spec.model.name}, {manifest.spec.model.dtype} on {manifest.spec.model.device}")
    counts = Counter(record.status for record in records)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    yield _line("cells", f"{len(records)} of {manifest.samples * manifest.cells} ({told or 'none yet'})")
    yield _line("samples", f"{_samples_left(manifest, records)} of {manifest.samples} left")
    if writer is not None:
        yield from _live(folder, manifest)
    if manifest.error:
        yield _line("error", manifest.error)
    yield from _reasons(records)


def _line(name: str, text: str) -> str:
    return line_of(f"  {name:<9} {text}")


def _state(manifest: RunManifest, writer: str | None) -> str:
    if writer is not None:
        return f"running, {writer}, since {manifest.started}"
    if manifest.status == "started":
        return f"stopped without a word, started {manifest.started}; repeat the command to go on"
    again = "" if manifest.status == "finished" else "; repeat the command to go on"
    return f"{manifest.status} {manifest.finished}{again}"


def _writer(folder: Path) -> str | None:
    """Who holds the folder, None for nobody. It is asked for and given back at once, shared, so that readers agree."""
    try:
        descriptor = open_plain(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:  # a copy of a run has none
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        number = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        return f"process {number}" if number.isdecimal() else "another process"
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def _samples_left(manifest: RunManifest, records: Sequence[Record]) -> int:
    """Samples that lack a cell, or have one that is to be tried again."""
    cells = Counter((record.task, record.sample_id) for record in records if record.status in DONE)
    return max(0, manifest.samples - sum(count >= manifest.cells for count in cells.values()))


def _live(folder: Path, manifest: RunManifest) -> Iterator[str]:
    """Pace of a fanned-out run. A snapshot that is older than this session is of an earlier one."""
    path = folder / PROGRESS_FILE
    if not path.exists():
        return
    now = of_json(Snapshot, read_plain(path, remedy="remove it"), where=str(path), remedy="remove it")
    if now.at >= _seconds(manifest.started):
        ago = duration(max(0.0, time.time() - now.at))
        yield _line("workers", f"{now.workers}, {now.pace()} ({ago} ago)")


def _seconds(time: str) -> float:
    """Seconds since the epoch of a time as manifests hold it; 0 where it is none."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def _reasons(records: Sequence[Record]) -> Iterator[str]:
    """The last reasons of lost cells, each with how many it cost and the last of them."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.status in ("failed", "oom"):
            key = record.status, record.error or "no reason stored"
            groups[key] = groups.pop(key, [])  # now the last group
            groups[key].append(record)
    for (status, why), own in list(groups.items())[-REASONS:]:
        yield _line(status, f"{len(own)} x {why} (last: {' '.join(own[-1].key)})")
    if len(groups) > REASONS:
        yield _line("", f"and {len(groups) - REASONS} reasons before these")


def log_tails(folder: Path, count: int) -> Iterator[str]:
    """The last lines of each worker's log, in the order of their numbers."""
    found: dict[int, Path] = {}
    for path in folder.glob("logs/worker-*.log"):
        with suppress(ValueError):  # not one of ours
            found[int(path.stem.removeprefix("worker-"))] = path
    for number, path in sorted(found.items()):
        for line in _tail(path).decode(errors="replace").splitlines()[-count:]:
            yield _line(f"worker-{number}", line)


def _tail(path: Path) -> bytes:
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read()
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}; move it away") from None
