"""`harness boundary` on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import names
from harness.errors import HarnessError
from harness.plan.options import assignment
from harness.records.memory_folder import BoundaryManifest, BoundaryRecord, BoundaryStore
from harness.speed.memory_search import Boundaries, Search, first_guess

if TYPE_CHECKING:
    from harness.plan.sweep import PlannedCell
    from harness.speed.target import Target

NEW_TOKENS = 32
STEP = 256
"""Contexts are multiples of it."""
LONGEST_TIMEOUT_S = 1e6
CONTEXT = 8192
"""Tokens of each prompt of the batch search, or the most there can be where that is less."""


def boundary_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `harness boundary`."""
    add = parser.add_argument
    add("--methods", type=names, required=True, help="comma-separated, `name` or `name@preset`")
    add("--budgets", type=names, default=("128",), help="tokens per layer and KV head, or kept fractions (128)")
    add("--memory-limit", required=True, metavar="SIZE", help="of a probe, the model included: 4GiB, 512MiB")
    add("--context", type=int, help=f"tokens of each prompt of the batch search ({CONTEXT}, or the most)")
    add("--max-tokens", type=int, help="longest context to try (default, and most: the model's context)")
    add("--max-batch", type=int, default=64, help="largest batch to try (64)")
    add("--chunk", type=int, help="tokens of a prefill forward (default: the whole prompt at once)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="of one probe (600)")
    add("--model", default="smollm2-135m", help="as in `harness run`")
    add("--dtype", default="auto", help="as in `harness run`")
    add("--device", default="auto", help="as in `harness run`")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--set", action="append", metavar="METHOD.PARAM=VALUE", help="change a parameter of a method; repeatable")
    add("--out", type=Path, default=Path("boundary"), metavar="DIR", help="folder; repeat the command to resume")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.records.spec import Sweep
    from harness.speed.client import Prober
    from harness.speed.memory_limit import parse_bytes
    from harness.speed.target import Restarting, Target, limit_in_force, say, swap_note
    from leaderboards.tables.boundary import to_terminal, write_boundary

    _check_numbers(args)
    limit, changed = parse_bytes(args.memory_limit), dict(map(assignment, args.set or ()))
    asked = {name: getattr(args, name) for name in ("model", "dtype", "device", "methods", "budgets")}
    target = Target.load(Sweep(**asked, tasks=(), set=changed), args.threads)
    sizes = _sizes(args, target)
    for cell in target.cells:
        _least(cell, sizes)
    model = target.model
    prober_of = partial(Prober, model=model.name, dtype=model.dtype, device=model.device, threads=target.threads)
    with Restarting(prober_of) as prober:
        kind, notes = limit_in_force(prober, limit)
        notes += [] if any("swap" in note for note in notes) else swap_note()
        say(f"note: {note}" for note in notes)
        own = prober.model_bytes
        given: dict[str, Any] = {"limit_bytes": limit, "limit_kind": kind, "model_bytes": own, "notes": tuple(notes)}
        manifest = _manifest(args, target, command, **given)
        with BoundaryStore.open(args.out, manifest) as store:
            searches = Boundaries(
                prober, store, limit_bytes=limit, timeout_s=args.timeout, say=lambda line: say([line])
            )
            records: list[BoundaryRecord] = []
            for cell in target.cells:
                pair = _searches(args, cell, target, room=limit - own, sizes=sizes)
                records += [searches.run(search) for search in pair]
            print(to_terminal(records, manifest))
            for path in write_boundary(args.out):
                print(f"wrote {path}", file=sys.stderr)
    return _ending(records)


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("context", "max_tokens", "max_batch", "chunk", "threads", "timeout"):
        value, least = getattr(args, name), 2 if name in ("context", "max_tokens") else 1
        if value is not None and not value >= least:  # nan too
            raise HarnessError(f"--{name.replace('_', '-')} {value} is too small; give at least {least}")
    if args.timeout > LONGEST_TIMEOUT_S:
        raise HarnessError(f"--timeout {args.timeout:g} is too long; give at most {LONGEST_TIMEOUT_S:g} seconds")


@dataclass(frozen=True)
class Sizes:
    """Prompts that are tried. longest: of the context search, a multiple of `STEP`. context: of the batch search."""

    longest: int
    context: int


def _sizes(args: argparse.Namespace, target: Target) -> Sizes:
    """Neither is beyond the model's context. Raises HarnessError."""
    most = args.max_tokens or target.context
    if most > target.context:
        raise HarnessError(f"--max-tokens {most} exceeds the model's context of {target.context}; lower it")
    longest = most // STEP * STEP
    if longest < STEP:
        raise HarnessError(f"a longest context of {most} is below {STEP}; raise it")
    context = min(CONTEXT, longest) if args.context is None else int(args.context)
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


def _searches(
    args: argparse.Namespace, cell: PlannedCell, target: Target, *, room: int, sizes: Sizes
) -> tuple[Search, Search]:
    """The context and the batch of one method at one budget. room: bytes beside the model."""
    from harness.speed.target import probe_spec

    def needs(tokens: int, batch: int) -> int | None:
        return target.predict(cell, tokens=tokens, batch=batch, new_tokens=NEW_TOKENS, chunk=args.chunk)

    def longer(size: int) -> int | None:
        return needs(size, 1)

    def wider(size: int) -> int | None:
        return needs(sizes.context, size)

    def first(predict: Callable[[int], int | None], grid: dict[str, Any]) -> int:
        return first_guess(lambda size: predict(size) or sys.maxsize, room=room, **grid)

    changed = dict(map(assignment, args.set or ()))
    shape: dict[str, Any] = {"tokens": sizes.context, "new_tokens": NEW_TOKENS, "chunk": args.chunk, "warm_up": False}
    shared: dict[str, Any] = {"spec": probe_spec(cell, changed, **shape), "method": cell.method}
    shared |= {"params": target.methods[cell.method].params, "model_revision": target.model.revision}
    contexts: dict[str, Any] = {"least": _least(cell, sizes), "most": sizes.longest, "step": STEP}
    batches: dict[str, Any] = {"least": 1, "most": args.max_batch, "step": 1}
    return (
        Search(**shared, kind="context", first=first(longer, contexts), predict=longer, **contexts),
        Search(**shared, kind="batch", at_context=sizes.context, first=first(wider, batches), predict=wider, **batches),
    )


def _manifest(args: argparse.Namespace, target: Target, command: Sequence[str], **found: Any) -> BoundaryManifest:
    """found: what the first probe showed of the limit and the model."""
    from harness.machine import git_commit, machine, versions

    return BoundaryManifest(
        command=tuple(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=target.model,
        context=target.context,
        threads=target.threads,
        chunk=args.chunk,
        new_tokens=NEW_TOKENS,
        timeout_s=args.timeout,
        git_commit=git_commit(),
        versions=versions(),
        machine=machine(),
        **found,
    )


def _ending(records: Sequence[BoundaryRecord]) -> int:
    """1 where an answer is bounded by something else than memory."""
    lost = sum(r.found is not None and r.found.next_status in ("failed", "timeout") for r in records)
    if lost:
        what = f"{lost} of {len(records)} searches end at a probe that failed or ran out of time, not out of memory"
        print(f"harness: {what}", file=sys.stderr)
    return 1 if lost else 0
