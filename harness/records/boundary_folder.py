"""The folder of `harness boundary`: `boundary.json` (what was asked, and where) and `boundary.jsonl` (the searches).

A search has one line. The file is replaced in one step after each probe, so a repeated command goes on where the last
one ended. No torch here: leaderboards import this module.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from harness.errors import HarnessError
from harness.records.log_folder import LogFolder, Resume
from harness.records.log_layout import LogLayout
from harness.records.measured import ProbeStatus
from harness.records.spec import SCHEMA_VERSION, Frozen, ModelSpec

MANIFEST_FILE, RECORDS_FILE = "boundary.json", "boundary.jsonl"
MAY_DIFFER = {"command", "created", "git_commit", "versions", "machine", "sources", "model_bytes", "notes"}
"""Fields in which what is resumed may be another."""

SizeKind = Literal["context", "batch"]


class Tried(Frozen):
    tokens: int
    batch: int
    status: ProbeStatus
    seconds: float  # of the whole probe
    peak_bytes: int | None = None  # above the model's own
    predicted_bytes: int | None = None  # what `peak_bytes` was expected to be
    reserved_bytes: int | None = None  # as in `Measured`
    error: str | None = None


class Found(Frozen):
    answer: int  # the largest size that fits, 0 where not even the least does
    whole: bool = False  # even the most fits, so the answer is at least that
    next_size: int | None = None  # the least size that did not fit, one step above the answer
    next_status: ProbeStatus | None = None  # how that ended; anything but `oom` is no statement about memory


class BoundaryRecord(Frozen):
    """One search. One JSON line."""

    schema_version: int = SCHEMA_VERSION
    model_revision: str = ""  # content hash or commit, as in the manifest
    method: str
    params: dict[str, Any] = Field(default_factory=dict)
    budget: str
    kind: SizeKind
    at_context: int | None = None  # tokens of each prompt where the batch is searched
    limit_bytes: int
    least: int
    most: int
    step: int
    found: Found | None = None  # None while the search goes on
    probes: tuple[Tried, ...] = ()
    environment_changes: tuple[str, ...] = ()  # since the folder's first session, where it was resumed all the same

    @property
    def key(self) -> tuple[str, str, str, int]:
        return (self.method, self.budget, self.kind, self.at_context or 0)

    def probe(self, size: int | None) -> Tried | None:
        tokens, batch = (size, 1) if self.kind == "context" else (self.at_context, size)
        return next((tried for tried in self.probes if (tried.tokens, tried.batch) == (tokens, batch)), None)


class BoundaryManifest(Frozen):
    """boundary.json: what the searches of a folder have in common."""

    schema_version: int = SCHEMA_VERSION
    command: tuple[str, ...]
    created: str
    model: ModelSpec
    context: int  # tokens that the model can take
    limit_bytes: int
    limit_kind: str  # what enforces the limit
    model_bytes: int  # the model's own, part of the limit
    threads: int | None  # of the CPU, None for PyTorch's choice
    chunk: int | None
    new_tokens: int
    distinct: int | None = None  # prompts of a batch that are prefilled, the others being copies; None for all
    timeout_s: float  # of a probe
    notes: tuple[str, ...] = ()
    git_commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    sources: dict[str, str] = Field(default_factory=dict)  # of code, as `harness.plan.sources` gives it


BOUNDARIES = LogLayout(
    kind="boundary",
    manifest_file=MANIFEST_FILE,
    records_file=RECORDS_FILE,
    manifest=BoundaryManifest,
    record=BoundaryRecord,
    device=lambda manifest: manifest.model.device,
)


class BoundaryStore(LogFolder[BoundaryManifest, BoundaryRecord]):
    """The one writer of a folder of searches, made or resumed as `LogFolder` says; one of other settings is refused."""

    def __init__(self, folder: Path, manifest: BoundaryManifest, resume: "Resume[BoundaryStore] | None" = None) -> None:
        self.records: dict[tuple[str, str, str, int], BoundaryRecord] = {}
        super().__init__(BOUNDARIES, folder, manifest, resume)

    def put(self, record: BoundaryRecord) -> None:
        """Store a search as far as it came, in place of what was there of it."""
        self._note(self._marked(record))
        self._replace(list(self.records.values()))

    def _note(self, record: BoundaryRecord) -> None:
        self.records[record.key] = record

    def _check_same(self, earlier: BoundaryManifest) -> None:
        old, new = (manifest.model_dump(exclude=MAY_DIFFER) for manifest in (earlier, self.manifest))
        other = next((name for name in new if old[name] != new[name]), None)
        if other is not None:
            was = f"{self.folder} was searched with {other} {old[other]}"
            raise HarnessError(f"{was}, not {new[other]}; choose another --out")


load_boundaries = BOUNDARIES.load
