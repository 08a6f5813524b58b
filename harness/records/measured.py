"""What is measured of one method by itself: the seconds of every phase and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

from pydantic import Field

from harness.records.spec import Frozen

ProbeStatus = Literal["ok", "oom", "timeout", "failed"]


class Spread(Frozen):
    """Median of repeated seconds, with the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Take it of at least one value."""
        return cls(median=median(values), low=min(values), high=max(values))


class Measured(Frozen):
    """One method at one budget, on prompts of one length, by itself."""

    tokens: int
    """Of each prompt."""
    batch: int
    """Prompts, prefilled one at a time and decoded together."""
    new_tokens: int
    """Generated for each prompt."""
    rounds: int
    """Repetitions after a dropped warm-up."""
    prefill_s: Spread
    """Of one prompt, without what follows."""
    observe_s: Spread
    """Gathering what the method asks for: window queries, column sums."""
    compress_s: Spread
    ttft_s: Spread
    """Time to the first token of a prompt: the three above and the choice of the token."""
    tpot_s: Spread
    """Time per output token: a decode step of the whole batch."""
    tokens_per_s: float
    """Output tokens a second over the batch, by the median step."""
    kv_bytes: tuple[int, ...]
    """Live bytes of each layer after compression, of one prompt."""
    model_bytes: int
    """Resident (CPU) or allocated (CUDA) before the first prompt."""
    peak_bytes: int
    """Most that was held above that, prefill and decode of the whole batch included."""
    predicted_bytes: int
    """What `harness.speed.predicted_memory` expects `peak_bytes` to be."""
    memory: Literal["resident set", "cuda allocated"]
    """What the two before are of."""


class ProbeSpec(Frozen):
    """What a probe runs."""

    method: str
    """A label, `name` or `name@preset`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Its changed parameters."""
    budget: str | None
    """Tokens or a fraction, as in `harness run`; None for a method without one."""
    tokens: int = Field(ge=2)
    """Of each prompt."""
    batch: int = Field(default=1, ge=1)
    new_tokens: int = Field(default=32, ge=2)
    chunk: int | None = Field(default=None, ge=1)
    """Tokens of a prefill forward, None for all at once."""
    rounds: int = Field(default=1, ge=1)
    warm_up: bool = True
    """Whether a first round is dropped; a probe that only asks for memory needs none."""
    seed: int = 0
    ids: tuple[int, ...] = ()
    """The prompt; drawn from the vocabulary by `seed` when empty."""


class ProbeResult(Frozen):
    """How a probe ended."""

    status: ProbeStatus
    measured: Measured | None = None
    error: str | None = None
    """One line, where the status is not ok."""
