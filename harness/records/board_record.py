"""What a board needs of a record: a million of them fit into memory where the records do not.

Texts that many records share are held once. What is left out, answers and token ids and kept slots, stays on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from sys import intern
from typing import Any, NamedTuple

from harness.records.record import Memory, Record, Status

META = ("group", "depth", "length", "length_bin")
"""Fields of a sample that boards group and split by."""


class Timed(NamedTuple):
    """Of `Record.measured`; seconds are medians."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    peak_bytes: int


class Brief(NamedTuple):
    """A record in brief; fields of `Record` under their names. It compares as a tuple."""

    run_id: str
    model: str
    dtype: str
    task: str
    sample_id: str
    method: str
    budget: str
    query: str
    first_token: str
    seed: int
    status: Status
    error: str | None
    over_budget: bool
    memory: Memory
    notes: tuple[str, ...]
    prompt_sha256: str
    kv_bytes: int
    asked_bytes: int
    full_bytes: int
    score: float | None
    """Of `metrics`, in [0, 1]."""
    nll: float | None
    needle: float
    """Share of the needle tokens still cached, %: mean over layers and KV heads; NaN for a sample without needles."""
    meta: dict[str, Any]
    """The fields of `META` that the sample has. Shared: never changed."""
    known: bool
    """Whether `Record.meta` had any field."""
    timed: Timed | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """As `Record.key`."""
        return (self.task, self.sample_id, self.method, self.budget)


class Briefs:
    """Makes briefs of records that share their texts."""

    def __init__(self) -> None:
        self._metas: dict[str, dict[str, Any]] = {}
        self._notes: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._scores: dict[float, float] = {}

    def __call__(self, r: Record) -> Brief:
        """The brief of one record."""
        meta = {name: r.meta[name] for name in META if name in r.meta}
        score = r.metrics.get("score")
        measured = r.measured
        return Brief(
            intern(r.run_id),
            intern(r.model),
            intern(r.dtype),
            intern(r.task),
            intern(r.sample_id),
            intern(r.method),
            intern(r.budget),
            r.query,
            r.first_token,
            r.seed,
            r.status,
            r.error,
            r.over_budget,
            r.memory,
            self._notes.setdefault(r.notes, r.notes),
            intern(r.prompt_sha256),
            r.kv_bytes,
            r.asked_bytes,
            r.full_bytes,
            score if score is None else self._scores.setdefault(score, score),
            r.nll,
            needle_percent(r),
            self._metas.setdefault(repr(meta), meta) if meta else NO_META,
            bool(r.meta),
            None
            if measured is None
            else Timed(measured.ttft_s.median, measured.tpot_s.median, measured.tokens_per_s, measured.peak_bytes),
        )


NO_META: dict[str, Any] = {}


def briefs(records: Iterable[Record | Brief]) -> Iterator[Brief]:
    """Every record in brief; those that are stay as they are."""
    brief = Briefs()
    return (r if isinstance(r, Brief) else brief(r) for r in records)


def needle_percent(record: Record) -> float:
    """Share of the needle tokens still cached, mean over layers and KV heads; NaN for a sample without needles."""
    if not record.needle_tokens:
        return math.nan
    heads = sum(map(len, record.needle_kept))
    return 100 * sum(map(sum, record.needle_kept)) / (heads * record.needle_tokens) if heads else math.nan
