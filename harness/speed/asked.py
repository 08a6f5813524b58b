"""What the commands that probe are asked for. It is read before torch is imported."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Strict

from harness.errors import HarnessError, shown
from harness.machine import check_threads
from harness.records.bench_folder import BenchKind
from harness.records.options import (
    MOST_BYTES,
    Flag,
    Seconds,
    Times,
    Tokens,
    TwoTokenLengths,
    TwoTokens,
    Words,
    between,
)
from harness.records.spec import Asked

SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,9})?(?:e\d{1,2})?)\s?([kmgt]?)(i?)(?:b|bytes)?", re.IGNORECASE | re.ASCII)


def parse_bytes(size: str | int) -> int:
    """Bytes of `4GiB`, `512MiB`, `1.5GB`, `2e9` or a plain number. Raises HarnessError for anything else or 0."""
    found = None if isinstance(size, bool) else SIZE.fullmatch(str(size).strip())
    power = 0 if found is None else " kmgt".index(found[2].lower() or " ")
    if found is None or (found[3] and not power):
        raise HarnessError(f"{shown(str(size))} is no size; write 4GiB, 512MiB, 2e9 or a number of bytes")
    wanted = float(found[1]) * (1024 if found[3] else 1000) ** power
    if not 1 <= wanted <= MOST_BYTES:
        what = "leaves no memory; give at least one byte" if wanted < 1 else "is of no machine; give fewer bytes"
        raise HarnessError(f"a size of {shown(str(size))[1:-1]} {what}")
    return int(wanted)


Size = Annotated[int, BeforeValidator(parse_bytes)]
"""A number of bytes. pydantic alone would read `1.2.3MiB` as one byte and refuse `2e9`."""
Threads = Annotated[int, Strict(), AfterValidator(check_threads)]
Batch = Annotated[int, Strict(), AfterValidator(between(1, 100_000))]
Distinct = Annotated[int, Strict(), AfterValidator(between(2, 100_000))]
"""Prompts of a batch that are prefilled, of which the others are copies: the last, and one that can be copied."""


class BenchAsk(Asked):
    """What a person asked for, by command line. limit_bytes: of a probe, the model's own included."""

    kind: BenchKind = "bench"
    budgets: Words = ("128", "512")
    lengths: TwoTokenLengths = (2048, 8192)
    batch: Batch = 1
    distinct: Distinct | None = None
    new_tokens: TwoTokens = 32
    chunk: Tokens | None = None
    rounds: Times = 3
    warm_up: Flag = True
    threads: Threads | None = None
    timeout_s: Annotated[float, Strict(), AfterValidator(between(0.001, 1e6))] = 1800
    limit_bytes: Size | None = None


class BoundaryAsk(Asked):
    """What a person asked for, by command line.

    limit_bytes: of a probe, the model's own included. context: tokens of each prompt of the batch search, None for
    `boundary.CONTEXT`. max_tokens: longest context to try, None for the model's. chunk: tokens of a prefill forward,
    None for the whole prompt at once. timeout_s: of one probe, in seconds.
    """

    budgets: Words = ("128",)
    limit_bytes: Size
    context: TwoTokens | None = None
    max_tokens: TwoTokens | None = None
    max_batch: Batch = 64
    distinct: Distinct | None = None
    chunk: Tokens | None = None
    timeout_s: Seconds = 600.0
    threads: Threads | None = None
