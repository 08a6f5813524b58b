"""`harness bench`: speed and memory of methods, each by itself."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cli.arguments import names, numbers, place, real, whole
from harness.errors import checked
from harness.plan.names import assignment, check_asked


def bench_parser(parser: argparse.ArgumentParser) -> None:
    bench_options(parser)
    add = parser.add_argument
    add("--lengths", type=numbers, help="prompt lengths in tokens (2048,8192)")
    add("--batch", type=whole, help="prompts decoded together (1)")
    add("--rounds", type=whole, help="passes over all methods; medians and spread are over them (3)")
    parser.set_defaults(action=run)


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Options of both kinds of bench."""
    add = parser.add_argument
    add("--methods", type=names, required=True, help="comma-separated, `name` or `name@preset`; add fullkv for ratios")
    add("--budgets", type=names, help="tokens per layer and KV head, or kept fractions")
    add("--new-tokens", type=whole, help="tokens generated for each prompt (32)")
    add("--chunk", type=whole, help="tokens of a prefill forward (default: the whole prompt at once)")
    add("--memory-limit", dest="limit_bytes", metavar="SIZE", help="of a probe, with the model: 4GiB")
    add("--no-warm-up", dest="warm_up", action="store_false", default=None, help="count the first round too")
    add("--model", help="as in `harness run`, or shape:llama-3-8b, shape:FOLDER: random weights")
    add("--dtype", help="as in `harness run`")
    add("--device", help="as in `harness run`")
    add("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
    add("--timeout", type=real, dest="timeout_s", metavar="SECONDS", help="of one probe (1800)")
    add("--resume-anyway", action="store_true", help="go on with a bench of other code or packages")
    add("--set", action="append", metavar="METHOD.PARAM=VALUE", help="change a parameter of a method; repeatable")
    add("--out", type=place, default=Path("benches"), help="folder of bench folders (default: benches)")


def run(args: argparse.Namespace, command: Sequence[str], **fixed: Any) -> int:
    """Run a bench and print its table. fixed: options that the command sets itself."""
    from harness.speed.asked import BenchAsk

    given = {name: getattr(args, name, None) for name in BenchAsk.model_fields}
    given |= {"set": dict(map(assignment, args.set or ())), **fixed}
    ask = checked(BenchAsk, {name: value for name, value in given.items() if value is not None})
    check_asked(ask)

    from harness.records.bench_folder import load_bench
    from harness.speed.bench import run_bench
    from harness.speed.client import Prober
    from leaderboards.tables.speed import to_terminal, write_speed

    folder = run_bench(ask, root=args.out, command=command, prober=Prober, resume_anyway=args.resume_anyway)
    manifest, records = load_bench(folder)
    print(to_terminal(records, manifests=[manifest]))
    for path in write_speed(records, folder, "bench", manifests=[manifest]):
        print(f"wrote {path}", file=sys.stderr)
    lost = sum(record.status in ("failed", "timeout") for record in records)
    if lost:
        advice = "repeat the command to try them again"
        if any(record.status == "timeout" for record in records):
            advice += ", with a longer --timeout"
        print(f"harness: {lost} of {len(records)} probes failed or ran out of time; {advice}", file=sys.stderr)
    return 1 if lost else 0
