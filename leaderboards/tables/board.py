"""A board of scores as files and text: markdown, CSV, and a table for a terminal. Nothing is averaged here.

A page depends on the records and manifests alone, not on their order or on the time: the same input gives the same
bytes. Text from outside (labels, notes, errors) is cleaned of control characters and escaped for markdown.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.record import Key, RunManifest
from leaderboards.stats.aggregate import Table, TableRow
from leaderboards.stats.pareto import is_measured
from leaderboards.stats.ranks import SUFFIXES, Ranking, is_ranked
from leaderboards.stats.reads import READ
from leaderboards.tables.closed import closed_parts
from leaderboards.tables.files import write_files
from leaderboards.tables.legend import how_to_read
from leaderboards.tables.sections import flag_letters, sections
from leaderboards.tables.verdicts import most_nll, nll_text, score_text, standing, tightest_and_widest
from leaderboards.text import (
    MIB,
    NOTE_CHARS,
    Section,
    clean,
    csv_text,
    estimate,
    keys,
    markdown,
    number,
    rank_text,
    terminal,
)


def write_board(
    tables: Sequence[Table], out_dir: Path, name: str, *, manifests: Sequence[RunManifest] = ()
) -> list[Path]:
    """Write the files of a board into `out_dir` and return their paths.

    They are `<name>.md`; `.csv`, see `to_csv`; `.tasks.csv`, the means of each task; `.summary.csv`, the protocols'
    averages in long form, 0-100; `.visible.csv`, the smallest visible difference of each task and family;
    `.closed.csv`, who keeps a share of the full cache's score; `.lengths.csv`, how long answers are; `.pairs.csv`,
    methods of their own budget against others; `.relay.csv`, what was sent to other processes; `.frontiers.csv`, kinds
    of methods against each other; and of tables with a subject `.rivals.csv`, a row per budget, measure and family.
    manifests: of the runs that the tables are of.

    Raises HarnessError when `name` is no file name or a file cannot be written.
    """
    texts = {
        "md": to_markdown(tables, title=name, manifests=manifests),
        "csv": to_csv(tables),
        "tasks.csv": _csv([_with_axes(table, table.tasks) for table in tables]),
        "summary.csv": _csv([_with_axes(table, table.summaries.drop(columns="title")) for table in tables]),
    }
    for what in ("visible", "closed", "lengths", "pairs", "relay", "frontiers"):
        frames = [_with_axes(table, getattr(table, what)) for table in tables]
        texts |= {f"{what}.csv": _csv(frames)} if any(map(len, frames)) else {}
    if any(len(table.rivals) for table in tables):
        texts["rivals.csv"] = _csv([_with_axes(table, table.rivals) for table in tables])
    return write_files(out_dir, name, texts)


def to_markdown(tables: Sequence[Table], *, title: str, manifests: Sequence[RunManifest] = ()) -> str:
    """The whole board as one markdown page."""
    parts = (part for table in tables for part in _parts(table, _facts(table, manifests)))
    return markdown([Section(title, [], level=1), *parts, Section("How to read", how_to_read(tables))])


def to_terminal(tables: Sequence[Table], *, manifests: Sequence[RunManifest] = ()) -> str:
    """The board as text of at most 120 columns, each table below what it says in words."""
    told = ((table, [*tightest_and_widest(table), *_facts(table, manifests)]) for table in tables)
    parts = (part for table, lines in told for part in _parts(table, lines))
    return terminal([*parts, Section("How to read", how_to_read(tables))])


def to_csv(tables: Sequence[Table]) -> str:
    """Every column of every table, one row per (axes, budget, method); units are in the names, NaN is empty."""
    frames = []
    for table in tables:
        attrs = table.rows.attrs
        more: dict[str, Any] = {f"baseline_{wanted}": label or "" for wanted, label in table.baselines.items()}
        more |= {"bootstrap_seed": attrs["seed"], "bootstrap_resamples": attrs["resamples"]}
        more |= _ranking_columns(table.ranking)
        frames.append(table.rows.assign(**more, run_ids=" ".join(table.run_ids)))
    return _csv(frames)


def _ranking_columns(ranking: Ranking) -> dict[str, str | float]:
    """What is ranked: why nothing is, the tasks left out, and the least difference that is seen, by measure."""
    columns: dict[str, str | float] = {}
    for measure, suffix in SUFFIXES.items():
        own = ranking.eligible[measure]
        columns[f"rank{suffix}_nothing_why"] = own.why
        columns[f"rank{suffix}_left_out"] = " ".join(task for task, _ in own.left_out)
    least = ranking.least
    return columns | {
        f"least_seen_{unit}": least.get(m, math.nan) for m, unit in (("score", "points"), ("nll", "nats"))
    }


def heading(table: Table) -> str:
    """What all records of the table share, in one line."""
    a = table.axes
    parts = [
        a.model,
        f"{a.dtype} on {a.processor}",
        f"query-{a.query}",
        f"first token {a.first_token}",
        f"seed {a.seed}",
        a.settings,
        a.division,
    ]
    return clean(", ".join(part for part in parts if part))


def main_frame(table: Table) -> pd.DataFrame:
    """The ranking as text: one row per (budget, method)."""
    needles, measured = bool(table.rows["needle_percent_n"].any()), is_measured(table.rows)
    lines, most = [], most_nll(table.rows)
    for row in table.rows.to_dict("records"):
        line = _main_row(row, table.baselines, ranked=is_ranked(table.rows), most=most[row["budget"]])
        line |= {"needle %": number(row["needle_percent_mean"])} if needles else {}
        lines.append(line | (_measured_cells(row) if measured else {}))
    return pd.DataFrame(lines)


def notes_of(table: Table) -> list[str]:
    """The footnotes of a table, a line each."""
    notes = [
        f"{clean(note.method)} at {clean(', '.join(note.budgets))}: {clean(note.what)} ({note.count} records)"
        + (f"; first error: {clean(note.error)}" if note.error else "")
        for note in table.notes
    ]
    resumed = [f"resumed with another environment: {clean(what)} ({count} records)" for what, count in table.changes]
    return [*notes, *resumed, *map(_disagreement, table.differing)]


def _disagreement(told: tuple[str, str, int, Key]) -> str:
    """Two runs that say other things of the same cells."""
    used, other, count, (task, sample, method, budget) = told
    runs = f"run {clean(used)}, which is used, and run {clean(other)}" if used != other else f"two copies of run {used}"
    first = f"{clean(method)} at {clean(budget)} on {clean(task)}, sample {clean(sample)}"
    cells = f"{count} cells" if count > 1 else "a cell"
    return f"{runs} disagree in score, NLL or bytes in {cells}, first in {first}"


def _parts(table: Table, lines: Sequence[str]) -> Iterator[Section]:
    """The table with `lines` below its heading."""
    yield Section(heading(table), lines)
    yield Section("", main_frame(table))
    yield from (Section(title, frame, level=3) for title, frame in sections(table).items())
    yield from (Section(title, body, level=3) for title, body in closed_parts(table.closed).items())
    if notes := notes_of(table):
        yield Section("Notes", notes, level=3)


def _main_row(row: TableRow, baselines: Mapping[str, str | None], *, ranked: bool, most: int) -> dict[str, str]:
    mib = row["kv_bytes_mean"] / MIB
    cells = {
        **keys(row),
        **({"memory": row["memory"]} if "memory" in row else {}),
        "KV MiB": number(mib, digits=1 if mib >= 100 else 3),
        "KV %": number(row["kv_percent_of_full"]),
        **(_stored_cells(row) if "stored_bytes_mean" in row else {}),
        **({"read %": number(row[READ])} if READ in row else {}),
        **({"observe ms": number(row["observe_ms_median"])} if "observe_n" in row else {}),
        "score": f"{score_text(row)} {row['mark']}".strip(),
    }
    for wanted, label in baselines.items():
        cells[f"Δ {clean(label or wanted)}"] = estimate(row, f"score_points_vs_{wanted}", sign="+")
    if ranked:
        cells["rank"] = rank_text(row["rank_low"], row["rank_high"])
    cells["n"] = str(row["n_ok"])
    cells["flags"] = flag_letters(row["flags"])
    cells["NLL"] = nll_text(row, most)
    for wanted, label in baselines.items():
        cells[f"ΔNLL {clean(label or wanted)}"] = estimate(row, f"nll_nats_vs_{wanted}", digits=3, sign="+")
    return cells


def _stored_cells(row: TableRow) -> dict[str, str]:
    mib = row["stored_bytes_mean"] / MIB
    return {"stored MiB": number(mib, digits=1 if mib >= 100 else 3), "stored %": number(row["stored_percent_of_full"])}


def _measured_cells(row: TableRow) -> dict[str, str]:
    """Speed, memory and fronts."""
    return {
        "TTFT s": number(row["ttft_s_mean"], digits=3),
        "TPOT ms": number(1000 * row["tpot_s_mean"], digits=2),
        "tokens/s": number(row["tokens_per_s_mean"]),
        "peak MiB": number(row["peak_bytes_mean"] / MIB),
        "n measured": str(row["n_measured"]),
        "front bytes": row["front_bytes"],
        "front TPOT": row["front_tpot"],
    }


def _facts(table: Table, manifests: Sequence[RunManifest]) -> list[str]:
    tasks = sorted(set(table.tasks.task))
    runs = [m for m in manifests if m.run_id in table.run_ids]
    commits = sorted({m.git_commit[:12] for m in runs if m.git_commit})
    unfinished = sorted(f"{m.run_id} ({m.status})" for m in runs if m.status != "finished")
    facts = {
        "samples": f"{table.samples} of {len(tasks)} tasks: {', '.join(tasks)}",
        "runs": ", ".join(table.run_ids),
        "code": ", ".join(commits),
        "measured on": "; ".join(sorted({m.spec.measured_on for m in runs if m.spec.measured_on})),
        "unfinished runs": ", ".join(unfinished),
        "cells found in several runs": _several(table),
        "no baseline": ", ".join(wanted for wanted, label in table.baselines.items() if label is None),
    }
    told = [f"{name}: {clean(text, longest=10 * NOTE_CHARS)}" for name, text in facts.items() if text]
    return [*standing(table), *told]


def _several(table: Table) -> str:
    """How many cells were run more than once, which record is used, and how many disagree."""
    if not table.duplicates:
        return ""
    different = sum(count for _, _, count, _ in table.differing)
    told = f"; {different} differ between runs (see Notes)" if different else ""
    return f"{table.duplicates}, of each that of the finished run that was started last{told}"


def _with_axes(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    axes = asdict(table.axes)
    return frame.assign(**axes)[[*axes, *frame]]


def _csv(frames: Sequence[pd.DataFrame]) -> str:
    frame = pd.concat([frame for frame in frames if len(frame)] or frames[:1])  # an empty one has no column types
    texts = frame.select_dtypes(exclude="number").columns
    frame[texts] = frame[texts].fillna("")  # a table may lack columns of another one
    if "division" in frame and not frame["division"].any():
        frame = frame.drop(columns="division")
    return csv_text(frame)
