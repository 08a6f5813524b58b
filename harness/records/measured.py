"""What is measured of one method by itself: the seconds of every phase and the memory."""

from collections.abc import Sequence
from statistics import median
from typing import Any, Literal, Self

from pydantic import Field

from harness.records.ranges import Bytes, BytesByLayer, Count, Number, Seconds
from harness.records.spec import Frozen

ProbeStatus = Literal["ok", "oom", "timeout", "failed"]


class Spread(Frozen):
    """Median of repeated seconds, with the least and the most."""

    median: Seconds
    low: Seconds
    high: Seconds

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median=median(values), low=min(values), high=max(values))


class GpuState(Frozen):
    """Of a GPU, where it tells."""

    sm_mhz: Number | None = None
    memory_mhz: Number | None = None
    temperature_c: Number | None = None
    power_w: Number | None = None


class Measured(Frozen):
    """One method at one budget, on prompts of one length, by itself."""

    tokens: Count  # of each prompt
    batch: Count  # prompts, prefilled one at a time and decoded together
    new_tokens: Count  # generated for each prompt
    rounds: Count  # repetitions after a dropped warm-up
    prefill_s: Spread  # of one prompt, without what follows
    observe_s: Spread  # gathering what the method asks for: window queries, column sums
    compress_s: Spread
    ttft_s: Spread  # time to the first token of a prompt: the three above and the choice of the token
    tpot_s: Spread  # time per output token: a decode step of the whole batch
    tokens_per_s: Number  # output tokens a second over the batch, by the median step
    kv_bytes: BytesByLayer  # live bytes of each layer after compression, of one prompt
    model_bytes: Bytes  # resident (CPU) or allocated (CUDA) before the first prompt
    peak_bytes: Bytes  # most that was held above that, prefill and decode of the whole batch included
    predicted_bytes: Bytes  # what `harness.speed.predicted_memory` expects `peak_bytes` to be
    memory: Literal["resident set", "cuda allocated"]  # what the two before are of
    reserved_bytes: Bytes | None = None  # most that the CUDA allocator had from the device, the model's included
    gpu: GpuState | None = None  # right after the last step that was timed
    replayed: bool | None = None  # whether its steps were replays of a CUDA graph; None on a CPU


class ProbeSpec(Frozen):
    method: str  # a label, `name` or `name@preset`
    set: dict[str, Any] = Field(default_factory=dict)  # its changed parameters
    budget: str | None  # tokens or a fraction, as in `harness run`; None for a method without one
    tokens: int = Field(ge=2)  # of each prompt
    batch: int = Field(default=1, ge=1)
    distinct: int | None = Field(default=None, ge=2)  # prompts of the batch that differ, the others are copies; or all
    new_tokens: int = Field(default=32, ge=2)
    chunk: int | None = Field(default=None, ge=1)  # tokens of a prefill forward, None for all at once
    rounds: int = Field(default=1, ge=1)
    warm_up: bool = True  # whether a first round is dropped; a probe that only asks for memory needs none
    seed: int = 0
    ids: tuple[int, ...] = ()  # the prompt; drawn from the vocabulary by `seed` when empty


class ProbeResult(Frozen):
    status: ProbeStatus
    measured: Measured | None = None
    error: str | None = None  # one line, where the status is not ok
