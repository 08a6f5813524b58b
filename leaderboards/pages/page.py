"""A board as one self-contained HTML page: opens from a file, loads nothing, and needs no script to be read.

Charts are drawn beforehand (`leaderboards.pages.charts`); a small script sorts, filters, picks out methods and shows
samples. Of a prompt its end is stored, and shown. Everything from records and manifests is untrusted: it is escaped,
or plain JSON that the script sets as text. The content policy allows the page's own script and style, by their hashes,
and nothing else. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import isnan
from pathlib import Path
from string import Template
from typing import Any

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.run_folder import write_text
from leaderboards.pages.html import data, element, text
from leaderboards.pages.maps import TableMap, table_maps
from leaderboards.pages.memory import Search, frontiers
from leaderboards.pages.parts import best_by_task, chart_list, heat_list, others, rivals
from leaderboards.pages.runs import runs_of, sections
from leaderboards.pages.samples import browsable, heat_maps
from leaderboards.pages.table import memory, ranking, verdicts
from leaderboards.stats.aggregate import Table
from leaderboards.stats.comparable import one_per_key, split_by_axes
from leaderboards.tables.board import heading, how_to_read
from leaderboards.text import clean

FILTERS = {"model": "Model", "dtype": "Dtype", "query": "Query mode", "first_token": "First token"}
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
NOTHING = "<p>No records for it.</p>"


@dataclass(frozen=True)
class Extras:
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
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise HarnessError(f"board name {name!r} is no file name; use letters, digits, '.', '-' and '_'")
    path = Path(out_dir) / f"{name}.html"
    page = to_html(tables, records, title=name, manifests=manifests, extras=extras)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot create {path.parent}: {error.strerror}; choose another folder") from None
    write_text(path, page)
    return path


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
    every = list(groups.values())
    chosen = [one_per_key(group)[0] for group in every]
    run_ids = sorted({r.run_id for group in every for r in group})
    style, script = _asset("board.css"), _asset("board.js")
    shown = _sections(tables, chosen, extras or Extras())
    notes = [*(extras.remarks if extras else ()), *(line for table in tables for line in _notes(table))]
    return Template(_asset("board.html")).substitute(
        policy=POLICY.format(script=script_hash(script), style=script_hash(style)),
        title=text(title),
        style=style,
        script=script,
        facts=_facts(tables),
        verdicts=_each(tables, [verdicts(table) for table in tables]),
        filters=_filters(tables),
        ranking=ranking(tables, runs_of(every, run_ids)),
        nav="".join(f'<a href="#{name}">{SECTIONS[name][1]}</a> ' for name in shown),
        best=shown.pop("best", ""),
        parts="".join(shown.values()),
        notes="".join(f"<li>{text(line, longest=600)}</li>" for line in notes) or "<li>None.</li>",
        runs=sections(run_ids, manifests),
        help="".join(f"<li>{text(line, longest=1000)}</li>" for line in how_to_read(tables)),
        data=data("tasks", _tasks(tables))
        + data("samples", {"tables": [heading(table) for table in tables], "samples": browsable(chosen)}),
    )


def _asset(name: str) -> str:
    return (files("leaderboards.pages") / "assets" / name).read_text(encoding="utf-8")


def script_hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _facts(tables: Sequence[Table]) -> str:
    methods = {method for table in tables for method in table.rows["method"]}
    tasks = {task for table in tables for task in table.tasks["task"]}
    models = sorted({table.axes.model for table in tables})
    samples = sum(table.samples for table in tables)
    return text(f"{', '.join(models)} · {len(methods)} methods · {len(tasks)} tasks · {samples} samples", longest=400)


def _sections(tables: Sequence[Table], chosen: Sequence[Sequence[Record]], extras: Extras) -> dict[str, str]:
    """Those of `SECTIONS` that have something to show."""
    heat = "Mean score, 0-100. Across: depth of the needle in % of the haystack. Down: length in tokens."
    needles = _each(tables, [heat_list(heat_maps(own)) for own in chosen])
    inside = {
        "best": _each(tables, [best_by_task(table) for table in tables]),
        "charts": _each(tables, [chart_list(table, salt=f"chart-{i}") for i, table in enumerate(tables)]) or NOTHING,
        "rivals": _each(tables, [rivals(table) for table in tables]),
        "needles": f"<p>{heat}</p>{needles}" if needles else "",
        "frontier": frontiers(extras.searches),
        "maps": table_maps(extras.maps),
        "more": _each(tables, [others(table) for table in tables]),
    }
    return {
        name: f'<section id="{name}"><h2>{SECTIONS[name][0]}</h2>{html}</section>'
        for name, html in inside.items()
        if html
    }


def _each(tables: Sequence[Table], parts: Sequence[str]) -> str:
    """The part of each table that has one, below the table's heading where there are several tables."""
    heads = [element("h3", text(heading(table)), {}) if len(tables) > 1 else "" for table in tables]
    return "".join(
        f'<div class="of" data-table="{i}">{head}{part}</div>'
        for i, (head, part) in enumerate(zip(heads, parts, strict=True))
        if part
    )


def _filters(tables: Sequence[Table]) -> str:
    """A choice per axis that has several values, the budgets, the tasks, and a part of a method's name."""
    choices = {FILTERS[name]: sorted({str(getattr(table.axes, name)) for table in tables}) for name in FILTERS}
    choices["Memory"] = sorted({memory(row) for table in tables for row in table.rows.to_dict("records")})
    ids = dict(zip(choices, [*FILTERS, "memory"], strict=True))
    parts = [_select(f"f-{ids[label]}", label, values, "all") for label, values in choices.items() if values[1:]]
    budgets = list(dict.fromkeys(b for table in tables for b in table.rows["budget"]))
    tasks = sorted({task for table in tables for task in table.tasks["task"]})
    parts += [_select("f-budget", "Budget", budgets, "all"), _select("f-task", "Task", tasks, "mean of all tasks")]
    parts.append('<label>Method <input id="f-method" type="search" placeholder="part of a name"></label>')
    parts.append('<label class="check"><input id="f-more" type="checkbox"> All columns</label>')
    fixed = [f"{label}: {values[0]}" for label, values in choices.items() if not values[1:]]
    return "".join(parts) + element("p", text(" · ".join(fixed)), {"class": "fixed"})


def _select(name: str, label: str, values: Sequence[str], every: str) -> str:
    options = "".join(element("option", text(value), {"value": value}) for value in values)
    return f'<label>{label} <select id="{name}"><option value="">{every}</option>{options}</select></label>'


def _notes(table: Table) -> list[str]:
    return [
        f"{note.method} at {', '.join(note.budgets)}: {clean(note.what)} ({note.count} records)"
        + (f"; first error: {clean(note.error)}" if note.error else "")
        for note in table.notes
    ]


def _tasks(tables: Sequence[Table]) -> list[dict[str, list[Any]]]:
    """For each row of the ranking: task to mean score (None without one), samples scored and samples expected."""
    found: list[dict[str, list[Any]]] = []
    for table in tables:
        rows: dict[tuple[str, str], dict[str, list[Any]]] = {}
        for row in table.tasks.to_dict("records"):
            mean = row["score_points_mean"]
            value = [None if isnan(mean) else round(mean, 4), row["n_ok"], row["n_expected"]]
            rows.setdefault((row["budget"], row["method"]), {})[clean(row["task"])] = value
        found += [rows[row["budget"], row["method"]] for row in table.rows.to_dict("records")]
    return found
