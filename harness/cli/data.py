"""`harness data fetch`: data sets of tasks, by pinned revision."""

import argparse
from collections.abc import Sequence

from harness.cli.arguments import Parser, place
from harness.errors import HarnessError


def data_parser(data: argparse.ArgumentParser) -> None:
    verbs = data.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    fetching = verbs.add_parser("fetch", help="download data sets by pinned revision; runs find them in the cache")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="longbench, squad, hotpotqa")
    fetching.add_argument("--to", type=place, metavar="DIR", help="put them in DIR/NAME, for --data-dir DIR")
    fetching.add_argument("--revision", help="branch, tag or commit instead of the pinned one")
    fetching.add_argument("--sha256", help="checksum of longbench's archive, or of the file written for the others")
    fetching.set_defaults(action=_fetch)


def _fetch(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.plan.datasets import fetch_data, hub_data

    pins = [name for name in ("revision", "sha256") if getattr(args, name) is not None]
    if pins and len(args.names) > 1:
        raise HarnessError(f"--{pins[0]} pins one data set, {len(args.names)} are named; fetch them one by one")
    for name in args.names:
        hub_data(name)  # before the first download
    for name in args.names:
        print(fetch_data(name, to=args.to, revision=args.revision, sha256=args.sha256))
    return 0
