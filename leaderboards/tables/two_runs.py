"""Two runs side by side, as text for a terminal, CSV of the rows, and JSON of everything."""

import json
import math
import re
from dataclasses import asdict
from typing import Any

import pandas as pd

from harness.records.record import RunManifest
from leaderboards.stats.bootstrap import LEVEL
from leaderboards.stats.paired import ALL
from leaderboards.stats.two_runs import Pair, Row, TwoRuns
from leaderboards.text import MIB, TERMINAL_WIDTH, Section, clean, csv_text, interval, number, terminal

SHOWN = {"score": ("score", 1), "nll": ("NLL", 3)}
"""Measure to its name and its decimals."""
SAME = ("model", "revision", "dtype", "processor", "commit", "seed", "lengths", "limit")
"""Settings that are named where they are the same."""
HOW_TO_READ = (
    "1, 2: the runs; means are over the n prompts that both have and are ok in, score 0-100, NLL in nats per token of "
    "the reference. Without such prompts, n 0, they are each run's own, and there is no difference. all tasks: mean of "
    "the task means.",
    f"Δ: second less first, paired by prompt, with its {LEVEL:.0%} bootstrap interval over contexts, not corrected for "
    "the number of rows. Without brackets: fewer than 6 contexts, or one in some task.",
    "*: surely different: two-sided sign-flip test over contexts, corrected by Holm (and Tarone) over the scores and "
    f"NLLs of all rows; any wrong * in this table has a chance of {1 - LEVEL:.0%} at most. Without a * there may be a "
    "difference that so few prompts cannot show.",
    "outputs: how many of the n answers are other tokens.",
)


def to_terminal(found: TwoRuns, manifests: tuple[RunManifest, RunManifest], *, width: int = TERMINAL_WIDTH) -> str:
    """Settings first, then the rows, then what only one run has. manifests: of the first and of the second run."""
    return terminal(_sections(found, manifests), width=width)


def to_csv(found: TwoRuns) -> str:
    """A line per row; units are in the names, what there is not is empty."""
    return csv_text(pd.DataFrame([_csv_row(row) for row in found.rows]))


def to_json(found: TwoRuns, manifests: tuple[RunManifest, RunManifest]) -> str:
    """Everything; NaN is null."""
    values = asdict(found)
    for row, own in zip(values["rows"], found.rows, strict=True):
        for measure in SHOWN:
            pair: Pair = getattr(own, measure)
            row[measure] |= {"difference": pair.difference._asdict(), "sure": pair.sure}
    for setting, of in zip(values["settings"], found.settings, strict=True):
        setting["differs"] = of.differs
    return json.dumps({"runs": [m.run_id for m in manifests], **_plain(values)}, indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _sections(found: TwoRuns, manifests: tuple[RunManifest, RunManifest]) -> list[Section]:
    runs = [f"{i}: run {m.run_id}, {m.status}, started {m.started}" for i, m in enumerate(manifests, 1)]
    differing = [f"{s.name}: {_short(s.first)} | {_short(s.second)}" for s in found.settings if s.differs]
    same = ", ".join(f"{s.name} {_short(s.first)}" for s in found.settings if not s.differs and s.name in SAME)
    settings = [clean(line, longest=400) for line in (*differing, f"the same: {same}")]
    frame = pd.DataFrame([_shown(row) for row in found.rows])
    sections = [Section("Two runs", runs), Section("Settings that differ, first | second", settings)]
    sections += [Section("Rows", _facts(found)), Section("", frame)]
    if found.only:
        sections.append(Section("Not compared", [clean(line) for line in found.only]))
    return [*sections, Section("How to read", HOW_TO_READ)]


def _facts(found: TwoRuns) -> list[str]:
    """How many outputs and rows differ, and where most other bytes are kept."""
    single = [row for row in found.rows if row.task != ALL]
    n, outputs = sum(row.n for row in single), sum(row.outputs for row in single)
    sure = sum(pair.sure for row in found.rows for pair in (row.score, row.nll))
    lines = [
        f"{outputs:,} of {n:,} outputs differ; {found.behind:,} of their {found.tokens:,} tokens come at or after the "
        "first difference",
        f"{sure} of {2 * len(found.rows)} differences are sure (*)",
    ]
    if found.unnamed:
        alone = "do not name the context they are drawn from and count as one each"
        lines.append(f"{found.unnamed} prompts {alone}: intervals may be far too narrow, and a * wrong more often")
    grown = [row for row in single if row.first_bytes != row.second_bytes]
    if grown:
        row = max(grown, key=lambda row: abs(row.first_bytes - row.second_bytes) / row.n)
        first, second = (number(size / row.n / MIB, digits=3) for size in (row.first_bytes, row.second_bytes))
        where = f"{row.method} at {row.budget} on {row.task}: {first} | {second} MiB a prompt"
        lines.append(clean(f"kept bytes differ in {len(grown)} of {len(single)} rows, most for {where}"))
    return lines


def _shown(row: Row) -> dict[str, str]:
    cells = {"method": clean(f"{row.method} at {row.budget}"), "task": clean(row.task), "n": str(row.n)}
    cells["outputs"] = str(row.outputs) if row.n else "-"
    for measure, (words, digits) in SHOWN.items():
        pair: Pair = getattr(row, measure)
        cells |= {f"{words} {i}": number(x, digits=digits) for i, x in enumerate((pair.first, pair.second), 1)}
        told = interval(*pair.difference[:3], digits=digits, sign="+")
        cells[f"Δ {words}"] = f"{told} *" if pair.sure else told
    return cells


def _csv_row(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {name: getattr(row, name) for name in ("budget", "method", "task")} | {"n": row.n}
    for measure, unit in (("score", "score_points"), ("nll", "nll_nats")):
        pair: Pair = getattr(row, measure)
        line |= {f"{unit}_first": pair.first, f"{unit}_second": pair.second}
        line |= {f"{unit}_difference_{part}": value for part, value in pair.difference._asdict().items()}
        line |= {f"{unit}_corrected_p": pair.corrected_p, f"{unit}_sure": pair.sure}
    return line | {
        "outputs_differ": row.outputs,
        "kv_bytes_first": row.first_bytes,
        "kv_bytes_second": row.second_bytes,
    }


def _short(text: str) -> str:
    """Hashes by their first digits; nothing by a dash."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b", r"\1", text) or "-"
