"""The board of some records, written beside them and printed."""

import sys
from pathlib import Path

from harness.boards.sources import BoardOptions, Sources
from harness.errors import HarnessError
from harness.records.record import Record


def show(sources: Sources, *, out: Path, name: str, asked: BoardOptions, quiet: bool = False) -> int:
    """Write the board of some records, and print it unless `quiet`; returns 1 when a cell failed.

    Raises HarnessError when there is no record, and as the writers do.
    """
    from leaderboards.tables.files import checked_place

    records = sources.records
    if not records and not sources.benches and not sources.boundaries:
        raise HarnessError(f"no records for {name}; run a benchmark first")
    out = checked_place(out, name)  # before the tables are made
    if sources.manifests:
        pages = _scores(sources, out=out, name=name, asked=asked, quiet=quiet)
    else:
        pages = _speed(sources, out=out, name=name, quiet=quiet)
    for path in pages:
        print(f"wrote {path}", file=sys.stderr)
    if failed := sum(record.status == "failed" for record in records):
        told = f"{failed} of {len(records)} cells failed; repeat the command to try them again"
        print(f"harness: {told}", file=sys.stderr)
    return 1 if failed else 0


def _scores(sources: Sources, *, out: Path, name: str, asked: BoardOptions, quiet: bool) -> list[Path]:
    from leaderboards.stats.aggregate import aggregate
    from leaderboards.tables.board import to_terminal, write_board
    from leaderboards.tables.picture import write_picture

    manifests = sources.manifests
    tables = aggregate(sources.records, manifests=manifests, subject=asked.subject, frontiers=asked.frontiers)
    pages = write_board(tables, out, name, manifests=manifests)
    pages.append(write_picture(tables, out, name))
    if asked.html:
        from harness.boards.compiled_tables import table_maps_of
        from leaderboards.pages.page import Extras, write_page
        from leaderboards.pages.parts import find_searches

        extras = Extras(find_searches(sources.boundaries), *table_maps_of(manifests))
        full = [
            record for record in sources.records if isinstance(record, Record)
        ]  # all are: they were collected whole
        pages.append(write_page(tables, full, out, name, manifests=manifests, extras=extras))
    if not quiet:  # last: a terminal that cannot show it costs no page
        print(to_terminal(tables, manifests=manifests))
    return pages


def _speed(sources: Sources, *, out: Path, name: str, quiet: bool) -> list[Path]:
    from leaderboards.tables import boundary, speed

    pages: list[Path] = []
    if sources.benches:
        manifests = [manifest for manifest, _ in sources.benches]
        records = [record for _, stored in sources.benches for record in stored]
        pages += speed.write_speed(records, out, name, manifests=manifests)
    for number, folder in enumerate(sources.boundaries):
        pages += boundary.write_boundary(folder, out, f"{name}.frontier{number or ''}")
    if sources.benches and not quiet:
        print(speed.to_terminal(records, manifests=manifests))
    return pages
