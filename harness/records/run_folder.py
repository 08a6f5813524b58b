"""The folder of a run: `run.json` (what was asked) and `records.jsonl` (what came out, one line per record).

Resume: the same spec is the same folder. `ok` and `skipped` records are done; `failed` and `oom` ones stay in the file
and are run again. How the files are written and read is `harness.records.log_folder`.
"""

from pathlib import Path

from harness.records.atomic_files import write_bytes as write_bytes
from harness.records.atomic_files import write_text as write_text
from harness.records.board_record import BoardRecord, Shortener
from harness.records.log_folder import LogFolder, Resume
from harness.records.log_layout import LogLayout
from harness.records.record import Key, Record, RunManifest

DONE = frozenset({"ok", "skipped"})
RUNS = LogLayout(
    kind="run",
    manifest_file="run.json",
    records_file="records.jsonl",
    manifest=RunManifest,
    record=Record,
    ids=lambda manifest: (manifest.run_id, manifest.spec.run_id),
    owner=lambda record: record.run_id,
    environment=("git_commit", "versions", "machine", "sources"),
    device=lambda manifest: manifest.spec.model.device,
)


class RunStore(LogFolder[RunManifest, Record]):
    """The one writer of `root/<run_id>/`, made or resumed as `LogFolder` says; close it or use it as a context."""

    def __init__(self, root: Path, manifest: RunManifest, resume: "Resume[RunStore] | None" = None) -> None:
        self._status: dict[Key, str] = {}
        super().__init__(RUNS, root / manifest.run_id, manifest, resume)

    @property
    def done(self) -> frozenset[Key]:
        """Keys that need no run: their last stored record is `ok` or `skipped`."""
        return frozenset(key for key, status in self._status.items() if status in DONE)

    def _note(self, record: Record) -> None:
        self._status[record.key] = record.status  # not the record: a run may hold more than fits into memory


find_runs = RUNS.find
load_run = RUNS.load


def load_board_records(folder: Path) -> tuple[RunManifest, list[BoardRecord]]:
    """Read of a run what boards need, checked as `load_run` does, in a tenth of the memory that it takes."""
    manifest, shorten = RUNS.read_manifest(folder), Shortener()
    found = {record.key: shorten(record) for record in RUNS.records(folder, manifest)}
    return manifest, list(found.values())
