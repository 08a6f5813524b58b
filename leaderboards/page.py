"""A board as one self-contained HTML page: opens from a file, loads nothing, and needs no script to be read.

Charts are drawn beforehand (`leaderboards.page_charts`); a small script sorts, filters, picks out methods and shows
samples. Prompts are not stored, so none are shown. Everything from records and manifests is untrusted: it is escaped,
or plain JSON that the script sets as text. The content policy allows the page's own script and style, by their hashes,
and nothing else. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from math import isnan
from pathlib import Path
from string import Template
from typing import Any

from harness.errors import HarnessError
from harness.records import Record, RunManifest
from harness.store import write_text
from leaderboards.aggregate import Table
from leaderboards.axes import one_per_key, split_by_axes
from leaderboards.page_charts import Chart, charts, keys
from leaderboards.page_runs import runs_of, sections
from leaderboards.page_samples import Heat, browsable, heat_maps
from leaderboards.page_table import ranking, verdicts
from leaderboards.page_text import data, element, text, text_table
from leaderboards.render import heading, how_to_read
from leaderboards.summaries import BANDS
from leaderboards.text import clean, number

FILTERS = {"model": "Model", "dtype": "Dtype", "query": "Query mode", "first_token": "First token"}
SHADES = 10
NOTHING = "<p>No records for it.</p>"


def write_page(
    tables: Sequence[Table], records: Iterable[Record], out_dir: Path, name: str, *, manifests: Sequence[RunManifest]
) -> Path:
    """Write `<name>.html` into `out_dir` and return its path.

    Raises HarnessError when `name` is no file name, there is no table, or the file cannot be written.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise HarnessError(f"board name {name!r} is no file name; use letters, digits, '.', '-' and '_'")
    path = Path(out_dir) / f"{name}.html"
    page = to_html(tables, records, title=name, manifests=manifests)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot create {path.parent}: {error.strerror}; choose another folder") from None
    write_text(path, page)
    return path


def to_html(
    tables: Sequence[Table], records: Iterable[Record], *, title: str, manifests: Sequence[RunManifest] = ()
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
    return Template(_asset("board.html")).substitute(
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'",
        title=text(title),
        style=style,
        script=script,
        facts=_facts(tables),
        verdicts="".join(_headed(table, verdicts(table), tables) for table in tables),
        filters=_filters(tables),
        ranking=ranking(tables, runs_of(every, run_ids)),
        charts="".join(_headed(table, _charts(table, i), tables) for i, table in enumerate(tables)) or NOTHING,
        heat="".join(_headed(table, _heat(heat_maps(own)), tables) for table, own in zip(tables, chosen, strict=True))
        or NOTHING,
        notes="".join(f"<li>{text(line, longest=600)}</li>" for table in tables for line in _notes(table))
        or "<li>None.</li>",
        runs=sections(run_ids, manifests),
        help="".join(f"<li>{text(line, longest=1000)}</li>" for line in how_to_read(tables)),
        data=data("tasks", _tasks(tables))
        + data("samples", {"tables": [heading(table) for table in tables], "samples": browsable(chosen)}),
    )


def _asset(name: str) -> str:
    return (files("leaderboards") / "assets" / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _facts(tables: Sequence[Table]) -> str:
    methods = {method for table in tables for method in table.rows["method"]}
    tasks = {task for table in tables for task in table.tasks["task"]}
    models = sorted({table.axes.model for table in tables})
    samples = sum(table.samples for table in tables)
    return text(f"{', '.join(models)} · {len(methods)} methods · {len(tasks)} tasks · {samples} samples", longest=400)


def _headed(table: Table, inside: str, tables: Sequence[Table]) -> str:
    """Below the table's own heading where there are several tables; nothing for nothing."""
    return (element("h3", text(heading(table)), {}) if len(tables) > 1 else "") + inside if inside else ""


def _filters(tables: Sequence[Table]) -> str:
    """A choice per axis that has several values, the budgets, the tasks, and a part of a method's name."""
    choices = {name: sorted({str(getattr(table.axes, name)) for table in tables}) for name in FILTERS}
    parts = [_select(f"f-{name}", FILTERS[name], values, "all") for name, values in choices.items() if values[1:]]
    budgets = list(dict.fromkeys(b for table in tables for b in table.rows["budget"]))
    tasks = sorted({task for table in tables for task in table.tasks["task"]})
    parts += [_select("f-budget", "Budget", budgets, "all"), _select("f-task", "Task", tasks, "mean of all tasks")]
    parts.append('<label>Method <input id="f-method" type="search" placeholder="part of a name"></label>')
    fixed = [f"{FILTERS[name]}: {values[0]}" for name, values in choices.items() if not values[1:]]
    return "".join(parts) + element("p", text(" · ".join(fixed)), {"class": "fixed"})


def _select(name: str, label: str, values: Sequence[str], every: str) -> str:
    options = "".join(element("option", text(value), {"value": value}) for value in values)
    return f'<label>{label} <select id="{name}"><option value="">{every}</option>{options}</select></label>'


def _charts(table: Table, i: int) -> str:
    figures = "".join(_figure(chart) for chart in charts(table, salt=f"chart-{i}"))
    return f'<div class="charts">{keys(table)}{figures}</div>' if figures else ""


def _figure(chart: Chart) -> str:
    values = text_table(chart.columns, chart.values, caption=chart.title)
    return (
        f'<figure><h4>{text(chart.title)}</h4>{chart.svg}<p class="readout" aria-hidden="true"></p>'
        f"<figcaption>{text(chart.about, longest=600)}</figcaption><details>"
        f'<summary>Values</summary><div class="scroll">{values}</div>'
        "</details></figure>"
    )


def _heat(maps: Sequence[Heat]) -> str:
    """The maps by family and budget, in sections of which the last budget of each family is open."""
    parts = []
    places = list(dict.fromkeys((heat.family, heat.budget) for heat in maps))
    last = dict(places)
    for family, budget in places:
        own = [heat for heat in maps if (heat.family, heat.budget) == (family, budget)]
        opened = " open" if last[family] == budget else ""
        grids = "".join(_grid(heat) for heat in own)
        title = f"{'NIAH' if family == 'niah' else 'RULER needles'}, budget {budget}"
        parts.append(f'<details{opened}><summary>{text(title)}</summary><div class="heats">{grids}</div></details>')
    return "".join(parts)


def _grid(heat: Heat) -> str:
    head = "".join(f"<th scope=col>{band}</th>" for band in BANDS)
    rows = []
    for length, values, counts in zip(heat.lengths, heat.values, heat.counts, strict=True):
        boxes = "".join(
            "<td>–</td>"
            if isnan(value)
            else f'<td class="h{int(value // (100 / SHADES))}" title="{n} samples">{number(value, digits=0)}</td>'
            for value, n in zip(values, counts, strict=True)
        )
        rows.append(f"<tr><th scope=row>{length}</th>{boxes}</tr>")
    caption = element("caption", text(heat.method), {})
    return f'<table class="heat">{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


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
