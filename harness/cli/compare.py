"""`harness compare`: what differs between two runs, row by row."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import place

EXITS = "Ends with 0 whether or not they differ, and with 2 for a bad folder or two runs without a row in common."


def compare_parser(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXITS
    add = parser.add_argument
    add("first", type=place, metavar="RUN", help="run folder, archive, or published board of one run")
    add("second", type=place, metavar="RUN", help="what is set against it; differences are second less first")
    add("--csv", type=place, metavar="FILE", help="write the rows as CSV too")
    add("--json", type=place, metavar="FILE", help="write everything as JSON too")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.boards.sources import one_run
    from harness.records.run_folder import write_text
    from leaderboards.stats.two_runs import compare_runs
    from leaderboards.tables.two_runs import to_csv, to_json, to_terminal

    first, second = one_run(args.first), one_run(args.second)
    found, manifests = compare_runs(first, second), (first[0], second[0])
    if args.csv is not None:
        write_text(args.csv, to_csv(found))
    if args.json is not None:
        write_text(args.json, to_json(found, manifests))
    print(to_terminal(found, manifests))
    return 0
