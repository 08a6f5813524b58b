"""`harness export`: records as Parquet, results as a model card."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import RESULTS, place
from harness.errors import HarnessError


def export_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "run",
        type=place,
        nargs="?",
        default=RESULTS,
        metavar="RUN",
        help="run folder, or a folder of them (results)",
    )
    add("--parquet", type=place, metavar="FILE", help="one row per record")
    add("--card", type=place, metavar="FILE", help="results for a Hugging Face model card; JSON or YAML by its name")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from leaderboards.tables.frame import load, to_parquet, write_card

    if args.parquet is None and args.card is None:
        raise HarnessError("nothing to write; add --parquet FILE or --card FILE")
    frame = load(args.run)
    if args.parquet is not None:
        to_parquet(frame, args.parquet)
        print(f"wrote {args.parquet}: {len(frame):,} rows, {len(frame.columns)} columns")
    if args.card is not None:
        print(f"wrote {args.card}: {write_card(frame, args.card)} results")
    return 0
