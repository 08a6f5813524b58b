"""`harness serve-bench`: speed and memory of a batch of prompts decoded together."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import whole
from harness.cli.bench import bench_options, run


def serve_bench_parser(parser: argparse.ArgumentParser) -> None:
    bench_options(parser)
    add = parser.add_argument
    add("--length", type=whole, default=8192, help="prompt length in tokens (8192)")
    add("--batch", type=whole, default=16, help="prompts, prefilled one at a time and decoded together (16)")
    add("--distinct", type=whole, metavar="N", help="prompts that are prefilled, not copied (all)")
    add("--rounds", type=whole, default=1, help="passes over all methods (1)")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    budgets = args.budgets or ("128",)
    return run(args, command, kind="serve-bench", lengths=(args.length,), budgets=budgets)
