"""`harness status`: how runs are getting on, read from their folders."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import RESULTS, place, whole
from harness.errors import HarnessError

LOG_LINES = 3  # of each worker


def status_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    runs = "run folders, or a folder of them (results)"
    add("runs", nargs="*", type=place, default=[RESULTS], metavar="RUN", help=runs)
    add("--logs", nargs="?", type=whole, const=LOG_LINES, metavar="N", help=f"last lines of each worker ({LOG_LINES})")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.records.run_folder import find_runs
    from harness.run.status import log_tails, run_status

    if args.logs is not None and args.logs < 1:
        raise HarnessError(f"--logs {args.logs} shows nothing; give at least 1")
    folders = [folder for root in args.runs for folder in find_runs(root)]
    for number, folder in enumerate(folders):
        lines = [*run_status(folder), *(log_tails(folder, args.logs) if args.logs else ())]
        print(("\n" if number else "") + "\n".join(lines))
    return 0
