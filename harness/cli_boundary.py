"""`harness boundary` on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.arguments import assignment, names
from harness.boundary import Boundaries, Restarting, Search, first_guess
from harness.boundary_store import BoundaryManifest, BoundaryRecord, BoundaryStore
from harness.errors import HarnessError
from harness.measured import ProbeSpec

if TYPE_CHECKING:
    from harness.plan import PlannedCell
    from harness.spec import MethodSpec, ModelSpec

NEW_TOKENS = 32
STEP = 256
"""Contexts are multiples of it."""
SHORT = 16
"""Tokens of the probe that shows which limit holds."""
CONTEXT = 8192
"""Tokens of each prompt of the batch search, or the most there can be where that is less."""


def boundary_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `harness boundary`."""
    add = parser.add_argument
    add("--methods", type=names, required=True, help="comma-separated, `name` or `name@preset`")
    add("--budgets", type=names, default=("128",), help="tokens per layer and KV head, or kept fractions (128)")
    add("--memory-limit", required=True, metavar="SIZE", help="of a probe, the model included: 4GiB, 512MiB")
    add("--context", type=int, help=f"tokens of each prompt of the batch search ({CONTEXT}, or the most)")
    add("--max-tokens", type=int, help="longest context to try (default: the model's context)")
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


@dataclass(frozen=True)
class Target:
    """The model as the probes load it, and what is asked of it. longest: tokens of a prompt that are tried at most.

    config: of transformers. methods: by label, as fitted to the model.
    """

    model: ModelSpec
    config: Any
    context: int
    longest: int
    threads: int
    methods: dict[str, MethodSpec]
    cells: list[PlannedCell]

    def predict(self, cell: PlannedCell, *, tokens: int, batch: int, chunk: int | None) -> int:
        """Bytes above the model's own; more than there can be where the method refuses."""
        from harness.footprint import predict
        from harness.models import DTYPES
        from methods.base import PolicyError

        budget, number = cell.cell.budget, DTYPES[self.model.dtype].itemsize
        slots = None if budget is None else budget.resolve(tokens)
        work: dict[str, Any] = {
            "tokens": tokens,
            "budget": slots,
            "batch": batch,
            "new_tokens": NEW_TOKENS,
            "chunk": chunk,
        }
        try:
            return predict(self.config, number, cell.cell.policy, **work)
        except PolicyError:
            return sys.maxsize


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.limits import parse_bytes
    from harness.probe import Prober
    from leaderboards.frontier import to_terminal, write_frontier

    _check_numbers(args)
    limit = parse_bytes(args.memory_limit)
    target = _target(args)
    context = _batch_context(args, target)
    for cell in target.cells:
        _least(cell, target.longest, context)
    model = target.model
    prober_of = partial(Prober, model=model.name, dtype=model.dtype, device=model.device, threads=target.threads)
    with Restarting(prober_of) as prober:
        own = prober.model_bytes
        if limit <= own:
            raise HarnessError(
                f"--memory-limit {args.memory_limit} is {limit} bytes, the loaded model alone takes {own}; raise it"
            )
        in_force = _limit_in_force(prober, limit, args.timeout)
        manifest = _manifest(args, target, command, limit=limit, model_bytes=own, in_force=in_force)
        for note in manifest.notes:
            _say(f"note: {note}")
        with BoundaryStore.open(args.out, manifest) as store:
            boundaries = Boundaries(prober, store, limit_bytes=limit, timeout_s=args.timeout, say=_say)
            records = []
            for cell in target.cells:
                pair = _searches(args, cell, target, room=limit - own, context=context)
                records += [boundaries.run(search) for search in pair]
            print(to_terminal(records, manifest))
            for path in write_frontier(args.out):
                print(f"wrote {path}", file=sys.stderr)
    return _ending(records)


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("context", "max_tokens", "max_batch", "chunk", "threads", "timeout"):
        value, least = getattr(args, name), 2 if name in ("context", "max_tokens") else 1
        if value is not None and not value >= least:  # nan too
            raise HarnessError(f"--{name.replace('_', '-')} {value} is too small; give at least {least}")


def _target(args: argparse.Namespace) -> Target:
    """Loads the model once to know its sizes, and lets it go before the first probe."""
    import torch

    from harness.models import load_model, resolve_device, resolve_dtype
    from harness.plan import fit_methods, plan_cells, plan_methods
    from harness.spec import Sweep

    changed = dict(map(assignment, args.set or ()))
    sweep = Sweep(model=args.model, methods=args.methods, tasks=(), budgets=args.budgets, set=changed)
    planned = plan_methods(sweep)
    plan_cells(planned, args.budgets)
    place = resolve_device(args.device)
    dtype = str(resolve_dtype(args.dtype, place)).removeprefix("torch.")
    loaded = load_model(args.model, dtype=dtype, device="cpu")
    fitted = fit_methods(planned, loaded)
    longest = (args.max_tokens or loaded.context) // STEP * STEP
    if longest < STEP:
        raise HarnessError(f"a longest context of {args.max_tokens or loaded.context} is below {STEP}; raise it")
    return Target(
        model=loaded.spec.model_copy(update={"device": str(place)}),
        config=loaded.model.config.get_text_config(decoder=True),
        context=loaded.context,
        longest=longest,
        threads=args.threads or torch.get_num_threads(),
        methods={spec.label: spec for spec, _ in fitted},
        cells=plan_cells(fitted, args.budgets),
    )


def _batch_context(args: argparse.Namespace, target: Target) -> int:
    if args.context is None:
        return min(CONTEXT, target.longest)
    most = args.max_tokens or target.context
    if args.context > most:
        raise HarnessError(f"--context {args.context} exceeds {most}, the model's context or --max-tokens; lower it")
    return int(args.context)


def _least(cell: PlannedCell, longest: int, context: int) -> int:
    """The shortest context that is above the cell's budget. Raises HarnessError without one."""
    budget = cell.cell.budget
    if budget is None:
        return STEP
    if budget.resolve(context) >= context:
        raise HarnessError(f"budget {cell.budget} is not below the --context of {context} tokens; lower --budgets")
    fitting = (tokens for tokens in range(STEP, longest + 1, STEP) if budget.resolve(tokens) < tokens)
    least = next(fitting, None)
    if least is None:
        raise HarnessError(f"budget {cell.budget} is not below the longest context, {longest} tokens; lower --budgets")
    return least


def _searches(
    args: argparse.Namespace, cell: PlannedCell, target: Target, *, room: int, context: int
) -> tuple[Search, Search]:
    """The context and the batch of one method at one budget. room: bytes beside the model."""
    changed, label = dict(map(assignment, args.set or ())), cell.method.partition("[")[0]
    name = label.partition("@")[0]
    spec = ProbeSpec(
        method=label,
        set={key.partition(".")[2]: value for key, value in changed.items() if key.partition(".")[0] == name},
        budget=None if cell.cell.budget is None else str(cell.cell.budget),
        tokens=context,
        new_tokens=NEW_TOKENS,
        chunk=args.chunk,
        warm_up=False,
    )
    longer: dict[str, Any] = {"least": _least(cell, target.longest, context), "most": target.longest, "step": STEP}
    wider: dict[str, Any] = {"least": 1, "most": args.max_batch, "step": 1}
    tokens = first_guess(lambda size: target.predict(cell, tokens=size, batch=1, chunk=args.chunk), room=room, **longer)
    batch = first_guess(
        lambda size: target.predict(cell, tokens=context, batch=size, chunk=args.chunk), room=room, **wider
    )
    shared: dict[str, Any] = {"spec": spec, "method": cell.method, "params": target.methods[cell.method].params}
    return (
        Search(**shared, kind="context", first=tokens, **longer),
        Search(**shared, kind="batch", at_context=context, first=batch, **wider),
    )


def _manifest(
    args: argparse.Namespace,
    target: Target,
    command: Sequence[str],
    *,
    limit: int,
    model_bytes: int,
    in_force: tuple[str, list[str]],
) -> BoundaryManifest:
    from harness.machine import git_commit, machine, versions

    kind, notes = in_force
    if target.longest > target.context:
        notes.append(f"contexts beyond the model's {target.context} tokens are of memory alone")
    return BoundaryManifest(
        command=tuple(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=target.model,
        context=target.context,
        limit_bytes=limit,
        limit_kind=kind,
        model_bytes=model_bytes,
        threads=target.threads,
        chunk=args.chunk,
        new_tokens=NEW_TOKENS,
        timeout_s=args.timeout,
        notes=tuple(notes),
        git_commit=git_commit(),
        versions=versions(),
        machine=machine(),
    )


def _limit_in_force(prober: Restarting, limit: int, timeout_s: float) -> tuple[str, list[str]]:
    """What holds a probe, seen on a short one, and what is to be said of it."""
    from harness.limits import swap_used

    short = ProbeSpec(method="fullkv", budget=None, tokens=SHORT, new_tokens=2, warm_up=False)
    result, found = prober.ask(short, limit_bytes=limit, timeout_s=timeout_s), prober.limit
    if found is None:
        raise HarnessError(f"no probe runs under {limit} bytes: {result.error or result.status}; raise --memory-limit")
    notes = [f"limit by {found.kind}, {found.note}"] if found.note else []
    swap = swap_used()
    if swap and "swap" not in found.note:
        notes.append(f"{swap} bytes of swap are in use: the machine is short of memory, seconds mean little")
    return found.kind, notes


def _ending(records: Sequence[BoundaryRecord]) -> int:
    """1 where an answer is bounded by something else than memory."""
    lost = sum(r.found is not None and r.found.next_status in ("failed", "timeout") for r in records)
    if lost:
        _say(f"{lost} of {len(records)} searches end at a probe that failed or ran out of time, not out of memory")
    return 1 if lost else 0


def _say(line: str) -> None:
    print(f"harness: {line}", file=sys.stderr, flush=True)
