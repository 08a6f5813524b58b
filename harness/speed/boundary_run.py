"""The largest context and the largest batch of each method that fit a memory limit, searched with probes.

Source of the searches: `harness.speed.boundary`. Every probe is a process of its own under the limit.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, field_validator

from harness.errors import HarnessError
from harness.machine import git_commit, machine, versions
from harness.plan.sweep import PlannedCell
from harness.records.boundary_folder import BoundaryManifest, BoundaryRecord, BoundaryStore
from harness.records.spec import Asked, check_least
from harness.speed.bench import MakeProber
from harness.speed.boundary import BoundarySearches, Search, first_guess
from harness.speed.memory_limit import Size
from harness.speed.target import Restarting, Target, limit_in_force, probe_spec, say, swap_note

NEW_TOKENS = 32
STEP = 256
"""Contexts are multiples of it."""
LONGEST_TIMEOUT_S = 1e6
CONTEXT = 8192
"""Tokens of each prompt of the batch search, or the most there can be where that is less."""


class BoundaryAsk(Asked):
    """What a person asked for, by command line.

    limit_bytes: of a probe, the model's own included. context: tokens of each prompt of the batch search, None for
    `CONTEXT`. max_tokens: longest context to try, None for the model's. chunk: tokens of a prefill forward, None for
    the whole prompt at once. timeout_s: of one probe, in seconds.
    """

    budgets: tuple[str, ...] = ("128",)
    limit_bytes: Size
    context: int | None = None
    max_tokens: int | None = None
    max_batch: int = 64
    chunk: int | None = None
    timeout_s: float = 600.0
    threads: int | None = None

    @field_validator("max_batch", "chunk", "threads", "timeout_s")
    @classmethod
    def _at_least_one(cls, given: Any, field: ValidationInfo) -> Any:
        return check_least(given, 1, field)

    @field_validator("context", "max_tokens")
    @classmethod
    def _at_least_two(cls, given: Any, field: ValidationInfo) -> Any:
        return check_least(given, 2, field)

    @field_validator("timeout_s")
    @classmethod
    def _ends(cls, seconds: float) -> float:
        if seconds > LONGEST_TIMEOUT_S:
            raise ValueError(f"--timeout {seconds:g} is too long; give at most {LONGEST_TIMEOUT_S:g} seconds")
        return seconds


def run_boundary(
    ask: BoundaryAsk, *, out: Path, command: Sequence[str], prober: MakeProber
) -> tuple[BoundaryManifest, list[BoundaryRecord]]:
    """Search what is not yet recorded in `out`; the manifest, and the context and the batch of every cell.

    Raises:
        HarnessError: bad input, before a probe is spent on it; a limit that leaves nothing beside the model; a folder
            that cannot be written, or that holds other searches.
    """
    target = Target.load(ask, ask.threads)
    sizes = _sizes(ask, target.context)
    least = [_least(cell, sizes) for cell in target.cells]  # refuses a budget before the first probe
    model = target.model
    start = partial(prober, model=model.name, dtype=model.dtype, device=model.device, threads=target.threads)
    with Restarting(start) as asker:
        kind, notes = limit_in_force(asker, ask.limit_bytes)
        notes += [] if any("swap" in note for note in notes) else swap_note()
        say(f"note: {note}" for note in notes)
        own = asker.model_bytes
        manifest = _manifest(ask, target, command, limit_kind=kind, model_bytes=own, notes=tuple(notes))
        with BoundaryStore(out, manifest) as store:
            searches = BoundarySearches(
                asker, store, limit_bytes=ask.limit_bytes, timeout_s=ask.timeout_s, say=lambda line: say([line])
            )
            records: list[BoundaryRecord] = []
            for cell, shortest in zip(target.cells, least, strict=True):
                pair = _Searches(ask, cell, target, sizes).both(shortest, room=ask.limit_bytes - own)
                records += [searches.run(search) for search in pair]
    return manifest, records


@dataclass(frozen=True)
class Sizes:
    """Prompts that are tried. longest: of the context search, a multiple of `STEP`. context: of the batch search."""

    longest: int
    context: int


def _sizes(ask: BoundaryAsk, model_context: int) -> Sizes:
    """Neither is beyond the model's context. Raises HarnessError."""
    most = ask.max_tokens or model_context
    if most > model_context:
        raise HarnessError(f"--max-tokens {most} exceeds the model's context of {model_context}; lower it")
    longest = most // STEP * STEP
    if longest < STEP:
        raise HarnessError(f"a longest context of {most} is below {STEP}; raise it")
    context = min(CONTEXT, longest) if ask.context is None else ask.context
    if context > most:
        raise HarnessError(f"--context {context} exceeds {most}, the model's context or --max-tokens; lower it")
    return Sizes(longest, context)


def _least(cell: PlannedCell, sizes: Sizes) -> int:
    """The shortest context that is above the cell's budget. Raises HarnessError without one."""
    budget, longest = cell.cell.budget, sizes.longest
    if budget is None:
        return STEP
    if budget.resolve(sizes.context) >= sizes.context:
        raise HarnessError(
            f"budget {cell.budget} is not below the --context of {sizes.context} tokens; lower --budgets"
        )
    fitting = (tokens for tokens in range(STEP, longest + 1, STEP) if budget.resolve(tokens) < tokens)
    least = next(fitting, None)
    if least is None:
        raise HarnessError(f"budget {cell.budget} is not below the longest context, {longest} tokens; lower --budgets")
    return least


@dataclass(frozen=True)
class _Searches:
    """The two searches of one method at one budget."""

    ask: BoundaryAsk
    cell: PlannedCell
    target: Target
    sizes: Sizes

    def both(self, least: int, *, room: int) -> tuple[Search, Search]:
        """The context and the batch. least: shortest context. room: bytes beside the model."""
        context = self.sizes.context
        shape: dict[str, Any] = {"tokens": context, "new_tokens": NEW_TOKENS, "chunk": self.ask.chunk, "warm_up": False}
        spec = probe_spec(self.cell.method, self.cell.budget, self.ask.set, **shape)
        params, revision = self.target.methods[self.cell.method].params, self.target.model.revision
        shared: dict[str, Any] = {"spec": spec, "method": self.cell.method, "params": params}
        shared |= {"model_revision": revision}
        contexts: dict[str, Any] = {"least": least, "most": self.sizes.longest, "step": STEP}
        batches: dict[str, Any] = {"least": 1, "most": self.ask.max_batch, "step": 1}

        def longer(size: int) -> int | None:
            return self._needs(size, 1)

        def wider(size: int) -> int | None:
            return self._needs(context, size)

        def first(predict: Callable[[int], int | None], grid: dict[str, Any]) -> int:
            return first_guess(lambda size: predict(size) or sys.maxsize, room=room, **grid)

        return (
            Search(**shared, kind="context", first=first(longer, contexts), predict=longer, **contexts),
            Search(**shared, kind="batch", at_context=context, first=first(wider, batches), predict=wider, **batches),
        )

    def _needs(self, tokens: int, batch: int) -> int | None:
        """Bytes above the model's own, predicted; None where the method refuses."""
        return self.target.predict(self.cell, tokens=tokens, batch=batch, new_tokens=NEW_TOKENS, chunk=self.ask.chunk)


def _manifest(ask: BoundaryAsk, target: Target, command: Sequence[str], **found: Any) -> BoundaryManifest:
    """found: what the first probe showed of the limit and the model."""
    return BoundaryManifest(
        command=tuple(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=target.model,
        context=target.context,
        threads=target.threads,
        chunk=ask.chunk,
        new_tokens=NEW_TOKENS,
        timeout_s=ask.timeout_s,
        git_commit=git_commit(),
        versions=versions(),
        machine=machine(),
        limit_bytes=ask.limit_bytes,
        **found,
    )
