"""`harness board`: the board of stored runs, and the published boards made again from their published records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.boards.sources import KEPT, PUBLISHED, Sources, collect, options_of, published_boards
from harness.errors import HarnessError
from harness.records.record import Record

RESULTS = Path("results")


def board_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `harness board`."""
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run folders, folders of them, archives, or a published board (results)")
    add("--out", type=Path, help="folder for the pages NAME.* (default: beside the records)")
    add("--name", help="file name of the board (default: board, or the published board's)")
    add("--subject", metavar="LABEL", help="method to judge against the strongest other one of each task family")
    add("--html", action="store_true", help="write NAME.html too: one page with charts and samples")
    add("--published", action="store_true", help="make every published board again, from its published records")
    parser.set_defaults(action=_board)


def _board(args: argparse.Namespace, command: Sequence[str]) -> int:
    if args.published:
        return _publish(args)
    asked = args.runs or [RESULTS]
    named = [path.name for path in asked if not path.exists() and str(path) in published_boards()]
    if missing := [path for path in asked if not path.exists() and path.name not in named]:
        known = ", ".join(published_boards()) or "none here"
        raise HarnessError(f"no run in {missing[0]}: there is no such folder or archive; published boards: {known}")
    sources = collect((KEPT / path if path.name in named else path for path in asked), whole=args.html)
    only = named[0] if named == [str(path) for path in asked] and len(named) == 1 else None
    subject = args.subject or (options_of(only).subject if only else None)
    home = asked[0] if len(asked) == 1 and asked[0].is_dir() else RESULTS
    out = args.out or (RESULTS if only else home)
    return show(sources, out=out, name=args.name or only or "board", subject=subject, html=args.html)


def _publish(args: argparse.Namespace) -> int:
    if args.runs or args.name or args.subject:
        raise HarnessError("--published makes every published board; leave out folders, --name and --subject")
    if not published_boards():
        raise HarnessError("no published records here; --published needs a checkout of the project")
    out, failed = args.out or PUBLISHED, 0
    for name in published_boards():
        options, sources = options_of(name), collect([KEPT / name])
        failed |= show(sources, out=out, name=name, subject=options.subject, html=options.html, quiet=True)
    return failed


def show(sources: Sources, *, out: Path, name: str, subject: str | None, html: bool, quiet: bool = False) -> int:
    """Write the board of some records, and print it unless `quiet`; returns 1 when a cell failed.

    Raises HarnessError when there is no record, and as the writers do.
    """
    records, manifests = sources.records, sources.manifests
    if not records and not sources.benches and not sources.boundaries:
        raise HarnessError(f"no records for {name}; run a benchmark first")
    pages = _scores(sources, out=out, name=name, subject=subject, html=html, quiet=quiet) if manifests else []
    if not manifests:
        pages += _speed(sources, out=out, name=name, quiet=quiet)
    for path in pages:
        print(f"wrote {path}", file=sys.stderr)
    failed = sum(record.status == "failed" for record in records)
    if failed:
        advice = "repeat the command to try them again"
        print(f"harness: {failed} of {len(records)} cells failed; {advice}", file=sys.stderr)
    return 1 if failed else 0


def _scores(sources: Sources, *, out: Path, name: str, subject: str | None, html: bool, quiet: bool) -> list[Path]:
    from leaderboards.stats.aggregate import aggregate
    from leaderboards.tables.board import to_terminal, write_board
    from leaderboards.tables.picture import write_picture

    records, manifests = sources.records, sources.manifests
    tables = aggregate(records, manifests=manifests, subject=subject)
    if not quiet:
        print(to_terminal(tables, manifests=manifests))
    pages = write_board(tables, out, name, manifests=manifests)
    pages.append(write_picture(tables, out, name))
    if html:
        from harness.boards.compiled_tables import table_maps_of
        from leaderboards.pages.boundary import find_searches
        from leaderboards.pages.page import Extras, write_page

        extras = Extras(find_searches(sources.boundaries), *table_maps_of(manifests))
        full = [record for record in records if isinstance(record, Record)]  # all are: they were collected whole
        pages.append(write_page(tables, full, out, name, manifests=manifests, extras=extras))
    return pages


def _speed(sources: Sources, *, out: Path, name: str, quiet: bool) -> list[Path]:
    from leaderboards.tables import boundary, speed

    pages: list[Path] = []
    if sources.benches:
        manifests = [manifest for manifest, _ in sources.benches]
        records = [record for _, stored in sources.benches for record in stored]
        if not quiet:
            print(speed.to_terminal(records, manifests=manifests))
        pages += speed.write_speed(records, out, name, manifests=manifests)
    for number, folder in enumerate(sources.boundaries):
        pages += boundary.write_boundary(folder, out, f"{name}.frontier{number or ''}")
    return pages
