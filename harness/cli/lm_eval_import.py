"""`harness lm-eval-import`: results of lm-eval as runs of this store."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import RESULTS, place


def lm_eval_import_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", type=place, metavar="RESULTS_DIR", help="the --output_path of runs with --log_samples")
    add("--out", type=place, default=RESULTS, help="folder of run folders (default: results)")
    add("--metric", help="metric that is the score (default: of each sample the first in [0, 1])")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.lm_eval.import_results import import_results

    for folder, records in import_results(args.results, root=args.out, metric=args.metric, command=command):
        print(f"wrote {folder}: {records} records; show them with `harness board {folder}`")
    return 0
