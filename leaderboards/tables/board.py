"""Tables as pages: markdown and CSV files, and text for a terminal. Nothing is averaged here.

A page depends on the records and manifests alone, not on their order or on the time: the same input gives the same
bytes. Text from outside (labels, notes, errors) is cleaned of control characters and escaped for markdown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import HarnessError
from harness.records.record import RunManifest
from harness.records.run_folder import write_text
from leaderboards.stats import pareto, ranks, worst
from leaderboards.stats.aggregate import Table
from leaderboards.stats.bootstrap import FEW, LEVEL, MIN_PAIRS
from leaderboards.stats.subject import HOW_TO_READ, frames
from leaderboards.text import KEYS, LONGEST, bullets, clean, escape, fold, github, number, plain, wrap

TERMINAL_WIDTH = 120
FLAGS = {"incomplete": "i", "skipped": "s", "failed": "f", "oom": "o", "over_budget": "b", "few": "w"}
MIB = 2**20
SUMMARIES = (
    "averages by protocol: 0-100, mean ± half of its interval. (13 of 16): the mean of the 13 tasks there are, of 16 "
    "that belong to it; (n 180/200): of 180 samples, of 200 that are expected of every method at that budget. Such "
    "a mean is no official score.",
    "LongBench: a category is the mean of its datasets, Avg the mean of the categories (the official README), 16 the "
    "plain mean over the English and code datasets. LongBench-E: mean over datasets, by length in words. RULER: plain "
    "mean of its 13 tasks. By depth: in % of the haystack, 20 belonging to 20-40 and 100 to 80-100.",
    "needle %: needle tokens still cached after compression, mean over layers, KV heads and samples with needles.",
)


def write_board(
    tables: Sequence[Table], out_dir: Path, name: str, *, manifests: Sequence[RunManifest] = ()
) -> list[Path]:
    """Write `<name>.md`, `.csv`, `.tasks.csv` and `.summary.csv` into `out_dir` and return their paths.

    manifests: of the runs that the tables are of. Tables with a subject get `<name>.rivals.csv` too.

    Raises HarnessError when `name` is no file name or a file cannot be written.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise HarnessError(f"board name {name!r} is no file name; use letters, digits, '.', '-' and '_'")
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot create {out_dir}: {error.strerror}; choose another folder") from None
    pages = {
        out_dir / f"{name}.md": to_markdown(tables, title=name, manifests=manifests),
        out_dir / f"{name}.csv": to_csv(tables),
        out_dir / f"{name}.tasks.csv": tasks_to_csv(tables),
        out_dir / f"{name}.summary.csv": summaries_to_csv(tables),
    }
    if any(len(table.rivals) for table in tables):
        pages[out_dir / f"{name}.rivals.csv"] = rivals_to_csv(tables)
    for path, text in pages.items():
        write_text(path, text)
    return list(pages)


def to_markdown(tables: Sequence[Table], *, title: str, manifests: Sequence[RunManifest] = ()) -> str:
    """The whole board as one markdown page."""
    parts = [f"# {escape(title)}"]
    for table in tables:
        parts.append(f"## {escape(heading(table))}")
        parts.append(bullets(_facts(table, manifests)))
        parts.append(github(main_frame(table)))
        for name, frame in sections(table).items():
            parts += [f"### {escape(name)}", github(frame)]
        notes = _footnotes(table)
        parts += ["### Notes", bullets(notes)] if notes else []
    parts += ["## How to read", bullets(how_to_read(tables))]
    return "\n\n".join(parts) + "\n"


def to_terminal(tables: Sequence[Table], *, manifests: Sequence[RunManifest] = (), width: int = TERMINAL_WIDTH) -> str:
    """The board as text of at most `width` columns; a wide table goes on below, its first two columns repeated."""
    parts = []
    for table in tables:
        lines = [heading(table), *_facts(table, manifests)]
        parts.append("\n".join(wrap(line, width) for line in lines))
        parts += [plain(part) for part in fold(main_frame(table), width)]
        for name, frame in sections(table).items():
            first, *more = [plain(part) for part in fold(frame, width)]
            parts += [f"{wrap(name, width)}\n{first}", *more]
        parts.append("\n".join(wrap(f"- {line}", width) for line in _footnotes(table)))
    parts.append("\n".join(wrap(line, width) for line in how_to_read(tables)))
    return "\n\n".join(part for part in parts if part) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """Every column of every table, one row per (axes, budget, method); units are in the names, NaN is empty."""
    frames = []
    for table in tables:
        frame = table.rows.copy()
        for wanted, label in table.baselines.items():
            frame[f"baseline_{wanted}"] = label or ""
        frame["bootstrap_seed"], frame["bootstrap_resamples"] = table.rows.attrs["seed"], table.rows.attrs["resamples"]
        frame["run_ids"] = " ".join(table.run_ids)
        frames.append(frame)
    return _csv(frames)


def tasks_to_csv(tables: Sequence[Table]) -> str:
    """The means of each task, one row per (axes, budget, method, task)."""
    return _csv([_with_axes(table, table.tasks) for table in tables])


def summaries_to_csv(tables: Sequence[Table]) -> str:
    """The protocols' averages in long form, one row per (axes, budget, method, summary, column); 0-100."""
    return _csv([_with_axes(table, table.summaries.drop(columns="title")) for table in tables])


def rivals_to_csv(tables: Sequence[Table]) -> str:
    """The subject against the strongest other methods, one row per (axes, budget, measure, family)."""
    return _csv([_with_axes(table, table.rivals) for table in tables])


def heading(table: Table) -> str:
    """What all records of the table share, in one line."""
    a = table.axes
    parts = [a.model, a.dtype, f"query-{a.query}", f"first token {a.first_token}", f"seed {a.seed}", a.settings]
    return clean(", ".join(part for part in parts if part))


def main_frame(table: Table) -> pd.DataFrame:
    """The ranking as text: one row per (budget, method)."""
    needles = bool(table.rows["needle_percent_n"].any())
    frame = pd.DataFrame([_main_row(row, table.baselines, needles=needles) for row in table.rows.to_dict("records")])
    return pd.concat([frame, pareto.frame(table.rows)], axis=1) if pareto.is_measured(table.rows) else frame


def task_frame(table: Table) -> pd.DataFrame:
    """Mean score per task as text: one row per (budget, method), `(n)` behind a mean that lacks samples."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.tasks.to_dict("records"):
        n = row["n_ok"]
        text = number(row["score_points_mean"]) + (f" ({n})" if 0 < n < row["n_expected"] else "")
        key = (clean(row["budget"]), clean(row["method"]))
        rows.setdefault(key, dict(zip(KEYS, key, strict=True)))[clean(row["task"])] = text
    return pd.DataFrame(list(rows.values()))


def sections(table: Table) -> dict[str, pd.DataFrame]:
    """Title to frame of what follows the ranking: the subject's rivals, score by task, ranks, tails, summaries."""
    titles = dict.fromkeys(table.summaries["title"])
    summaries = {clean(title): summary_frame(table, title) for title in titles}
    ranked = {"Ranks and best others": ranks.frame(table.rows)} if ranks.is_ranked(table.rows) else {}
    tailed = {"Tail failures": worst.frame(table.rows)} if worst.is_known(table.rows) else {}
    return {**frames(table.rivals), "Score by task": task_frame(table), **ranked, **tailed, **summaries}


def summary_frame(table: Table, title: str) -> pd.DataFrame:
    """One summary as text: one row per (budget, method); behind a mean of fewer tasks or samples, how many."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    flags: dict[tuple[str, str], set[str]] = {}
    for row in table.summaries[table.summaries["title"] == title].to_dict("records"):
        key = (clean(row["budget"]), clean(row["method"]))
        rows.setdefault(key, dict(zip(KEYS, key, strict=True)))[row["column"]] = _summary_text(row)
        flags.setdefault(key, set()).update(row["flags"].split())
    for key, cells in rows.items():
        cells["flags"] = "".join(letter for flag, letter in FLAGS.items() if flag in flags[key])
    return pd.DataFrame(list(rows.values()))


def how_to_read(tables: Sequence[Table]) -> list[str]:
    """What the columns, marks and flags mean."""
    attrs = tables[0].rows.attrs
    return [
        f"score: 0-100, unweighted mean of task means, ± half of its {LEVEL:.0%} interval. =: may be the "
        "best of its budget; *: the best, told apart from every other method within its bytes. Both by rank.",
        f"Δ: paired difference on the samples both have, with its {LEVEL:.0%} interval; fullkv is the uncompressed "
        f"cache, other baselines are taken at the same budget. Without brackets: fewer than {MIN_PAIRS} pairs, or one "
        "in some task. Samples that share a context count once here.",
        f"intervals: percentile bootstrap within tasks, {attrs['resamples']} resamples, seed {attrs['seed']}; "
        "samples that share a context are redrawn together; not corrected for the number of comparisons (ranks are).",
        "NLL: nats per token of the reference answer on the compressed cache, where a task has one; lower is better.",
        "KV: bytes measured right after compression, mean over samples in MiB, and in % of the uncompressed cache.",
        "n: samples scored. first token: whether the first answer token was predicted from the compressed cache, or by "
        "the uncompressed prefill.",
        "flags: i incomplete (others of that budget have samples that this one lacks), s skipped, f failed, o out of "
        f"memory, b over budget in bytes, w fewer than {FEW} contexts in some task (its interval is too narrow).",
        *(ranks.HOW_TO_READ if any(ranks.is_ranked(table.rows) for table in tables) else ()),
        *(worst.HOW_TO_READ if any(worst.is_known(table.rows) for table in tables) else ()),
        *(pareto.HOW_TO_READ if any(pareto.is_measured(table.rows) for table in tables) else ()),
        *(HOW_TO_READ if any(len(table.rivals) for table in tables) else ()),
        *(SUMMARIES if any(len(table.summaries) for table in tables) else ()),
    ]


def _main_row(row: Mapping[Any, Any], baselines: Mapping[str, str | None], *, needles: bool) -> dict[str, str]:
    score = _spread(*(row[f"score_points_{part}"] for part in ("mean", "low", "high")))
    mib = row["kv_bytes_mean"] / MIB
    cells = {
        "budget": clean(row["budget"]),
        "method": clean(row["method"]),
        **({"memory": row["memory"]} if "memory" in row else {}),
        "KV MiB": number(mib, digits=1 if mib >= 100 else 3),
        "KV %": number(row["kv_percent_of_full"]),
        "score": f"{score} {row['mark']}".strip(),
    }
    for wanted, label in baselines.items():
        cells[f"Δ {clean(label or wanted)}"] = _difference(row, f"score_points_vs_{wanted}", digits=1)
    cells["rank"] = ranks.rank_text(row["rank_low"], row["rank_high"])
    cells["n"] = str(row["n_ok"])
    cells["flags"] = "".join(FLAGS[flag] for flag in row["flags"].split())
    cells["NLL"] = number(row["nll_nats_mean"], digits=3)
    for wanted, label in baselines.items():
        cells[f"ΔNLL {clean(label or wanted)}"] = _difference(row, f"nll_nats_vs_{wanted}", digits=3)
    return cells | ({"needle %": number(row["needle_percent_mean"])} if needles else {})


def _summary_text(row: Mapping[Any, Any]) -> str:
    tasks = f"{row['tasks_present']} of {row['tasks_expected']}" if row["tasks_present"] < row["tasks_expected"] else ""
    samples = f"n {row['n']}/{row['n_expected']}" if row["n"] < row["n_expected"] else ""
    lacking = ", ".join(part for part in (tasks, samples) if part)
    return _spread(row["mean"], row["low"], row["high"]) + (f" ({lacking})" if lacking else "")


def _spread(mean: float, low: float, high: float) -> str:
    return number(mean) + ("" if math.isnan(low) else f" ± {number((high - low) / 2)}")


def _difference(row: Mapping[Any, Any], name: str, *, digits: int) -> str:
    mean, low, high = (number(row[f"{name}_{part}"], digits=digits, sign="+") for part in ("mean", "low", "high"))
    return mean if low == "-" else f"{mean} [{low}, {high}]"


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
        "cells found in several runs": f"{table.duplicates}, one of each used" if table.duplicates else "",
        "no baseline": ", ".join(wanted for wanted, label in table.baselines.items() if label is None),
    }
    return [f"{name}: {clean(text, longest=10 * LONGEST)}" for name, text in facts.items() if text]


def _footnotes(table: Table) -> list[str]:
    lines = []
    for note in table.notes:
        error = f"; first error: {clean(note.error)}" if note.error else ""
        lines.append(
            f"{clean(note.method)} at {', '.join(note.budgets)}: {clean(note.what)} ({note.count} records){error}"
        )
    return lines


def _with_axes(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    axes = {name: [value] * len(frame) for name, value in asdict(table.axes).items()}
    return pd.concat([pd.DataFrame(axes), frame], axis=1)


def _csv(frames: Sequence[pd.DataFrame]) -> str:
    frame = pd.concat([frame for frame in frames if len(frame)] or frames[:1])  # an empty one has no column types
    texts = frame.select_dtypes(exclude="number").columns
    frame[texts] = frame[texts].fillna("").map(clean)  # a table may lack columns of another one
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")
