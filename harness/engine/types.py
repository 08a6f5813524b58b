"""What goes into the engine and what comes out: a cell, a prompt, and the outcome of one under the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError, line_of, shown
from harness.records.record import Status
from harness.records.relayed import Relayed
from harness.records.spec import AS
from methods.budget import Budget, BudgetTooSmall, PolicyError

if TYPE_CHECKING:
    from methods.base import KVPolicy


class PromptFailed(HarnessError):
    """One prompt that a model cannot take; others go on."""


class NotFinite(PromptFailed):
    """The model's own logits are NaN or infinite. where: after which tokens."""

    def __init__(self, where: str) -> None:
        super().__init__(f"the model's logits {where} are NaN or infinite; try --dtype float32, or check its weights")


def _is_count(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


class SkippedCell(Exception):
    """A cell that cannot be run as asked on this prompt."""


@dataclass(frozen=True)
class AsKept:
    """A budget that another method finds: the least whose bytes are no fewer than it stored of the same prompt.

    label: of that method, whose policy is of the kind `own`.
    """

    policy: "KVPolicy"
    label: str

    def __str__(self) -> str:
        return f"{AS}{self.label}"


@dataclass(frozen=True)
class Cell:
    """One method at one budget. budget: None where it is given none, or `like` another method."""

    policy: "KVPolicy"
    budget: Budget | None
    like: AsKept | None = None

    @property
    def whole(self) -> bool:
        """Whether the method keeps everything."""
        return self.policy.kind == "whole"


@dataclass(frozen=True)
class Limits:
    """When a generation ends. text: token ids to text, asked only when there are stop strings."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    text: Callable[[Sequence[int]], str] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens"):
            if not _is_count(own := getattr(self, name)):
                raise HarnessError(f"{name} {shown(own)} is no number of tokens; give a whole number from 0 on")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise HarnessError(f"stop {shown(self.stop)} is no list of texts; give some, none of them empty")
        if self.stop and self.text is None:
            raise HarnessError(f"stop {shown(self.stop)} cannot be found without `text`; give a function of token ids")
        if isinstance(self.eos_ids, str) or not all(map(_is_count, self.eos_ids)):
            raise HarnessError(f"eos_ids {shown(self.eos_ids)} are no token ids; give whole numbers from 0 on")

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the generation is complete, judged by its tokens so far (end-of-text never among them)."""
        if len(tokens) >= self.max_new_tokens:
            return True
        if self.text is None or not self.stop or len(tokens) <= self.min_new_tokens:
            return False
        longest = max(len(stop.encode()) for stop in self.stop)  # a token is a byte at least
        tail = self.text(tokens[-longest - 8 :])
        return any(stop in tail for stop in self.stop)


@dataclass(frozen=True)
class NextTurn:
    """A further turn of a conversation: the tokens between the last answer and the next one, and when that ends."""

    ids: Sequence[int]
    limits: Limits


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, how many of them are context, the reference answer's ids, and when to stop.

    needle: indexes of the tokens whose survival is counted. protected: of those that `protect` keeps. turns: how the
    conversation goes on. again: whether the cache is compressed again after each answer that another turn follows.
    """

    ids: Sequence[int]
    context: int
    answer: Sequence[int]
    limits: Limits
    needle: Sequence[int] = ()
    protected: Sequence[int] = ()
    turns: Sequence[NextTurn] = ()
    again: bool = False

    def __post_init__(self) -> None:
        if not (_is_count(self.context) and self.context <= len(self.ids)):
            what = f"context {shown(self.context)} of {len(self.ids)} prompt tokens"
            raise HarnessError(f"{what} is no border; give a whole number of tokens, at most all")


@dataclass
class Outcome:
    """What one cell produced for one prompt.

    Its fields are those of `harness.records.record.Record` of the same name, which say what they hold and in which
    unit; `nll_per_token` is stored as its mean, its length and its first number.
    """

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
    stored_bytes: int = 0
    stored_bytes_end: int = 0
    byte_steps: int | None = None
    read_bytes: int | None = None
    asked_bytes: int = 0
    full_bytes: int = 0
    state_bytes: int = 0
    method_bytes: int = 0
    token_ids: tuple[int, ...] = ()
    turn_tokens: tuple[int, ...] = ()
    nll_per_token: tuple[float, ...] = ()
    prefill_s: float = 0.0
    observe_ms: float | None = None
    compress_s: float = 0.0
    decode_s: float = 0.0
    decode_rows: int = 0
    relayed: Relayed | None = None

    def fail(self, error: BaseException | str, status: Status | None = None) -> None:
        """Mark the cell: `skipped`, `oom` as Python, the CPU allocator and CUDA say it, or `failed`."""
        speaks = isinstance(error, str | RuntimeError | PolicyError | HarnessError | SkippedCell)
        text = str(error) if speaks else f"{type(error).__name__}: {error}"
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        oom = memory or "can't allocate memory" in text
        own: Status = "skipped" if isinstance(error, SkippedCell | BudgetTooSmall) else "oom" if oom else "failed"
        self.status, self.error = status or own, line_of(" ".join(text.split()))[:500]
        self.relayed = None

    def stored(self) -> dict[str, Any]:
        """The fields of a record that the engine fills in, under their names."""
        own = vars(self).copy()
        nll = own.pop("nll_per_token")
        mean, first = (sum(nll) / len(nll), nll[0]) if nll else (None, None)
        return own | {"nll": mean, "nll_tokens": len(nll), "nll_first": first}
