"""What goes into the engine and what comes out: a cell, a prompt, and the outcome of one under the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.engine.decode import Limits
from harness.errors import HarnessError
from harness.records.record import Status
from methods.base import Budget, KVPolicy, PolicyError


class SkippedCell(Exception):
    """A cell that cannot be run as asked on this prompt."""


SPEAKING = (str, RuntimeError, PolicyError, HarnessError, SkippedCell)  # whose text alone says what happened


@dataclass(frozen=True)
class Cell:
    """One method at one budget; budget None for a method that keeps everything."""

    policy: KVPolicy
    budget: Budget | None


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, how many of them are context, the reference answer's ids, and when to stop.

    needle: indexes of the tokens whose survival is counted.
    """

    ids: Sequence[int]
    context: int
    answer: Sequence[int]
    limits: Limits
    needle: Sequence[int] = ()


@dataclass
class Outcome:
    """What one cell produced for one prompt; fields as in `harness.records.record.Record`."""

    status: Status = "ok"
    error: str | None = None
    over_budget: bool = False
    notes: tuple[str, ...] = ()
    compressed_tokens: int = 0
    budget_tokens: int | None = None
    kept_slots: tuple[int, ...] = ()
    needle_kept: tuple[tuple[int, ...], ...] = ()
    kv_bytes: int = 0
    kv_bytes_end: int = 0
    asked_bytes: int = 0
    full_bytes: int = 0
    token_ids: tuple[int, ...] = ()
    nll_per_token: tuple[float, ...] = ()
    prefill_s: float = 0.0
    compress_s: float = 0.0
    decode_s: float = 0.0
    decode_rows: int = 0

    def fail(self, status: Status, error: BaseException | str) -> None:
        text = str(error) if isinstance(error, SPEAKING) else f"{type(error).__name__}: {error}"
        self.status, self.error = status, " ".join(text.split())[:500]
