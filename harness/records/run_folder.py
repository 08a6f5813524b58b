"""The folder of a run: `run.json` (what was asked) and `records.jsonl` (what came out, one line per record).

Resume: the same spec is the same folder. `ok` and `skipped` records are done; `failed` and `oom` ones stay in the file
and are run again. How the files are written and read is `harness.records.log_folder`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from harness.errors import HarnessError
from harness.records.atomic_files import write_bytes, write_text
from harness.records.board_record import Brief, Briefs
from harness.records.log_folder import Journal, Layout
from harness.records.record import Record, RunManifest
from harness.records.spec import SCHEMA_VERSION

__all__ = [
    "DONE",
    "RUNS",
    "RunStore",
    "find_runs",
    "load_brief",
    "load_run",
    "write_bytes",
    "write_text",
]

DONE = frozenset({"ok", "skipped"})
RUNS = Layout(
    kind="run",
    manifest_file="run.json",
    records_file="records.jsonl",
    manifest=RunManifest,
    record=Record,
    ids=lambda manifest: (manifest.run_id, manifest.spec.run_id),
    owner=lambda record: record.run_id,
    environment=("git_commit", "versions", "machine"),
)

AS_WRITTEN = b'{"schema_version":%d,' % SCHEMA_VERSION
"""What every line that this version wrote begins with."""
log = logging.getLogger("harness")

Key = tuple[str, str, str, str]


class RunStore(Journal[RunManifest, Record]):
    """The one writer of `results/<run_id>/`. Make one with `RunStore.open`; close it or use it as a context."""

    def __init__(self, root: Path, manifest: RunManifest) -> None:
        self._status: dict[Key, str] = {}
        super().__init__(RUNS, Path(root) / manifest.run_id, manifest)

    @classmethod
    def open(cls, root: Path, manifest: RunManifest) -> RunStore:
        """Create or resume the folder of `manifest` below `root`; raises HarnessError as `Journal` does."""
        return cls(root, manifest)

    @property
    def done(self) -> frozenset[Key]:
        """Keys that need no run: their last stored record is `ok` or `skipped`."""
        return frozenset(key for key, status in self._status.items() if status in DONE)

    def append(self, records: Sequence[Record]) -> None:
        """Store the records of one or more samples in one write; on return they are on the disk.

        Raises HarnessError when a record belongs to another run, and when the disk is full or fails: the file is then
        cut back to what it was before this call.
        """
        self._append(records)

    def finish(self, status: str, *, finished: str, error: str | None = None) -> None:
        """Rewrite run.json with how the run ended. finished: UTC, ISO 8601."""
        self._amend(status=status, finished=finished, error=error)

    def _note(self, record: Record) -> None:
        self._status[record.key] = record.status  # not the record: a run may hold more than fits into memory


def find_runs(root: Path) -> list[Path]:
    """Run folders below `root` in name order, or `root` itself when it is one. Raises HarnessError when none is."""
    return RUNS.find(Path(root))


def load_run(folder: Path) -> tuple[RunManifest, list[Record]]:
    """A run as stored, one record per key. Raises HarnessError when a file is missing or damaged."""
    return RUNS.load(Path(folder))


def load_brief(folder: Path) -> tuple[RunManifest, list[Brief]]:
    """`load_run` of what boards need: the same checks, warnings and errors, line by line and in a tenth of the memory.

    Raises HarnessError as `load_run` does.
    """
    manifest, brief = RUNS.read_manifest(Path(folder)), Briefs()
    found: dict[Key, Brief] = {}
    for record in _records(Path(folder) / RUNS.records_file, owner=manifest.run_id):
        found[record.key] = brief(record)
    return manifest, list(found.values())


def _records(path: Path, *, owner: str) -> Iterator[Record]:
    """Every stored record. A line that is not as this version writes it is left to the journal, which says why."""
    for read, line in enumerate(_lines(path)):
        record = _quick(line)
        if record is None or record.run_id != owner:
            yield from islice(RUNS.parse(path, _lines(path, quiet=True), owner=owner), read, None)
            return
        yield record


def _quick(line: bytes) -> Record | None:
    if not line.startswith(AS_WRITTEN):
        return None
    try:
        record = Record.model_validate_json(line)
    except ValidationError:
        return None
    return record if record.schema_version == SCHEMA_VERSION else None


def _lines(path: Path, *, quiet: bool = False) -> Iterator[bytes]:
    """Whole lines of a log, without their ends, as `atomic_files.whole_lines`; a missing file is empty."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif not quiet:
                    log.warning("%s: ignored an unfinished last line (%d bytes)", path, len(line))
    except FileNotFoundError:
        return
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from None
