"""`harness simulate` on the command line: how long a sweep would take on a cluster, from a run that was recorded."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.arguments import names, numbers
from harness.errors import HarnessError
from harness.plan.options import assignment

if TYPE_CHECKING:
    from harness.records.record import RunManifest
    from harness.simulate.pool import Costs
    from harness.simulate.simulate import SimulatedRun
    from harness.simulate.workload import Work

KINDS = ("longbench", "ruler", "recorded")
MOST = 100_000  # workers
ITEM_TIMEOUT_S = 3600.0  # of `harness run --ray` unless it is asked for another


def simulate_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `harness simulate`."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_FOLDER", help="a run folder; its seconds are what is simulated")
    add("--nodes", type=int, default=1, help="of the cluster (1)")
    add("--gpus", type=int, default=1, help="of each node, one worker each (1)")
    add(
        *("--tasks",),
        type=names,
        default=("longbench", "ruler"),
        help="longbench, ruler: the official samples, in fitted seconds (both); recorded: the items of the run itself",
    )
    add("--lengths", type=numbers, help="RULER's lengths in tokens (4096,8192,...,131072)")
    add("--max-tokens", type=int, default=131072, help="prompt and generation together (131072)")
    add(
        "--speedup", type=float, default=1.0, help="recorded seconds over those of the model and device planned for (1)"
    )
    add("--start-seconds", type=float, default=60.0, help="from a worker's start until its model is loaded (60)")
    add("--mtbf-hours", type=float, help="mean hours between losses of a node (default: none is lost)")
    add("--node-seconds", type=float, default=0.0, help="until there is another node for a lost one (0)")
    add("--cost", action="append", metavar="NAME=SECONDS", help="change what something costs the driver; repeatable")
    add("--seed", type=int, default=42, help="of drawn lengths, fit residuals and node losses (42)")
    parser.set_defaults(action=_action)


@dataclass(frozen=True)
class _Plan:
    """What is simulated, and lines that say so."""

    work: Sequence[Work]
    lines: Sequence[str]


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.simulate.pool import Cluster
    from harness.simulate.simulate import saturation, simulate, sizes, table

    _check(args)
    costs = _costs(args.cost or ())
    plan = _plan(args)
    mtbf_s = None if args.mtbf_hours is None else args.mtbf_hours * 3600
    cluster = Cluster(start_s=args.start_seconds, mtbf_s=mtbf_s, node_s=args.node_seconds, seed=args.seed)
    print("\n".join(plan.lines))
    print("\n".join(_cluster_lines(args, costs)), end="\n\n", flush=True)
    start, outcomes = time.process_time(), []
    for nodes, gpus in sizes(args.nodes, args.gpus):
        outcomes.append(simulate(plan.work, replace(cluster, nodes=nodes, gpus=gpus), costs))
    print(table(outcomes), end="\n\n")
    print(saturation(outcomes))
    for line in _warnings(outcomes):
        print(line)
    print(f"simulated in {time.process_time() - start:.1f} s of CPU time", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises HarnessError for the first option that is out of range."""
    least = {"nodes": 1, "gpus": 1, "max_tokens": 1024, "start_seconds": 0, "node_seconds": 0, "seed": 0}
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise HarnessError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range; give at least {low}")
    for name in ("speedup", "mtbf_hours"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise HarnessError(f"--{name.replace('_', '-')} {value:g} is out of range; give a number above 0")
    if args.nodes * args.gpus > MOST:
        raise HarnessError(f"{args.nodes} x {args.gpus} workers are more than {MOST:,}; lower --nodes or --gpus")
    unknown = next((name for name in args.tasks if name not in KINDS), None)
    if unknown is not None or not args.tasks or ("recorded" in args.tasks and len(set(args.tasks)) > 1):
        asked = ",".join(args.tasks)
        raise HarnessError(f"--tasks {asked!r} cannot be simulated; give longbench, ruler, both of them, or recorded")
    bad = next((length for length in args.lengths or () if not 1024 <= length <= args.max_tokens), None)
    if bad is not None:
        raise HarnessError(f"--lengths {bad} is out of range; give 1024 to --max-tokens {args.max_tokens}")


def _costs(given: Iterable[str]) -> Costs:
    from harness.simulate.pool import Costs

    known = asdict(Costs())
    for text in given:
        if "=" not in text:
            raise HarnessError(f"--cost {text} has no seconds; write record_s=0.001")
        name, value = assignment(text)
        if name not in known:
            raise HarnessError(f"--cost {name} is none of {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise HarnessError(f"--cost {text} is no number of seconds; give 0 or more")
        known[name] = float(value)
    return Costs(**known)


def _plan(args: argparse.Namespace) -> _Plan:
    from harness.records.run_folder import RUNS, load_run
    from harness.simulate.workload import as_recorded, extrapolated, fit, recorded_items

    manifest, records = load_run(args.run)
    if not records:
        raise HarnessError(f"no records in {args.run}; run a benchmark first")
    items = recorded_items(records, manifest.spec.query)
    log = args.run / RUNS.records_file
    line_bytes = log.stat().st_size / max(1, log.read_bytes().count(b"\n"))
    lines = _recorded_lines(manifest, items=len(items), records=len(records), line_bytes=line_bytes)
    if "recorded" in args.tasks:
        work = as_recorded(items, line_bytes=line_bytes, speedup=args.speedup)
        return _Plan(work, [*lines, *_planned_lines(args, work, "the recorded items")])
    fitted = fit(items)
    prompts, said = _prompts(args)
    work = extrapolated(prompts, items, fitted, line_bytes=line_bytes, speedup=args.speedup, seed=args.seed)
    return _Plan(work, [*lines, *fitted.lines(), *_planned_lines(args, work, said), *_assumptions(args)])


def _prompts(args: argparse.Namespace) -> tuple[list[tuple[int, int]], str]:
    """The samples of the full tasks, and how they are called."""
    from harness.simulate.workload import LENGTHS, longbench, ruler

    prompts, said = list[tuple[int, int]](), []
    if "longbench" in args.tasks:
        prompts += longbench(max_tokens=args.max_tokens, seed=args.seed)
        said.append(f"LongBench's {len(prompts):,} samples")
    if "ruler" in args.tasks:
        lengths = args.lengths or [length for length in LENGTHS if length <= args.max_tokens]
        generated = list(ruler(lengths=lengths))
        prompts += generated
        said.append(f"RULER's {len(generated):,} samples of {', '.join(map(str, lengths))} tokens")
    if not prompts:
        raise HarnessError(f"--max-tokens {args.max_tokens} is below every length of RULER; raise it or give --lengths")
    return prompts, " and ".join(said)


def _recorded_lines(manifest: RunManifest, *, items: int, records: int, line_bytes: float) -> list[str]:
    model = manifest.spec.model
    return [
        f"recorded: run {manifest.run_id}, {model.name} in {model.dtype} on {model.device}: {items} items, "
        f"{records} records of {line_bytes:,.0f} bytes, {manifest.cells} cells a sample",
    ]


def _planned_lines(args: argparse.Namespace, work: Sequence[Work], said: str) -> list[str]:
    from harness.simulate.workload import ID_BYTES

    tokens, seconds = sum(item.tokens for item in work), [item.seconds for item in work]
    return [
        f"planned: {said}: {len(work):,} items, {sum(item.records for item in work):,} records, {tokens:,} prompt "
        f"tokens ({ID_BYTES * tokens / 1e9:.3g} GB of ids in the driver's memory, their text not counted)",
        f"seconds of an item: {min(seconds):.3g} to {max(seconds):.3g}, {sum(seconds) / len(work):.3g} in the mean, "
        f"{sum(seconds) / 3600:,.1f} GPU-hours together",
        f"these are seconds of the recorded model and device divided by --speedup {args.speedup:g}, your factor "
        "between them and what is planned; no run of an 8B model is recorded with this project: give one as RUN_FOLDER",
    ]


def _assumptions(args: argparse.Namespace) -> list[str]:
    from harness.simulate.workload import CUT, SPREAD, TOKENS_PER

    per = ", ".join(f"{tokens:g} {language}" for language, tokens in TOKENS_PER.items())
    lines = [
        "assumed: the recorded cells; every sample generates as many tokens as its task allows; the fit holds beyond "
        "the recorded lengths; what an item is off from it by is drawn from the recorded items"
    ]
    if "longbench" in args.tasks:
        lines.append(
            "assumed: LongBench's lengths are lognormal around each dataset's official mean with a spread of "
            f"{SPREAD:g}; tokens a word (zh: a character) {per}; cut at {args.max_tokens - CUT:,} tokens"
        )
    return lines


def _cluster_lines(args: argparse.Namespace, costs: Costs) -> list[str]:
    said = ", ".join(f"{name} {value:.3g}" for name, value in asdict(costs).items())
    losses = "no node is lost"
    if args.mtbf_hours is not None:
        losses = f"a node is lost every {args.mtbf_hours:g} h in the mean, another comes after {args.node_seconds:g} s"
    return [
        f"driver, in seconds, measured where not given with --cost: {said}",
        f"assumed: workers start in {args.start_seconds:g} s, {losses}; seed {args.seed}",
    ]


def _warnings(outcomes: Sequence[SimulatedRun]) -> list[str]:
    longest, lines = outcomes[-1].longest_s, []
    if longest > ITEM_TIMEOUT_S:
        lines.append(
            f"note: the longest item takes {longest:,.0f} s; `harness run --ray` takes an item that long for hung "
            f"unless --item-timeout is above it ({ITEM_TIMEOUT_S:g})"
        )
    if any(outcome.given_up for outcome in outcomes):
        given_up: Mapping[str, int] = {f"{o.cluster.nodes} x {o.cluster.gpus}": o.given_up for o in outcomes}
        said = ", ".join(f"{count} at {size}" for size, count in given_up.items() if count)
        lines.append(f"note: items given up because their nodes kept being lost: {said}")
    return lines
