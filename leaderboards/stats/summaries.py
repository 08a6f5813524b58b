"""The averages that the protocols themselves report, per cell, beside the board's own score.

LongBench (github.com/THUDM/LongBench, README): the mean of a category is the mean of its datasets in one language, Avg
the mean of the six category means; the code datasets belong to both languages. `16` is the plain mean over the English
and code datasets, which papers on KV-cache compression print. Official and variant prompts are never averaged together.
LongBench-E: in each of three length classes, the mean over datasets of the dataset's mean in that class.
RULER: the plain mean of its 13 tasks at one length.
Needles: the mean over tasks of the task's mean in a band of depths, and the share of needle tokens still cached, mean
over layers and KV heads; both over the samples of NIAH and of RULER's needle tasks that have one depth.

Every one is a weighted mean of task means, in 0-100, with the bootstrap of `leaderboards.stats.bootstrap`. Over fewer
tasks or samples than belong to it, it is the mean of what there is and its row says how many that are.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import Array, Estimate
from leaderboards.stats.comparable import STATUSES
from leaderboards.stats.grid import Grid, Mask

ENGLISH: Mapping[str, tuple[str, ...]] = {
    "single-doc QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi-doc QA": ("hotpotqa", "2wikimqa", "musique"),
    "summarization": ("gov_report", "qmsum", "multi_news"),
    "few-shot": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_count", "passage_retrieval_en"),
    "code": ("lcc", "repobench-p"),
}
CHINESE: Mapping[str, tuple[str, ...]] = {
    "single-doc QA": ("multifieldqa_zh",),
    "multi-doc QA": ("dureader",),
    "summarization": ("vcsum",),
    "few-shot": ("lsht",),
    "synthetic": ("passage_retrieval_zh",),
    "code": ENGLISH["code"],
}
BY_LENGTH = frozenset(name for names in ENGLISH.values() for name in names) - {"narrativeqa", "musique", "qmsum"}
CLASSES = ("0-4k", "4-8k", "8k+")
NEEDLES = frozenset(
    [f"niah_{kind}_{i}" for kind in ("single", "multikey") for i in (1, 2, 3)] + ["niah_multivalue", "niah_multiquery"]
)
RULER = NEEDLES | {"vt", "cwe", "fwe", "qa_1", "qa_2"}
BANDS = ("0-20", "20-40", "40-60", "60-80", "80-100")
"""Percent of the haystack; the upper end belongs to the next band, but for 100."""
UNKNOWN = "unknown"

COLUMNS = [
    *("budget", "method", "summary", "title", "column", "mean", "low", "high", "n", "n_expected"),
    *("tasks_present", "tasks_expected", "flags"),
]


@dataclass(frozen=True)
class Mean:
    """One column of a summary. where: [S], its samples. kinds: task to category, each of which weighs the same.

    tasks_expected: by the protocol; those that have samples there, when it names none.
    """

    column: str
    where: Mask
    tasks_expected: int | None = None
    what: str = "score"
    kinds: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Summary:
    """What one protocol reports. name: `longbench/en`; title: of the section on a page."""

    name: str
    title: str
    means: tuple[Mean, ...]


def summarise(grid: Grid, order: Sequence[CellKey]) -> pd.DataFrame:
    """One row per summary, cell (in `order`) and column, of the summaries that the samples make possible.

    `mean`, `low`, `high`: 0-100. `n`: samples in the mean, of `n_expected` that some cell of the budget did not skip.
    `tasks_present`: tasks with a value, of `tasks_expected`. `flags`: as in the main table.
    """
    summaries = [*_longbench(grid), *_longbench_e(grid), *_ruler(grid), *_needles(grid)]
    rows: list[dict[str, Any]] = []
    for s in summaries:
        columns = [_rows(grid, order, mean) for mean in s.means]
        names = ({"summary": s.name, "title": s.title, "budget": cell[1], "method": cell[0]} for cell in order)
        rows += [{**name, **row} for name, *own in zip(names, *columns, strict=True) for row in own]
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(grid: Grid, order: Sequence[CellKey], mean: Mean) -> list[dict[str, Any]]:
    """One column of a summary, of every cell."""
    tasks = [task for task, rows in grid.bootstrap.rows.items() if mean.where[rows].any()]
    shares = {cell: _weights(grid, _values(grid, cell, mean), mean) for cell in order}
    estimates = grid.bootstrap.estimates((_values(grid, cell, mean) for cell in order), weights=shares.values())
    return [
        _row(grid, cell, mean, estimate=estimate, tasks=(len(shares[cell]), len(tasks)))
        for cell, estimate in zip(order, estimates, strict=True)
    ]


def _values(grid: Grid, cell: CellKey, mean: Mean) -> Array:
    return np.where(mean.where, grid.values(cell, mean.what), np.nan)


def _weights(grid: Grid, values: Array, mean: Mean) -> dict[str, float]:
    """Task to weight, of the tasks that have values [S]: those of one category share its weight."""
    present = [task for task, rows in grid.bootstrap.rows.items() if not np.isnan(values[rows]).all()]
    kinds = {task: mean.kinds[task] if mean.kinds else task for task in present}
    members = Counter(kinds.values())
    return {task: 1 / members[kind] for task, kind in kinds.items()}


def _row(grid: Grid, cell: CellKey, mean: Mean, *, estimate: Estimate, tasks: tuple[int, int]) -> dict[str, Any]:
    """The row of one cell. tasks: how many have a value, and how many have samples."""
    expected = int((mean.where & grid.expected(cell[1])).sum())
    counts = grid.counts(cell, mean.where)
    flags = {"incomplete": estimate.n < expected, **{s: counts[s] for s in STATUSES[1:]}}
    flags["over_budget"] = bool((grid.values(cell, "over_budget")[mean.where] > 0).any())
    flags["few"] = grid.bootstrap.few(_values(grid, cell, mean))
    return {
        "column": mean.column,
        **asdict(estimate),
        "n_expected": expected,
        "tasks_present": tasks[0],
        "tasks_expected": tasks[1] if mean.tasks_expected is None else mean.tasks_expected,
        "flags": " ".join(name for name, here in flags.items() if here),
    }


def _longbench(grid: Grid) -> Iterator[Summary]:
    for family in _families(grid):
        variant = family.removeprefix("longbench").removeprefix("/")
        title = f"LongBench{f' ({variant})' if variant else ''} averages, "
        for code, language, categories in (("en", "English", ENGLISH), ("zh", "Chinese", CHINESE)):
            own = {name for kind, names in categories.items() if code == "en" or kind != "code" for name in names}
            if _of(grid, family, own).any():
                yield Summary(f"{family}/{code}", title + language, _averages(grid, family, categories))


def _families(grid: Grid) -> list[str]:
    """`longbench` and its variants, `longbench/<variant>`."""
    families = {task.rpartition("/")[0] for task in grid.bootstrap.rows}
    return sorted(f for f in families if f == "longbench" or f.startswith("longbench/"))


def _of(grid: Grid, family: str, names: Collection[str] | None = None) -> Mask:
    """[S]: samples of the family's tasks with these names, or of all its tasks."""
    here = np.zeros(len(grid.samples), dtype=bool)
    for task, rows in grid.bootstrap.rows.items():
        parent, _, name = task.rpartition("/")
        here[rows] = parent == family and (names is None or name in names)
    return here


def _averages(grid: Grid, family: str, categories: Mapping[str, Sequence[str]]) -> tuple[Mean, ...]:
    kinds = {f"{family}/{name}": kind for kind, names in categories.items() for name in names}
    every = {name for names in categories.values() for name in names}
    means = [Mean(kind, _of(grid, family, names), len(names)) for kind, names in categories.items()]
    means = [mean for mean in means if mean.where.any()]
    means.append(Mean("Avg", _of(grid, family, every), len(every), kinds=kinds))
    if categories is ENGLISH:
        means.append(Mean(str(len(every)), _of(grid, family, every), len(every)))
    return tuple(means)


def _longbench_e(grid: Grid) -> Iterator[Summary]:
    here = _of(grid, "longbench_e", BY_LENGTH)
    classes = [meta["length_bin"] if meta.get("length_bin") in CLASSES else UNKNOWN for meta in grid.metas]
    means = _split(here, classes, CLASSES, tasks_expected=len(BY_LENGTH))
    if means:
        yield Summary("longbench_e", "LongBench-E by length", means)


def _ruler(grid: Grid) -> Iterator[Summary]:
    here = _of(grid, "ruler", RULER)
    lengths = [meta["length"] if isinstance(meta.get("length"), int) else -1 for meta in grid.metas]
    names = [str(length) for length in sorted({n for n in lengths if n >= 0})]
    means = _split(here, [str(n) if n >= 0 else UNKNOWN for n in lengths], names, tasks_expected=len(RULER))
    if means:
        yield Summary("ruler", "RULER by length", means)


def _needles(grid: Grid) -> Iterator[Summary]:
    bands = [band_of(meta.get("depth")) for meta in grid.metas]
    deep = np.array([band != "" for band in bands], dtype=bool)
    needles = np.zeros(len(grid.samples), dtype=bool)
    for cell in grid.cells:
        needles |= ~np.isnan(grid.values(cell, "needle"))
    for family, wanted, title in (("niah", None, "NIAH"), ("ruler", NEEDLES, "RULER needles")):
        here = _of(grid, family, wanted) & deep
        if not here.any():
            continue
        means = _split(here, bands, BANDS)
        kept = here & needles
        if kept.any():
            means += (Mean("needle %", kept, what="needle"),)
        yield Summary(f"{family}/depth", f"{title} by depth", means)
        if kept.any():
            parts = _split(kept, bands, BANDS, what="needle")
            yield Summary(f"{family}/needle", f"{title}: needle tokens still cached by depth, %", parts)


def _split(
    here: Mask, parts: Sequence[str], names: Sequence[str], *, tasks_expected: int | None = None, what: str = "score"
) -> tuple[Mean, ...]:
    """A mean per part that has samples, in the order of `names`, and one for the samples of unknown part."""
    of = np.array(parts, dtype=object)
    found = {name: here & (of == name) for name in (*names, UNKNOWN)}
    return tuple(Mean(name, where, tasks_expected, what) for name, where in found.items() if where.any())


def band_of(depth: object) -> str:
    """The band of a depth in percent; empty for what is no depth."""
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 100:
        return ""
    return BANDS[min(int(depth // 20), len(BANDS) - 1)]
