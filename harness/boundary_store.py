"""The folder of `harness boundary`: `boundary.json` (what was asked, and where) and `boundary.jsonl` (the searches).

The records have a line for each search. The file is replaced in one step after each probe, so a repeated command goes
on where the last one ended; a last line without its newline, as a copy of the file may have, is left out and said.

No torch here: leaderboards import this module.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from harness.errors import HarnessError
from harness.measured import Status
from harness.spec import SCHEMA_VERSION, Frozen, ModelSpec
from harness.store import write_text

MANIFEST_FILE = "boundary.json"
RECORDS_FILE = "boundary.jsonl"
ENVIRONMENT = ("command", "created", "git_commit", "versions", "machine", "model_bytes", "notes")
"""What a repeated command may differ in."""

Kind = Literal["context", "batch"]
AnyFrozen = TypeVar("AnyFrozen", bound=Frozen)
log = logging.getLogger("harness")


class Tried(Frozen):
    """A probe and how it ended. seconds: of the whole probe. peak_bytes, predicted_bytes: above the model's own."""

    tokens: int
    batch: int
    status: Status
    seconds: float
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    error: str | None = None


class Found(Frozen):
    """The largest size that fits, 0 where not even the least does.

    whole: even the most fits, so the answer is at least that. next_size: the least size that did not fit, one step
    above the answer. next_status: how it ended; anything but `oom` is no statement about memory.
    """

    answer: int
    whole: bool = False
    next_size: int | None = None
    next_status: Status | None = None


class BoundaryRecord(Frozen):
    """One search. found: None while it goes on. at_context: tokens of each prompt where the batch is searched."""

    schema_version: int = SCHEMA_VERSION
    method: str
    params: dict[str, Any] = Field(default_factory=dict)
    budget: str
    kind: Kind
    at_context: int | None = None
    limit_bytes: int
    least: int
    most: int
    step: int
    found: Found | None = None
    probes: tuple[Tried, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int]:
        """A file holds one record of each."""
        return (self.method, self.budget, self.kind, self.at_context or 0)

    def probe(self, size: int | None) -> Tried | None:
        """The probe of that size, where there was one."""
        tokens, batch = (size, 1) if self.kind == "context" else (self.at_context, size)
        return next((tried for tried in self.probes if (tried.tokens, tried.batch) == (tokens, batch)), None)


class BoundaryManifest(Frozen):
    """What the searches of a folder have in common.

    limit_kind: what enforces the limit. model_bytes: the model's own, part of the limit. context: the model's.
    timeout_s: of a probe. threads: of the CPU, None for PyTorch's choice.
    """

    schema_version: int = SCHEMA_VERSION
    command: tuple[str, ...]
    created: str
    model: ModelSpec
    context: int
    limit_bytes: int
    limit_kind: str
    model_bytes: int
    threads: int | None
    chunk: int | None
    new_tokens: int
    timeout_s: float
    notes: tuple[str, ...] = ()
    git_commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)


class BoundaryStore:
    """The one writer of a folder of searches. Make one with `open`; close it or use it as a context."""

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.folder, self._lock = folder, lock
        self.records: dict[tuple[str, str, str, int], BoundaryRecord] = {}

    @classmethod
    def open(cls, folder: Path, manifest: BoundaryManifest) -> BoundaryStore:
        """Create or resume. Raises HarnessError for a folder in use, unwritable, damaged or of other settings."""
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise HarnessError(f"{folder} is being written by another process; wait for it or stop it") from None
        except OSError as error:
            raise HarnessError(f"cannot write {folder}: {error.strerror}; choose another --out") from None
        store = cls(folder, lock)
        try:
            store._resume(manifest)
        except BaseException:
            store.close()
            raise
        return store

    def put(self, record: BoundaryRecord) -> None:
        """Store a search as far as it came, in place of what was there of it."""
        self.records[record.key] = record
        lines = [json.dumps(r.model_dump(mode="json"), separators=(",", ":")) + "\n" for r in self.records.values()]
        write_text(self.folder / RECORDS_FILE, "".join(lines))

    def close(self) -> None:
        """Release the folder. Closing twice is fine."""
        self._lock.release()

    def __enter__(self) -> BoundaryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self, manifest: BoundaryManifest) -> None:
        path = self.folder / MANIFEST_FILE
        if path.exists():
            earlier = _manifest(path)
            old, new = (m.model_dump(exclude=set(ENVIRONMENT)) for m in (earlier, manifest))
            other = next((name for name in new if old[name] != new[name]), None)
            if other is not None:
                raise HarnessError(
                    f"{self.folder} was searched with {other} {old[other]}, not {new[other]}; choose another --out"
                )
            if (earlier.git_commit, earlier.versions) != (manifest.git_commit, manifest.versions):
                log.warning("%s: goes on with another commit or other versions; earlier probes are reused", self.folder)
                kept = self.folder / f"boundary.{len(list(self.folder.glob('boundary.*.json'))) + 1}.json"
                write_text(kept, earlier.model_dump_json(indent=2) + "\n")
        self.records = {record.key: record for record in read_records(self.folder)}
        write_text(path, manifest.model_dump_json(indent=2) + "\n")


def load_boundaries(folder: Path) -> tuple[BoundaryManifest, list[BoundaryRecord]]:
    """A folder of searches as stored. Raises HarnessError when a file is missing or damaged."""
    return _manifest(Path(folder) / MANIFEST_FILE), read_records(Path(folder))


def read_records(folder: Path) -> list[BoundaryRecord]:
    """Every search, the last line of each; none without a file. An unfinished last line is ignored with a warning.

    Raises HarnessError for any other damaged line.
    """
    path = folder / RECORDS_FILE
    try:
        *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from None
    if rest:
        log.warning("%s: ignored an unfinished last line (%d bytes)", path, len(rest))
    found = [_validate(BoundaryRecord, line, where=f"{path}:{n}") for n, line in enumerate(lines, start=1)]
    return list({record.key: record for record in found}.values())


def _manifest(path: Path) -> BoundaryManifest:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}; run `harness boundary` first") from None
    return _validate(BoundaryManifest, data, where=str(path))


def _validate(kind: type[AnyFrozen], data: bytes, *, where: str) -> AnyFrozen:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise HarnessError(f"{where} is damaged: {field}: {first['msg']}; remove it or choose another --out") from None
