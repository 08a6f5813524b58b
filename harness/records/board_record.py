"""What a board needs of a record: a million of them fit into memory where the records do not.

Texts that many records share are held once. What is left out, answers and token ids and kept slots, stays on the disk.
"""

import math
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from harness.records.record import Key, Memory, Record, Status
from harness.records.relayed import Relayed
from harness.records.spec import FirstToken, QueryMode

META = ("group", "depth", "length", "length_bin")  # fields of a sample that boards group and split by


class Timed(NamedTuple):
    """What boards need of `Record.measured`; seconds are medians."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    peak_bytes: int


class Decoded(NamedTuple):
    """What boards need of a long answer: tokens generated, and `Record.byte_steps`."""

    tokens: int
    byte_steps: int | None


class Sent(NamedTuple):
    """What boards need of `Record.relayed`; its fields by name."""

    sent_bytes: int
    text_bytes: int
    send_s: float
    receive_s: float
    ask_s: float
    text_s: float | None
    depends: bool | None


class BoardRecord(NamedTuple):
    """A record in short. Fields up to `accelerator` are those of `Record`, by name; it compares as a tuple."""

    run_id: str
    model: str
    dtype: str
    task: str
    sample_id: str
    method: str
    budget: str
    query: QueryMode
    first_token: FirstToken
    seed: int
    status: Status
    error: str | None
    over_budget: bool
    memory: Memory
    notes: tuple[str, ...]
    environment_changes: tuple[str, ...]
    prompt_sha256: str
    kv_bytes: int
    kv_bytes_end: int
    stored_bytes: int
    stored_bytes_end: int
    read_bytes: int | None
    asked_bytes: int
    full_bytes: int
    state_bytes: int
    observe_ms: float | None
    accelerator: str
    score: float | None  # of `metrics`, in [0, 1]
    nll: float | None
    needle: float  # %, as `needle_percent` has it
    meta: dict[str, Any]  # the fields of `META` that the sample has; shared, never changed
    known: bool  # whether `Record.meta` had any field
    timed: Timed | None
    beside: dict[str, float]  # the other `metrics`, in [0, 1]; shared, never changed
    decoded: Decoded | None  # of answers whose metrics tell whether they `ended`
    relayed: Sent | None

    @property
    def key(self) -> Key:
        return (self.task, self.sample_id, self.method, self.budget)


SAME = BoardRecord._fields[: BoardRecord._fields.index("score")]  # fields that are taken over from `Record` as they are
_same = attrgetter(*SAME)


def _sent(relayed: Relayed) -> Sent:
    return Sent(*(getattr(relayed, name) for name in Sent._fields))


class Shortener:
    """Makes board records that share their texts, notes, scores and meta."""

    def __init__(self) -> None:
        self._metas: dict[str, dict[str, Any]] = {}
        self._texts: dict[Any, Any] = {}
        self._scores: dict[float, float] = {}
        self._besides: dict[str, dict[str, float]] = {}

    def __call__(self, record: Record) -> BoardRecord:
        texts, score, m = self._texts, record.metrics.get("score"), record.measured
        same = [texts.setdefault(x, x) if type(x) in (str, tuple) else x for x in _same(record)]
        beside = {name: value for name, value in record.metrics.items() if name != "score"}
        meta = {name: record.meta[name] for name in META if name in record.meta}
        own = (
            score if score is None else self._scores.setdefault(score, score),
            record.nll,
            needle_percent(record),
            self._metas.setdefault(repr(meta), meta),
            bool(record.meta),
            None if m is None else Timed(m.ttft_s.median, m.tpot_s.median, m.tokens_per_s, m.peak_bytes),
            self._besides.setdefault(repr(beside), beside),
            Decoded(len(record.token_ids), record.byte_steps) if "ended" in beside else None,
            None if record.relayed is None else _sent(record.relayed),
        )
        return BoardRecord._make((*same, *own))


def board_records(records: Iterable[Record | BoardRecord]) -> Iterator[BoardRecord]:
    """Shorten every record; those that are short stay as they are."""
    shorten = Shortener()
    return (r if isinstance(r, BoardRecord) else shorten(r) for r in records)


def needle_percent(record: Record) -> float:
    """Share of the needle tokens still cached, mean over layers and KV heads; NaN for a sample without needles."""
    if not record.needle_tokens:
        return math.nan
    heads = sum(map(len, record.needle_kept))
    return 100 * sum(map(sum, record.needle_kept)) / (heads * record.needle_tokens) if heads else math.nan
