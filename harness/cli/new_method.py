"""`harness new-method NAME`: files to start a method from."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import place
from harness.new_method.kinds import KINDS


def new_method_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the method, an identifier in lower case")
    kind = "what it is to do: " + "; ".join(f"{name}, {one.what}" for name, one in KINDS.items())
    parser.add_argument("--kind", choices=KINDS, default="score", help=kind)
    where = "checkout, or folder for the package (default: here)"
    parser.add_argument("--to", type=place, default=Path(), metavar="DIR", help=where)
    parser.set_defaults(action=_new_method)


def _new_method(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.new_method.write import new_method

    for path in new_method(args.name, where=args.to, kind=args.kind):
        print(f"wrote {path}")
    return 0
