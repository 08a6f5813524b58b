"""Everything that is ever written to disk. Every field has one line that says what it holds and in which unit."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from pydantic import Field

from harness.records.measured import Measured
from harness.records.ranges import (
    Bytes,
    Count,
    Counts,
    CountsByLayer,
    Label,
    Line,
    Lines,
    Meta,
    Metrics,
    Nats,
    Number,
    Seconds,
    Seed,
    Sha256OrNone,
    Text,
    Texts,
    TokenIds,
    Versions,
)
from harness.records.relayed import Relayed
from harness.records.spec import SCHEMA_VERSION, FirstToken, Frozen, QueryMode, RunSpec

Status = Literal["ok", "skipped", "failed", "oom"]
CellKey = tuple[str, str]  # method label and budget as they stand in a record
PROMPT_TAIL = 240
LACKS = ("no tables for this model", "no constants of this model")
"""How a note begins of a method that is less than its name says, for nothing was compiled for the model."""
OVER = 1.01  # bytes above those asked for by which a record is over its budget
READ = "read "  # before the budget of a method that keeps all tokens and reads a part of them for each decoded one
Memory = Literal["physical", "simulated"]
Key = tuple[str, str, str, str]  # task, sample, method and budget: what a run holds at most one record of


class Record(Frozen):
    """One sample under one cell (method x budget). One JSON line."""

    schema_version: int = SCHEMA_VERSION
    run_id: Label
    model: Label
    dtype: Label
    task: Label  # task name, `family/dataset`
    sample_id: Label
    method: Label  # method label, `name` or `name@preset`
    budget: Label  # as asked: tokens (`128`), a kept fraction (`0.25`), `full` without one, `read 128` of what is read
    query: QueryMode
    first_token: FirstToken
    seed: Seed
    status: Status  # ok: scored; skipped: cannot be run as asked; failed: an error; oom: out of memory
    error: Line | None = None  # one line on why the status is not ok
    memory: Memory = "physical"  # simulated: nothing it drops is freed, so bytes, seconds and peaks are no results
    over_budget: bool = False  # stored bytes (live ones of old records) exceed asked bytes by more than 1 %
    notes: Lines = ()  # what a reader must know, such as a degenerate allocation or neutral tables
    environment_changes: Lines = ()  # since the run's first session, where it was resumed all the same

    prompt_tokens: Count = 0  # tokens of the whole prompt, chat wrap and answer prefix included
    compressed_tokens: Count = 0  # that were cached at compression: the prompt, or its context when query-agnostic
    prompt_sha256: Sha256OrNone = ""  # of the prompt's token ids, comma-separated decimal
    prompt_tail: Line = ""  # the last `PROMPT_TAIL` characters of the prompt, without the chat template's own
    budget_tokens: Count | None = None  # resolved for this prompt: slots per layer and KV head; None without a budget
    kept_slots: Counts = ()  # live ones of each compressible layer after compression, over its KV heads

    kv_bytes: Bytes = 0  # right after compression: live keys, values, positions, side data; windows, states included
    kv_bytes_end: Bytes = 0  # the same after the last decoded token
    stored_bytes: Bytes = 0  # right after compression: all that is allocated for it; 0: not measured (old records)
    stored_bytes_end: Bytes = 0  # the same after the last decoded token, room for further ones included
    byte_steps: Bytes | None = None  # sum of what was stored at each token picked, end-of-text too; None: not measured
    read_bytes: Bytes | None = None  # keys, values, codes, scales that a decoded token reads; None: old records
    asked_bytes: Bytes = 0  # what the budget allows: slots with positions; sliding windows, chunks, states as they are
    full_bytes: Bytes = 0  # the uncompressed cache of the same tokens, which needs no positions
    state_bytes: Bytes = (
        0  # part of all the bytes above: states of layers without keys and values, equal for all methods
    )
    method_bytes: Bytes = 0  # constants of the model that the method reads, such as bases: like weights, no cache bytes
    needle_tokens: Count = 0  # prompt tokens of the sample's needles (`meta.needles`); 0 where it has none
    needle_kept: CountsByLayer = ()  # of those, by compressible layer and KV head, after compression

    answers: Texts = ()  # references, so that the prediction can be scored again from this line
    prediction: Text = ""
    token_ids: TokenIds = ()  # generated token ids, end-of-text excluded
    turn_tokens: Counts = ()  # of a conversation: how many of them each turn said, a line of the prediction
    metrics: Metrics = Field(default_factory=dict)  # task metrics in [0, 1]; `score` is the primary one
    nll: Nats | None = None  # mean of the reference, nats per token, teacher-forced on the compressed cache
    nll_tokens: Count = 0  # reference tokens that `nll` is the mean of
    nll_first: Nats | None = None  # its first token's part, uncompressed when first_token is `prefill`
    meta: Meta = Field(default_factory=dict)  # the sample's own: length, depth; one `group` is one context

    accelerator: Label = ""  # what ran it: GPU or processor; in one run they may differ
    prefill_s: Seconds = 0.0  # observation included; one serves all cells of a sample and all questions of a context
    observe_ms: Number | None = None  # prefill with what the method observes less a plain one; None: not measured
    compress_s: Seconds = 0.0  # of this cell alone
    decode_s: Seconds = 0.0  # of the decode batch this cell was a row of; shared, so not a latency of the method
    decode_rows: Count = 0  # cells of that batch; those with equal caches are one row
    relayed: Relayed | None = None  # how the cache went to the process that answered; None: it was this one
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
    run_id: Label
    status: Literal["started", "finished", "interrupted", "failed"]
    command: Texts  # the command line as typed
    spec: RunSpec  # the command line as resolved
    started: Label  # UTC, ISO 8601
    finished: Label | None = None
    samples: Count  # samples that the run consists of, over all tasks
    cells: Count  # cells of each sample: (method, budget) pairs
    git_commit: Label | None = None
    versions: Versions = Field(default_factory=dict)  # Python and package versions
    machine: Meta = Field(default_factory=dict)  # as `harness.machine.machine` gives it
    sources: Versions = Field(default_factory=dict)  # sha256 of code, as `harness.plan.sources` gives it
    error: Line | None = None
