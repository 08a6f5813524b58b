"""`harness boundary`: the largest context and batch that fit a memory limit."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import names, place, real, whole
from harness.errors import checked
from harness.plan.names import assignment, check_asked


def boundary_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", type=names, required=True, help="comma-separated, `name` or `name@preset`")
    add("--budgets", type=names, default=("128",), help="tokens per layer and KV head, or kept fractions (128)")
    limit = "of a probe, the model included: 4GiB, 512MiB"
    add("--memory-limit", dest="limit_bytes", required=True, metavar="SIZE", help=limit)
    add("--context", type=whole, help="tokens of each prompt of the batch search (8192, or the most)")
    add("--max-tokens", type=whole, help="longest context to try (default, and most: the model's context)")
    add("--max-batch", type=whole, default=64, help="largest batch to try (64)")
    add(
        "--distinct",
        type=whole,
        metavar="N",
        help="prompts of a batch that are prefilled, not copied (all)",
    )
    add("--chunk", type=whole, help="tokens of a prefill forward (default: the whole prompt at once)")
    add("--timeout", type=real, dest="timeout_s", default=600, metavar="SECONDS", help="of one probe (600)")
    add("--model", default="smollm2-135m", help="as in `harness bench`")
    add("--dtype", default="auto", help="as in `harness run`")
    add("--device", default="auto", help="as in `harness run`")
    add("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
    add("--resume-anyway", action="store_true", help="go on with searches of other code, packages or another machine")
    add("--set", action="append", metavar="METHOD.PARAM=VALUE", help="change a parameter of a method; repeatable")
    add("--out", type=place, default=Path("boundary"), metavar="DIR", help="folder; repeat the command to resume")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.speed.asked import BoundaryAsk

    given = {name: getattr(args, name) for name in BoundaryAsk.model_fields if name != "set"}
    ask = checked(BoundaryAsk, {**given, "set": dict(map(assignment, args.set or ()))})
    check_asked(ask)

    from harness.speed.boundary import run_boundary
    from harness.speed.client import Prober
    from leaderboards.tables.boundary import to_terminal, write_boundary

    manifest, records = run_boundary(
        ask, out=args.out, command=command, prober=Prober, resume_anyway=args.resume_anyway
    )
    print(to_terminal(records, manifest))
    for path in write_boundary(args.out):
        print(f"wrote {path}", file=sys.stderr)
    lost = sum(r.found is not None and r.found.next_status in ("failed", "timeout") for r in records)
    if lost:
        what = f"{lost} of {len(records)} searches end at a probe that failed or ran out of time, not out of memory"
        print(f"harness: {what}", file=sys.stderr)
    return 1 if lost else 0
