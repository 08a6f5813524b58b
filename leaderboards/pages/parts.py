"""What a page shows beside its rows of the ranking: of one table its verdicts, charts, needles and tables of text.

And the memory boundary: the folders of `harness boundary` beside the runs, as pictures with their values.
"""

from collections.abc import Iterable, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.boundary_folder import MANIFEST_FILE, BoundaryManifest, BoundaryRecord, load_boundaries
from harness.records.record import Record
from leaderboards.pages.charts import charts
from leaderboards.pages.heats import heat_groups
from leaderboards.pages.svg import adopted
from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.comparable import NOT_GIVEN
from leaderboards.stats.stored import held_or_read
from leaderboards.tables import boundary
from leaderboards.tables.board import heading
from leaderboards.tables.closed import closed_parts
from leaderboards.tables.sections import rival_frames, sections
from leaderboards.tables.verdicts import is_incomplete, standing, uncompressed, verdicts
from leaderboards.text import clean, distinct, number

Search = tuple[BoundaryManifest, Sequence[BoundaryRecord]]
"""A folder of searches."""


def table_parts(i: int, table: Table, records: Sequence[Record], *, several: bool) -> dict[str, Any]:
    """The parts of the i-th table by the names that the templates know; one that has nothing to show is empty.

    Tables of text are frames by their captions, or lines. records: one per key, those that the table is of. several:
    whether the page has other tables.
    """
    rivals = rival_frames(table.rivals)
    more = {title: frame for title, frame in sections(table).items() if title not in rivals and len(frame)}
    return {
        "index": i,
        "several": several,
        "heading": heading(table),
        "standing": standing(table),
        "verdicts": verdicts(table),
        "uncompressed": uncompressed(table),
        "best": best_by_task(table),
        "charts": charts(table, salt=f"chart-{i}"),
        "rivals": rivals,
        "needles": heat_groups(records),
        "more": {**more, **closed_parts(table.closed)},
    }


def best_by_task(table: Table) -> dict[str, pd.DataFrame]:
    """The highest mean of every task at every budget, beside that of the uncompressed cache; nothing without scores.

    Cells over their bytes or with missing samples are no candidates. No interval here: a task has few samples.
    """
    rows = table.rows.to_dict("records")
    fair = {(r["budget"], r["method"]) for r in rows if not is_incomplete(r) and not r["n_over_budget"]}
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["n_ok"]))
    found: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for row in table.tasks.to_dict("records"):
        if (row["budget"], row["method"]) in fair and not isnan(row["score_points_mean"]):
            of_task = found.setdefault(row["task"], {})
            of_task.setdefault(row["budget"], []).append((row["score_points_mean"], row["method"]))
    alone = {b for b in budgets if len({method for budget, method in fair if budget == b}) == 1}
    cells = [
        (clean(task), *(_best(means.get(b, []), named=b not in alone) for b in budgets))
        for task, means in found.items()
    ]
    told = distinct(budgets)
    heads = ["task", *(told[b] if b in NOT_GIVEN else f"budget {told[b]}{_share(rows, b)}" for b in budgets)]
    caption = "Highest mean of each task and how many methods share it; not tested against the next one"
    return {caption: pd.DataFrame(cells, columns=heads)} if cells else {}


def _best(means: Sequence[tuple[float, str]], *, named: bool) -> str:
    if not means:
        return "-"
    top = max(round(mean, 6) for mean, _ in means)
    names = sorted(clean(method) for mean, method in means if round(mean, 6) == top)
    if not named:
        return number(top)
    if not top:
        return "all 0.0"
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"{number(top)} {names[0]}{more}"


def _share(rows: Sequence[TableRow], budget: str) -> str:
    """The most bytes that a cell of this budget took, or read."""
    shares = [held_or_read(row) for row in rows if row["budget"] == budget]
    most, what = max((own for own in shares if not isnan(own[0])), default=(nan, ""))
    return f", {number(most)} % {what}" if what else ""


def find_searches(roots: Iterable[Path]) -> list[Search]:
    """The searches of each root that is a folder of `harness boundary`, or of the folders in it, in name order.

    A folder without a finished probe is left out. Raises HarnessError when a file of one is damaged.
    """
    folders: dict[Path, None] = {}
    for root in map(Path, roots):
        own = (root / MANIFEST_FILE).is_file()
        found = [root] if own else sorted(path.parent for path in root.glob(f"*/{MANIFEST_FILE}"))
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    return [(manifest, records) for manifest, records in map(load_boundaries, folders) if records]


def boundary_pictures(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """Of each folder its title, picture, how to read it, values, and what decides them; the pictures share no id."""
    pictures = []
    for i, (manifest, records) in enumerate(searches):
        salt, title = f"frontier-{i}", boundary.title(manifest)
        drawn, _ = boundary.draw(records, manifest, salt=salt)
        picture = {
            "title": title,
            "svg": adopted(drawn, salt=salt, title=title, about=boundary.describe(records), points={}),
            "reading": boundary.READING.replace("`", ""),
            "table": boundary.frame(records),
            "facts": [*boundary.facts(manifest), *boundary.troubles(records)],
        }
        pictures.append(picture)
    return pictures
