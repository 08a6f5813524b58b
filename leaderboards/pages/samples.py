"""What a page shows of single samples: some answers side by side.

Answers and references are untrusted. Here they stay plain data; the page sets them as text, never as markup.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest
from math import isnan
from typing import Any

import numpy as np

from harness.records.record import Record
from leaderboards.stats.comparable import budget_order
from leaderboards.stats.grid import needle_percent
from leaderboards.text import clean

SAMPLES = 50
ANSWER_CHARS = 400
REFERENCES = 5


def browsable(groups: Sequence[Sequence[Record]], *, samples: int = SAMPLES) -> list[dict[str, Any]]:
    """Up to `samples` samples as plain data, taken in turn from every task of every table, spread over each task.

    groups: the records of each table, one per key. Every one has `table` (its index), `task`, `id`, `tail` (of its
    prompt, empty in older records), `references` and `answers`: method, budget, text, score 0-100, needle (% still
    cached), kept (see `kept_map`), status, error.
    """
    by_task: dict[tuple[int, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for table, records in enumerate(groups):
        for r in records:
            by_task[table, r.task][r.sample_id].append(r)
    each = -(-samples // max(1, len(by_task)))
    turns = []
    for (table, _), by_id in by_task.items():
        spread = np.linspace(0, len(by_id) - 1, min(each, len(by_id))).round().astype(int)
        turns.append([(table, by_id[sorted(by_id)[i]]) for i in spread])
    taken = [found for found in chain.from_iterable(zip_longest(*turns)) if found is not None]
    return [_sample(table, records) for table, records in taken[:samples]]


def _sample(table: int, records: Sequence[Record]) -> dict[str, Any]:
    first = records[0]
    references = next((r.answers for r in records if r.answers), ())
    return {
        "table": table,
        "task": clean(first.task),
        "id": clean(first.sample_id),
        "tail": shown(next((r.prompt_tail for r in records if r.prompt_tail), "")),
        "references": [shown(answer) for answer in references[:REFERENCES]],
        "more": max(0, len(references) - REFERENCES),
        "answers": [_answer(r) for r in sorted(records, key=lambda r: (budget_order(r.budget), r.method))],
    }


def _answer(r: Record) -> dict[str, Any]:
    score, needle = r.metrics.get("score"), needle_percent(r)
    return {
        "method": clean(r.method),
        "budget": clean(r.budget),
        "text": shown(r.prediction),
        "score": None if score is None else round(100 * score, 1),
        "needle": None if isnan(needle) else round(needle, 1),
        "kept": "" if isnan(needle) else kept_map(r),
        "status": r.status,
        "error": clean(r.error or ""),
    }


def kept_map(r: Record) -> str:
    """How much of the needle each layer and KV head still holds: a character per head, layers parted by dots.

    `0` is none of its tokens, `a` all of them; `1` to `9` are the tenths between, and reach neither end.
    """

    def digit(kept: int) -> str:
        tenths = round(10 * (kept / r.needle_tokens))
        return "0" if kept <= 0 else "a" if kept >= r.needle_tokens else str(min(9, max(1, tenths)))

    return ".".join("".join(map(digit, layer)) for layer in r.needle_kept)


def shown(text: str, *, longest: int = ANSWER_CHARS) -> str:
    """Text with its lines, without other control characters and direction marks, cut after `longest` characters."""
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else " " for c in cut)
