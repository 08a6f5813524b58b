"""The folder of a bench: `bench.json` (what was asked, and where it ran) and `bench.jsonl`, one line per probe.

A line is one pass over one cell; passes are merged when they are read, so nothing is lost between them. The bench id is
the hash of what decides the numbers and of the machine: a folder never holds two machines. No torch here: leaderboards
import this module.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from harness.records.log_folder import LogFolder, Resume
from harness.records.log_layout import LogLayout
from harness.records.measured import Measured
from harness.records.spec import Frozen, MethodSpec

BENCH_SCHEMA = 1
BENCH_FILE, LINES_FILE = "bench.json", "bench.jsonl"
IDENTITY = ("processor", "cores", "memory_gib", "accelerators", "system")
DONE = frozenset({"ok", "oom", "skipped"})

BenchStatus = Literal["ok", "oom", "timeout", "failed", "skipped"]
BenchKind = Literal["bench", "serve-bench"]


class BenchSpec(Frozen):
    """Everything that decides the numbers of a bench but the machine, resolved. Two equal ones share a folder."""

    schema_version: int = BENCH_SCHEMA
    kind: BenchKind
    model: str
    model_revision: str  # content hash or commit, as in runs
    dtype: str
    device: str
    kernel: str  # of the prefill; decoding always uses sdpa
    threads: int
    methods: tuple[MethodSpec, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: int
    distinct: int | None = None  # prompts of the batch that are prefilled, the others being copies; None for all
    new_tokens: int
    chunk: int | None
    rounds: int  # passes over all cells
    warm_up: bool
    limit_bytes: int | None  # memory above which a probe is out of memory, the model's own included
    seed: int = 0

    def bench_id(self, machine: Mapping[str, Any]) -> str:
        """First 12 hex digits of the sha256 of this and of the machine's identity. Another length is another bench."""
        unsaid = {"distinct"} if self.distinct is None else set[str]()  # earlier versions did not know it
        return _digest([self.model_dump(mode="json", exclude=unsaid), machine_id(machine)])[:12]


class BenchRecord(Frozen):
    """One probe: one pass over one method, budget and length, by itself. One JSON line."""

    schema_version: int = BENCH_SCHEMA
    bench_id: str
    kind: BenchKind
    machine: str  # `machine_id`: speed is compared only within one
    model: str
    model_revision: str = ""  # content hash or commit, as in runs
    dtype: str
    device: str
    kernel: str
    threads: int
    method: str  # method label, `name` or `name@preset`, changed parameters spelled out
    budget: str  # as asked: tokens, a kept fraction, or `full` for a method without a budget
    budget_tokens: int | None = None  # slots per layer and KV head at this length
    tokens: int  # of each prompt
    batch: int
    distinct: int | None = None  # as in the spec
    new_tokens: int
    chunk: int | None
    warm_up: bool
    limit_bytes: int | None
    round: int  # which pass, from 0
    status: BenchStatus
    error: str | None = None  # one line on why the status is not ok
    measured: Measured | None = None
    clock_mhz: float | None = None  # median of the processor's cores when the probe began, None where it is not told
    at: str = ""  # when the probe began: UTC, ISO 8601
    environment_changes: tuple[str, ...] = ()  # since the bench's first session, where it was resumed all the same

    @property
    def key(self) -> tuple[str, str, int, int]:
        """(method, budget, length, pass): a bench holds one result of each; of several lines the last wins."""
        return (self.method, self.budget, self.tokens, self.round)


class BenchManifest(Frozen):
    """bench.json, written before the first probe and rewritten when the bench ends."""

    schema_version: int = BENCH_SCHEMA
    bench_id: str
    status: Literal["started", "finished", "interrupted", "failed"]
    command: tuple[str, ...]  # the command line as typed
    spec: BenchSpec
    started: str  # UTC, ISO 8601
    finished: str | None = None
    model_bytes: int  # what the loaded model holds before the first prompt
    git_commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)  # as `harness.machine.machine` gives it, and clocks in MHz
    sources: dict[str, str] = Field(default_factory=dict)  # of code, as `harness.plan.sources` gives it


def machine_id(machine: Mapping[str, Any]) -> str:
    """8 hex digits that are equal for the same processor, cores, memory, accelerators and system."""
    return _digest({name: machine.get(name) for name in IDENTITY})[:8]


BENCHES = LogLayout(
    kind="bench",
    manifest_file=BENCH_FILE,
    records_file=LINES_FILE,
    manifest=BenchManifest,
    record=BenchRecord,
    ids=lambda manifest: (manifest.bench_id, manifest.spec.bench_id(manifest.machine)),
    owner=lambda record: record.bench_id,
    device=lambda manifest: manifest.spec.device,
)


load_bench = BENCHES.load


class BenchStore(LogFolder[BenchManifest, BenchRecord]):
    """The one writer of `root/<bench_id>/`, made or resumed as `LogFolder` says; use it as a context."""

    def __init__(self, root: Path, manifest: BenchManifest, resume: "Resume[BenchStore] | None" = None) -> None:
        self.stored: dict[tuple[str, str, int, int], BenchRecord] = {}
        super().__init__(BENCHES, root / manifest.bench_id, manifest, resume)

    def done(self, key: tuple[str, str, int, int]) -> bool:
        """Say whether a probe's result is stored; what failed or ran out of time is tried again."""
        return key in self.stored and self.stored[key].status in DONE

    def _note(self, record: BenchRecord) -> None:
        self.stored[record.key] = record


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
