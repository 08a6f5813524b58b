"""A board as one self-contained HTML page: opens from a file, loads nothing, and needs no script to be read.

Charts are drawn beforehand (`leaderboards.pages.charts`); a small script sorts, filters, picks out methods and shows
samples. Of a prompt its end is stored, and shown. Everything from records and manifests is untrusted: it is escaped,
or plain JSON that the script sets as text. The content policy allows the page's own script and style, by their hashes,
and nothing else. The same input gives the same bytes. The markup is in `templates`; here is what it is filled with.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from leaderboards.pages.heats import TableMap, shaded_tables
from leaderboards.pages.html import render
from leaderboards.pages.parts import Search, boundary_pictures, table_parts
from leaderboards.pages.ranking import choices, ranking
from leaderboards.pages.runs import run_facts, runs_of
from leaderboards.pages.samples import browsable
from leaderboards.stats.aggregate import Table
from leaderboards.stats.comparable import one_per_key, split_by_axes
from leaderboards.stats.ranks import is_ranked
from leaderboards.tables.board import heading, notes_of
from leaderboards.tables.files import write_files
from leaderboards.tables.legend import how_to_read
from leaderboards.text import clean

SECTIONS = {
    "best": ("Best by task", "By task"),
    "charts": ("Charts", "Charts"),
    "rivals": ("Against the strongest others", "Rivals"),
    "needles": ("Needles by depth and length", "Needles"),
    "frontier": ("What fits under a memory limit", "Memory limit"),
    "maps": ("Compiled tables", "Compiled tables"),
    "more": ("More tables", "More tables"),
}
"""Id, title and short title of the sections that are there when they have something to show, in their order."""
POLICY = "default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"


class Extras(NamedTuple):
    """What a page shows beside its records: memory searches, compiled tables, and remarks about either."""

    searches: Sequence[Search] = ()
    maps: Sequence[TableMap] = ()
    remarks: Sequence[str] = ()


def write_page(
    tables: Sequence[Table],
    records: Iterable[Record],
    out_dir: Path,
    name: str,
    *,
    manifests: Sequence[RunManifest],
    extras: Extras | None = None,
) -> Path:
    """Write `<name>.html` into `out_dir` and return its path.

    Raises HarnessError when `name` is no file name, there is no table, or the file cannot be written.
    """
    page = to_html(tables, records, title=name, manifests=manifests, extras=extras)
    return write_files(out_dir, name, {"html": page})[0]


def to_html(
    tables: Sequence[Table],
    records: Iterable[Record],
    *,
    title: str,
    manifests: Sequence[RunManifest] = (),
    extras: Extras | None = None,
) -> str:
    """The page of the tables that `aggregate` makes of these records and manifests.

    Raises HarnessError when there is no table, or the tables are of other records or manifests.
    """
    groups = split_by_axes(records, manifests=manifests)
    if not tables or [table.axes for table in tables] != list(groups):
        raise HarnessError(f"{len(tables)} tables for records of {len(groups)}; give aggregate's own tables")
    every, extras = list(groups.values()), extras or Extras()
    chosen = [one_per_key(group, manifests=manifests).records for group in every]
    run_ids = sorted({r.run_id for group in every for r in group})
    style, script = _asset("board.css"), _asset("board.js")
    several = len(tables) > 1
    parts = [table_parts(i, table, chosen[i], several=several) for i, table in enumerate(tables)]
    return render(
        "board.html",
        policy=POLICY.format(script=script_hash(script), style=script_hash(style)),
        title=title,
        style=style,
        script=script,
        facts=_facts(tables),
        tables=parts,
        sections=_sections(parts, extras),
        asked=choices(tables),
        any_rank=any(is_ranked(table.rows) for table in tables),
        ranked=ranking(tables, runs_of(every, run_ids)),
        boundaries=boundary_pictures(extras.searches),
        maps=shaded_tables(extras.maps),
        notes=[*extras.remarks, *(line for table in tables for line in notes_of(table))],
        runs=run_facts(run_ids, manifests),
        help=how_to_read(tables),
        task_means=_task_means(tables),
        samples={"tables": [heading(table) for table in tables], "samples": browsable(chosen)},
    )


def _asset(name: str) -> Markup:
    return Markup((files("leaderboards.pages") / "assets" / name).read_text(encoding="utf-8"))


def script_hash(source: str) -> str:
    """The source of a script or style as a content policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _facts(tables: Sequence[Table]) -> str:
    methods = {method for table in tables for method in table.rows["method"]}
    tasks = {task for table in tables for task in table.tasks["task"]}
    models = sorted({f"{table.axes.model}, {table.axes.dtype} on {table.axes.processor}" for table in tables})
    samples = sum(table.samples for table in tables)
    return f"{'; '.join(models)} · {len(methods)} methods · {len(tasks)} tasks · {samples} samples"


def _sections(parts: Sequence[Mapping[str, Any]], extras: Extras) -> dict[str, tuple[str, str]]:
    """The sections that have something to show; the charts are there and say it where they have nothing."""
    there = {"charts": True, "frontier": bool(extras.searches), "maps": bool(extras.maps)}
    there |= {name: any(part[name] for part in parts) for name in ("best", "rivals", "needles", "more")}
    return {name: titles for name, titles in SECTIONS.items() if there[name]}


def _task_means(tables: Sequence[Table]) -> list[dict[str, list[Any]]]:
    """For each row of the ranking: task to mean score (None without one), samples scored and samples expected."""
    found: list[dict[str, list[Any]]] = []
    for table in tables:
        rows: dict[tuple[str, str], dict[str, list[Any]]] = {}
        for row in table.tasks.to_dict("records"):
            mean = None if isnan(row["score_points_mean"]) else round(row["score_points_mean"], 4)
            of_row = rows.setdefault((row["budget"], row["method"]), {})
            of_row[clean(row["task"])] = [mean, row["n_ok"], row["n_expected"]]
        found += [rows[row["budget"], row["method"]] for row in table.rows.to_dict("records")]
    return found
