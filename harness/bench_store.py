"""The folder of a bench: `bench.json` (what was asked, and where it ran) and `bench.jsonl`, one line per probe.

A line is one pass over one cell; passes are merged when they are read, so nothing is lost between them. The bench id is
the hash of what decides the numbers and of the machine: a folder never holds two machines. No torch here: leaderboards
import this module.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from harness.errors import HarnessError
from harness.measured import Measured
from harness.spec import Frozen, MethodSpec
from harness.store import write_text

BENCH_SCHEMA = 1
BENCH_FILE, LINES_FILE, LOCK_FILE = "bench.json", "bench.jsonl", ".lock"
IDENTITY = ("processor", "cores", "memory_gib", "accelerators", "system")
ENVIRONMENT = {"git_commit", "versions"}
DONE = frozenset({"ok", "oom", "skipped"})
log = logging.getLogger("harness")

BenchStatus = Literal["ok", "oom", "timeout", "failed", "skipped"]
Kind = Literal["bench", "serve-bench"]


class BenchSpec(Frozen):
    """Everything that decides the numbers of a bench but the machine, resolved. Two equal ones share a folder."""

    schema_version: int = BENCH_SCHEMA
    kind: Kind
    model: str
    dtype: str
    device: str
    kernel: str
    """Of the prefill; decoding always uses sdpa."""
    threads: int
    methods: tuple[MethodSpec, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: int
    new_tokens: int
    chunk: int | None
    rounds: int
    """Passes over all cells."""
    warm_up: bool
    limit_bytes: int | None
    """Memory above which a probe is out of memory, the model's own included."""
    seed: int = 0

    def bench_id(self, machine: Mapping[str, Any]) -> str:
        """First 12 hex digits of the sha256 of this and of the machine's identity. Another length is another bench."""
        return _digest([self.model_dump(mode="json"), machine_id(machine)])[:12]


class BenchRecord(Frozen):
    """One probe: one pass over one method, budget and length, in a process of its own. One JSON line."""

    schema_version: int = BENCH_SCHEMA
    bench_id: str
    kind: Kind
    machine: str
    """`machine_id`: speed is compared only within one."""
    model: str
    dtype: str
    device: str
    kernel: str
    threads: int
    method: str
    """Method label, `name` or `name@preset`, changed parameters spelled out."""
    budget: str
    """As asked: tokens, a kept fraction, or `full` for a method without a budget."""
    budget_tokens: int | None = None
    """Slots per layer and KV head at this length."""
    tokens: int
    """Of each prompt."""
    batch: int
    new_tokens: int
    chunk: int | None
    warm_up: bool
    limit_bytes: int | None
    round: int
    """Which pass, from 0."""
    status: BenchStatus
    error: str | None = None
    """One line on why the status is not ok."""
    measured: Measured | None = None
    clock_mhz: float | None = None
    """Median clock of the processor's cores when the probe began; None where the system does not tell."""
    at: str = ""
    """When the probe began: UTC, ISO 8601."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """(method, budget, length, pass): a bench holds one result of each; of several lines the last wins."""
        return (self.method, self.budget, self.tokens, self.round)


class BenchManifest(Frozen):
    """bench.json, written before the first probe and rewritten when the bench ends."""

    schema_version: int = BENCH_SCHEMA
    bench_id: str
    status: Literal["started", "finished", "interrupted", "failed"]
    command: tuple[str, ...]
    """The command line as typed."""
    spec: BenchSpec
    started: str
    """UTC, ISO 8601."""
    finished: str | None = None
    model_bytes: int
    """What the loaded model holds before the first prompt."""
    git_commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    """Processor, cores, memory, accelerators, threads, and clocks in MHz where the system tells them."""


def machine_id(machine: Mapping[str, Any]) -> str:
    """8 hex digits that are equal for the same processor, cores, memory, accelerators and system."""
    return _digest({name: machine.get(name) for name in IDENTITY})[:8]


def find_benches(root: Path) -> list[Path]:
    """Bench folders below `root` in name order, or `root` itself when it is one. Raises HarnessError when none is."""
    if (root / BENCH_FILE).is_file():
        return [root]
    found = sorted(path.parent for path in root.glob(f"*/{BENCH_FILE}"))
    if not found:
        raise HarnessError(f"no bench in {root}: no folder there holds a {BENCH_FILE}; run `harness bench` first")
    return found


def load_bench(folder: Path) -> tuple[BenchManifest, list[BenchRecord]]:
    """A bench as stored, the last record of each key. Raises HarnessError when a file is missing or damaged."""
    manifest = _manifest(folder / BENCH_FILE)
    lines, _ = _split(folder / LINES_FILE)
    return manifest, list(_records(folder / LINES_FILE, lines, manifest.bench_id).values())


class BenchStore:
    """The one writer of a bench's folder; use it as a context."""

    def __init__(self, root: Path, manifest: BenchManifest) -> None:
        """Create or resume `root/bench_id`.

        Raises HarnessError when it cannot be written, another process writes to it, or it is damaged.
        """
        self.folder, self.manifest = root / manifest.bench_id, manifest
        self._path = self.folder / LINES_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise HarnessError(f"cannot write {self.folder}: {error.strerror}; choose another --out") from None
        try:
            self._claim()
            self.stored = self._resume()
        except BaseException:
            self.close()
            raise

    def done(self, key: tuple[str, str, int, int]) -> bool:
        """Whether a probe's result is stored; what failed or ran out of time is tried again."""
        return key in self.stored and self.stored[key].status in DONE

    def append(self, record: BenchRecord) -> None:
        """Store a record; on return it is on the disk. Raises HarnessError when it cannot be written."""
        line = json.dumps(record.model_dump(mode="json"), separators=(",", ":")) + "\n"  # ASCII: no other line break
        try:
            with self._path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise HarnessError(
                f"cannot write {self._path}: {error.strerror}; fix this and repeat the command"
            ) from None
        self.stored[record.key] = record

    def finish(self, status: str, *, finished: str) -> None:
        """Rewrite bench.json with how the bench ended."""
        self.manifest = BenchManifest.model_validate(
            {**self.manifest.model_dump(), "status": status, "finished": finished}
        )
        self._write()

    def close(self) -> None:
        """Release the folder. Closing twice is fine."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> BenchStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HarnessError(f"{self.folder} is being written by another process; wait for it or stop it") from None

    def _resume(self) -> dict[tuple[str, str, int, int], BenchRecord]:
        lines, rest = _split(self._path)
        if (self.folder / BENCH_FILE).is_file():
            self._keep_earlier(_manifest(self.folder / BENCH_FILE))
        found = _records(self._path, lines, self.manifest.bench_id)
        if rest:  # what a kill left of a line
            os.truncate(self._path, self._path.stat().st_size - rest)
        self._write()
        return found

    def _keep_earlier(self, earlier: BenchManifest) -> None:
        """Where code or versions changed since, the earlier bench.json is kept beside the new one."""
        old, now = (m.model_dump(mode="json", include=ENVIRONMENT) for m in (earlier, self.manifest))
        if old != now:
            kept = self.folder / f"bench.{len(list(self.folder.glob('bench.*.json'))) + 1}.json"
            write_text(kept, earlier.model_dump_json(indent=2) + "\n")
            log.warning("%s: resumed with other code or versions; the earlier ones are in %s", self.folder, kept)

    def _write(self) -> None:
        write_text(self.folder / BENCH_FILE, self.manifest.model_dump_json(indent=2) + "\n")


def _split(path: Path) -> tuple[list[bytes], int]:
    """Whole lines of a file, and the bytes after the last of them. A missing file is empty."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from None
    return lines, len(rest)


def _records(path: Path, lines: list[bytes], bench_id: str) -> dict[tuple[str, str, int, int], BenchRecord]:
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = BenchRecord.model_validate_json(line)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise HarnessError(f"{path}:{number} is damaged: {why}; remove that line to run it again") from None
        if record.bench_id != bench_id or record.schema_version != BENCH_SCHEMA:
            raise HarnessError(f"{path}:{number} belongs to bench {record.bench_id}, not {bench_id}; remove that line")
        found[record.key] = record
    return found


def _manifest(path: Path) -> BenchManifest:
    try:
        manifest = BenchManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}; is this a bench folder?") from None
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise HarnessError(f"{path} is damaged: {why}; restore it or move the folder away") from None
    if manifest.bench_id != manifest.spec.bench_id(manifest.machine):
        raise HarnessError(f"{path} was edited: its spec and machine are not those of bench {manifest.bench_id}")
    return manifest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
