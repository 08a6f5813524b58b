"""The folder of a run: `run.json` (what was asked) and `records.jsonl` (what came out, one line per record).

Resume: the same spec is the same folder. `ok` and `skipped` records are done; `failed` and `oom` ones stay in the file
and are run again. How the files are written and read is `harness.records.log_folder`.
"""

from __future__ import annotations

from pathlib import Path

from harness.records.atomic_files import write_bytes, write_text
from harness.records.board_record import BoardRecord, Shortener
from harness.records.log_folder import LogFolder, LogLayout
from harness.records.record import Key, Record, RunManifest

__all__ = [
    "DONE",
    "RUNS",
    "RunStore",
    "find_runs",
    "load_board_records",
    "load_run",
    "write_bytes",
    "write_text",
]

DONE = frozenset({"ok", "skipped"})
RUNS = LogLayout(
    kind="run",
    manifest_file="run.json",
    records_file="records.jsonl",
    manifest=RunManifest,
    record=Record,
    ids=lambda manifest: (manifest.run_id, manifest.spec.run_id),
    owner=lambda record: record.run_id,
    environment=("git_commit", "versions", "machine"),
)


class RunStore(LogFolder[RunManifest, Record]):
    """The one writer of `results/<run_id>/`. Make one with `RunStore.open`; close it or use it as a context."""

    def __init__(self, root: Path, manifest: RunManifest) -> None:
        self._status: dict[Key, str] = {}
        super().__init__(RUNS, Path(root) / manifest.run_id, manifest)

    @classmethod
    def open(cls, root: Path, manifest: RunManifest) -> RunStore:
        """Create or resume the folder of `manifest` below `root`. Raises HarnessError as `LogFolder` does."""
        return cls(root, manifest)

    @property
    def done(self) -> frozenset[Key]:
        """Keys that need no run: their last stored record is `ok` or `skipped`."""
        return frozenset(key for key, status in self._status.items() if status in DONE)

    def _note(self, record: Record) -> None:
        self._status[record.key] = record.status  # not the record: a run may hold more than fits into memory


def find_runs(root: Path) -> list[Path]:
    """Find the run folders below `root` in name order, or `root` itself when it is one.

    Raises HarnessError when none is.
    """
    return RUNS.find(Path(root))


def load_run(folder: Path) -> tuple[RunManifest, list[Record]]:
    """Read a run as stored, one record per key. Raises HarnessError when a file is missing or damaged."""
    return RUNS.load(Path(folder))


def load_board_records(folder: Path) -> tuple[RunManifest, list[BoardRecord]]:
    """Read of a run what boards need, in a tenth of the memory that `load_run` takes.

    The checks, warnings and errors are those of `load_run`.
    """
    manifest, shorten = RUNS.read_manifest(Path(folder)), Shortener()
    found = {record.key: shorten(record) for record in RUNS.records(Path(folder), manifest)}
    return manifest, list(found.values())
