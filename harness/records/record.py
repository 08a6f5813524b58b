"""Everything that is ever written to disk. Every field has one line that says what it holds and in which unit."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from harness.records.measured import Measured
from harness.records.spec import SCHEMA_VERSION, FirstToken, Frozen, QueryMode, RunSpec

Status = Literal["ok", "skipped", "failed", "oom"]
CellKey = tuple[str, str]  # method label and budget as they stand in a record
PROMPT_TAIL = 240
OVER = 1.01  # bytes above those asked for by which a record is over its budget
Memory = Literal["physical", "simulated"]
Key = tuple[str, str, str, str]  # task, sample, method and budget: what a run holds at most one record of


class Record(Frozen):
    """One sample under one cell (method x budget). One JSON line."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    model: str
    dtype: str
    task: str  # task name, `family/dataset`
    sample_id: str
    method: str  # method label, `name` or `name@preset`
    budget: str  # as asked: tokens (`128`), a kept fraction (`0.25`), or `full` for a method without a budget
    query: QueryMode
    first_token: FirstToken
    seed: int
    status: Status  # ok: scored; skipped: cannot be run as asked; failed: an error; oom: out of memory
    error: str | None = None  # one line on why the status is not ok
    memory: Memory = "physical"  # simulated: nothing it drops is freed, so bytes, seconds and peaks are no results
    over_budget: bool = False  # stored bytes (live ones of old records) exceed asked bytes by more than 1 %
    notes: tuple[str, ...] = ()  # what a reader must know, such as a degenerate allocation or neutral tables
    environment_changes: tuple[str, ...] = ()  # since the run's first session, where it was resumed all the same

    prompt_tokens: int = 0  # tokens of the whole prompt, chat wrap and answer prefix included
    compressed_tokens: int = 0  # that were cached at compression: the prompt, or its context when query-agnostic
    prompt_sha256: str = ""  # of the prompt's token ids, comma-separated decimal
    prompt_tail: str = ""  # the last `PROMPT_TAIL` characters of the prompt, without the chat template's own
    budget_tokens: int | None = None  # resolved for this prompt: slots per layer and KV head; None without a budget
    kept_slots: tuple[int, ...] = ()  # live ones of each compressible layer after compression, over its KV heads

    kv_bytes: int = 0  # right after compression: live keys, values, positions, side data; sliding windows included
    kv_bytes_end: int = 0  # the same after the last decoded token
    stored_bytes: int = 0  # right after compression: all that is allocated for it; 0: not measured (old records)
    stored_bytes_end: int = 0  # the same after the last decoded token, room for further ones included
    byte_steps: int | None = None  # sum of what was stored at each token picked, end-of-text too; None: not measured
    asked_bytes: int = 0  # what the budget allows: slots with their positions, sliding-window layers at their own size
    full_bytes: int = 0  # the uncompressed cache of the same tokens, which needs no positions
    needle_tokens: int = 0  # prompt tokens of the sample's needles (`meta.needles`); 0 where it has none
    needle_kept: tuple[tuple[int, ...], ...] = ()  # of those, by compressible layer and KV head, after compression

    answers: tuple[str, ...] = ()  # references, so that the prediction can be scored again from this line
    prediction: str = ""
    token_ids: tuple[int, ...] = ()  # generated token ids, end-of-text excluded
    turn_tokens: tuple[int, ...] = ()  # of a conversation: how many of them each turn said, a line of the prediction
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)  # task metrics in [0, 1]; `score` is the primary one
    nll: FiniteFloat | None = None  # mean of the reference, nats per token, teacher-forced on the compressed cache
    nll_tokens: int = 0  # reference tokens that `nll` is the mean of
    nll_first: FiniteFloat | None = None  # its first token's part, uncompressed when first_token is `prefill`
    meta: dict[str, Any] = Field(default_factory=dict)  # the sample's own: length, depth; one `group` is one context

    accelerator: str = ""  # what ran it: GPU or processor; in one run they may differ
    prefill_s: float = 0.0  # observation included; one serves all cells of a sample and all questions of a context
    observe_ms: FiniteFloat | None = None  # prefill with what the method observes less a plain one; None: not measured
    compress_s: float = 0.0  # of this cell alone
    decode_s: float = 0.0  # seconds of the decode batch this cell was a row of; shared, so not a latency of the method
    decode_rows: int = 0  # rows of that batch
    measured: Measured | None = None  # this cell by itself on the same prompt; None where nothing was measured

    @property
    def key(self) -> Key:
        return (self.task, self.sample_id, self.method, self.budget)


def by_turns(token_ids: Sequence[int], turn_tokens: Sequence[int]) -> list[Sequence[int]]:
    """Return what each turn of a record said; all of it without turns. turn_tokens: as of a record."""
    ends = list(accumulate(turn_tokens)) or [len(token_ids)]
    return [token_ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class RunManifest(Frozen):
    """run.json, written before the first record and rewritten when the run ends."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    status: Literal["started", "finished", "interrupted", "failed"]
    command: tuple[str, ...]  # the command line as typed
    spec: RunSpec  # the command line as resolved
    started: str  # UTC, ISO 8601
    finished: str | None = None
    samples: int  # samples that the run consists of, over all tasks
    cells: int  # cells of each sample: (method, budget) pairs
    git_commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)  # Python and package versions
    machine: dict[str, Any] = Field(default_factory=dict)  # as `harness.machine.machine` gives it
    sources: dict[str, str] = Field(default_factory=dict)  # sha256 of code, as `harness.plan.sources` gives it
    error: str | None = None
