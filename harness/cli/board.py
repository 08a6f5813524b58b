"""`harness board`: the board of stored runs, and the published boards made again from their published records."""

import argparse
from collections.abc import Sequence

from harness.boards.show import show
from harness.boards.sources import KEPT, PUBLISHED, BoardOptions, collect, options_of, published_boards
from harness.cli.arguments import RESULTS, place
from harness.errors import HarnessError


def board_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="*", type=place, help="run folders, folders of them, archives, or a published board (results)")
    add("--out", type=place, help="folder for the pages NAME.* (default: beside the records)")
    add("--name", help="file name of the board (default: board, or the published board's)")
    add("--subject", metavar="LABEL", help="method to judge against the strongest other one of each task family")
    add("--html", action="store_true", help="write NAME.html too: one page with charts and samples")
    add("--published", action="store_true", help="make every published board again, from its published records")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    if args.published:
        return _publish(args)
    given = args.runs or [RESULTS]
    named = [path.name for path in given if not path.exists() and str(path) in published_boards()]
    if missing := [path for path in given if not path.exists() and path.name not in named]:
        known = ", ".join(published_boards()) or "none here"
        raise HarnessError(f"no run in {missing[0]}: there is no such folder or archive; published boards: {known}")
    sources = collect((KEPT / path if path.name in named else path for path in given), whole=args.html)
    only = named[0] if named == [str(path) for path in given] and len(named) == 1 else None
    options = options_of(only) if only else BoardOptions()
    asked = options.model_copy(update={"html": args.html, "subject": args.subject or options.subject})
    home = given[0] if len(given) == 1 and given[0].is_dir() else RESULTS
    out = args.out or (RESULTS if only else home)
    return show(sources, out=out, name=args.name or only or "board", asked=asked)


def _publish(args: argparse.Namespace) -> int:
    if args.runs or args.name or args.subject:
        raise HarnessError("--published makes every published board; leave out folders, --name and --subject")
    if not published_boards():
        raise HarnessError("no published records here; --published needs a checkout of the project")
    out, failed = args.out or PUBLISHED, 0
    for name in published_boards():
        options, sources = options_of(name), collect([KEPT / name])
        failed |= show(sources, out=out, name=name, asked=options, quiet=True)
    return failed
