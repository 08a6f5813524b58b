"""Tables as pages: markdown and CSV files, and text for a terminal. Nothing is averaged here.

A page depends on the records and manifests alone, not on their order or on the time: the same input gives the same
bytes. Text from outside (labels, notes, errors) is cleaned of control characters and escaped for markdown.
"""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import HarnessError
from harness.records import Record, RunManifest
from harness.store import write_text
from leaderboards.aggregate import FEW, LEVEL, MIN_PAIRS, Table, aggregate

TERMINAL_WIDTH = 120
KEYS = ["budget", "method"]
FLAGS = {"incomplete": "i", "skipped": "s", "failed": "f", "oom": "o", "over_budget": "b", "few": "w"}
MIB = 2**20
LONGEST = 200  # characters of a note or an error on a page


def write_board(
    records: Iterable[Record], out_dir: Path, name: str, *, manifests: Sequence[RunManifest] = ()
) -> list[Path]:
    """Write `<name>.md` and `<name>.csv` into `out_dir` and return their paths.

    manifests: of the runs the records come from, so that runs with different settings get tables of their own.

    Raises HarnessError when `name` is no file name, a file cannot be written, or `aggregate` refuses the records.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise HarnessError(f"board name {name!r} is no file name; use letters, digits, '.', '-' and '_'")
    tables = aggregate(records, manifests=manifests)
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot create {out_dir}: {error.strerror}; choose another folder") from None
    paths = [out_dir / f"{name}.md", out_dir / f"{name}.csv"]
    write_text(paths[0], to_markdown(tables, title=name, manifests=manifests))
    write_text(paths[1], to_csv(tables))
    return paths


def to_markdown(tables: Sequence[Table], *, title: str, manifests: Sequence[RunManifest] = ()) -> str:
    """The whole board as one markdown page."""
    parts = [f"# {_escape(title)}"]
    for table in tables:
        parts.append(f"## {_escape(heading(table))}")
        parts.append(_bullets(_facts(table, manifests)))
        parts += [_github(main_frame(table)), "### Score by task", _github(task_frame(table))]
        notes = _footnotes(table)
        parts += ["### Notes", _bullets(notes)] if notes else []
    parts += ["## How to read", _bullets(how_to_read(tables))]
    return "\n\n".join(parts) + "\n"


def to_terminal(tables: Sequence[Table], *, manifests: Sequence[RunManifest] = (), width: int = TERMINAL_WIDTH) -> str:
    """The board as text of at most `width` columns; a wide table goes on below, its first two columns repeated."""
    parts = []
    for table in tables:
        lines = [heading(table), *_facts(table, manifests)]
        parts.append("\n".join(_wrap(line, width) for line in lines))
        parts += [_plain(part) for frame in (main_frame(table), task_frame(table)) for part in _fold(frame, width)]
        parts.append("\n".join(_wrap(f"- {line}", width) for line in _footnotes(table)))
    parts.append("\n".join(_wrap(line, width) for line in how_to_read(tables)))
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
        texts = frame.select_dtypes(exclude="number").columns
        frame[texts] = frame[texts].map(_clean)
        frames.append(frame)
    return pd.concat(frames).to_csv(index=False, float_format="%.10g", lineterminator="\n")


def heading(table: Table) -> str:
    """What all records of the table share, in one line."""
    a = table.axes
    parts = [a.model, a.dtype, f"query-{a.query}", f"first token {a.first_token}", f"seed {a.seed}", a.settings]
    return _clean(", ".join(part for part in parts if part))


def main_frame(table: Table) -> pd.DataFrame:
    """The ranking as text: one row per (budget, method)."""
    return pd.DataFrame([_main_row(row, table.baselines) for row in table.rows.to_dict("records")])


def task_frame(table: Table) -> pd.DataFrame:
    """Mean score per task as text: one row per (budget, method), `(n)` behind a mean that lacks samples."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.tasks.to_dict("records"):
        n = row["n_ok"]
        text = _number(row["score_points_mean"]) + (f" ({n})" if 0 < n < row["n_expected"] else "")
        key = (_clean(row["budget"]), _clean(row["method"]))
        rows.setdefault(key, dict(zip(KEYS, key, strict=True)))[_clean(row["task"])] = text
    return pd.DataFrame(list(rows.values()))


def how_to_read(tables: Sequence[Table]) -> list[str]:
    """What the columns, marks and flags mean."""
    attrs = tables[0].rows.attrs
    return [
        f"score: 0-100, unweighted mean of task means, ± half of its {LEVEL:.0%} interval. =: not told apart from "
        "the best of its budget; *: the best, told apart from every other method within its bytes.",
        f"Δ: paired difference on the samples both have, with its {LEVEL:.0%} interval; fullkv is the uncompressed "
        f"cache, other baselines are taken at the same budget. Without brackets: fewer than {MIN_PAIRS} pairs, or one "
        "in some task.",
        f"intervals: percentile bootstrap within tasks, {attrs['resamples']} resamples, seed {attrs['seed']}; "
        "not corrected for the number of comparisons.",
        "NLL: nats per token of the reference answer on the compressed cache, where a task has one; lower is better.",
        "KV: bytes measured right after compression, mean over samples in MiB, and in % of the uncompressed cache.",
        "n: samples scored. first token: whether the first answer token was predicted from the compressed cache, or by "
        "the uncompressed prefill.",
        "flags: i incomplete (others of that budget have samples that this one lacks), s skipped, f failed, o out of "
        f"memory, b over budget in bytes, w fewer than {FEW} samples in some task (its interval is too narrow).",
    ]


def _main_row(row: Mapping[Any, Any], baselines: Mapping[str, str | None]) -> dict[str, str]:
    half = (row["score_points_high"] - row["score_points_low"]) / 2
    score = _number(row["score_points_mean"]) + ("" if math.isnan(half) else f" ± {_number(half)}")
    mib = row["kv_bytes_mean"] / MIB
    cells = {
        "budget": _clean(row["budget"]),
        "method": _clean(row["method"]),
        "KV MiB": _number(mib, digits=1 if mib >= 100 else 3),
        "KV %": _number(row["kv_percent_of_full"]),
        "score": f"{score} {row['mark']}".strip(),
    }
    for wanted, label in baselines.items():
        cells[f"Δ {_clean(label or wanted)}"] = _difference(row, f"score_points_vs_{wanted}", digits=1)
    cells["n"] = str(row["n_ok"])
    cells["flags"] = "".join(FLAGS[flag] for flag in row["flags"].split())
    cells["NLL"] = _number(row["nll_nats_mean"], digits=3)
    for wanted, label in baselines.items():
        cells[f"ΔNLL {_clean(label or wanted)}"] = _difference(row, f"nll_nats_vs_{wanted}", digits=3)
    return cells


def _number(value: float, *, digits: int = 1, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _difference(row: Mapping[Any, Any], name: str, *, digits: int) -> str:
    mean, low, high = (_number(row[f"{name}_{part}"], digits=digits, sign="+") for part in ("mean", "low", "high"))
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
        "unfinished runs": ", ".join(unfinished),
        "cells found in several runs": f"{table.duplicates}, one of each used" if table.duplicates else "",
        "no baseline": ", ".join(wanted for wanted, label in table.baselines.items() if label is None),
    }
    return [f"{name}: {_clean(text, longest=10 * LONGEST)}" for name, text in facts.items() if text]


def _footnotes(table: Table) -> list[str]:
    lines = []
    for note in table.notes:
        error = f"; first error: {_clean(note.error)}" if note.error else ""
        lines.append(
            f"{_clean(note.method)} at {', '.join(note.budgets)}: {_clean(note.what)} ({note.count} records){error}"
        )
    return lines


def _clean(text: Any, *, longest: int = LONGEST) -> str:
    """One line without control characters, direction marks and the like."""
    visible = "".join(" " if unicodedata.category(c).startswith("C") else c for c in str(text))
    line = " ".join(visible.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _escape(text: str) -> str:
    """Markdown shows the text as it is, in a table too: no column, emphasis, code, tag or link comes out of it."""
    return re.sub(r"([\\`*<>|]|(?<=\])[(\[])", r"\\\1", text)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_escape(line)}" for line in lines)


def _github(frame: pd.DataFrame) -> str:
    escaped = frame.rename(columns=_escape).map(_escape)
    return str(escaped.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=_align(frame)))


def _plain(frame: pd.DataFrame) -> str:
    wide = _widths(frame)
    aligned = {name: str.ljust if side == "left" else str.rjust for name, side in zip(wide, _align(frame), strict=True)}
    lines = [list(wide), ["-" * width for width in wide.values()], *frame.to_numpy().tolist()]
    return "\n".join(
        "  ".join(aligned[name](cell, wide[name]) for name, cell in zip(wide, line, strict=True)).rstrip()
        for line in lines
    )


def _widths(frame: pd.DataFrame) -> dict[str, int]:
    return {str(name): max(len(str(name)), *frame[name].map(len)) for name in frame}


def _align(frame: pd.DataFrame) -> list[str]:
    return ["left" if name in (*KEYS, "flags") else "right" for name in frame]


def _fold(frame: pd.DataFrame, width: int) -> list[pd.DataFrame]:
    """The frame in parts that fit into `width` columns of text where their own cells allow it."""
    wide = _widths(frame)
    keys = sum(wide[name] + 2 for name in KEYS)
    parts: list[list[str]] = []
    room = 0
    for name in list(wide)[len(KEYS) :]:
        if not parts or wide[name] + 2 > room:
            parts.append([])
            room = width + 2 - keys
        parts[-1].append(name)
        room -= wide[name] + 2
    return [frame[[*KEYS, *names]] for names in parts]


def _wrap(line: str, width: int) -> str:
    return textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
