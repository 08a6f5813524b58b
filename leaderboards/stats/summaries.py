"""The averages that the protocols themselves report, per cell, beside the board's own score.

LongBench (github.com/THUDM/LongBench, README): the mean of a category is the mean of its datasets in one language, Avg
the mean of the six category means; the code datasets belong to both languages. `16` is the plain mean over the English
and code datasets, which papers on KV-cache compression print. Official and variant prompts are never averaged together.
LongBench-E: in each of three length classes, the mean over datasets of the dataset's mean in that class.
RULER: the plain mean of its 13 tasks at one length.
Needles: the mean over tasks of the task's mean in a band of depths, and the share of needle tokens still cached, mean
over layers and KV heads; both over the samples of NIAH and of RULER's needle tasks that have one depth.
Beside the score: what else a task measures, by metric, such as each turn of `turns`. Where a task scores an order by
its place among others (`instructions`), also the position bias: the mean of the first place less that of the last, both
over the same contexts, and how much of it is more than the full cache's.

Every one is a weighted mean of task means, in 0-100, with the bootstrap of `leaderboards.stats.bootstrap`. Over fewer
tasks or samples than belong to it, it is the mean of what there is and its row says how many that are.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import Array, Indexes, Mask
from leaderboards.stats.comparable import STATUSES
from leaderboards.stats.eligible import REFERENCE
from leaderboards.stats.grid import Grid

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
PLACES = ("first", "middle", "last")
UNKNOWN = "unknown"
TELLING = ("instructions", "turns", "long")
"""Families whose metrics beside the score are told; those of NIAH, ROUGE, say nothing more."""
BESIDE = "/beside"
"""End of the name of a summary that no protocol has: a task's metrics beside the score."""

COLUMNS = [
    *("budget", "method", "summary", "title", "column", "mean", "low", "high", "n", "n_expected"),
    *("tasks_present", "tasks_expected", "flags"),
]


class Mean(NamedTuple):
    """One column of a summary. where: [S], its samples. kinds: task to category, each of which weighs the same.

    tasks_expected: by the protocol; those that have samples there, when it names none. factors: [S], what values are
    multiplied by; None for 1. minus: a cell whose values are subtracted.
    """

    column: str
    where: Mask
    tasks_expected: int | None = None
    what: str = "score"
    kinds: Mapping[str, str] | None = None
    factors: Array | None = None
    minus: CellKey | None = None

    def values(self, grid: Grid, cell: CellKey) -> Array:
        """[S], NaN elsewhere than in `where`."""
        own = grid.values(cell, self.what)
        if self.minus is not None:
            own = own - grid.values(self.minus, self.what)
        return np.where(self.where, own if self.factors is None else own * self.factors, np.nan)


class Summary(NamedTuple):
    """What one protocol reports. name: `longbench/en`; title: of the section on a page."""

    name: str
    title: str
    means: list[Mean]


def summarise(grid: Grid, order: Sequence[CellKey]) -> pd.DataFrame:
    """One row per summary, cell (in `order`) and column, of the summaries that the samples make possible.

    `mean`, `low`, `high`: 0-100. `n`: samples in the mean, of `n_expected` that some cell of the budget did not skip.
    `tasks_present`: tasks with a value, of `tasks_expected`. `flags`: as in the main table.
    """
    rows: list[dict[str, Any]] = []
    for name, title, means in [*_longbench(grid), *_longbench_e(grid), *_ruler(grid), *_needles(grid), *_beside(grid)]:
        columns = [_rows(grid, order, mean) for mean in means]
        for cell, *own in zip(order, *columns, strict=True):
            rows += [{"summary": name, "title": title, "budget": cell[1], "method": cell[0], **row} for row in own]
    return pd.DataFrame(rows, columns=COLUMNS)


def is_beside(summaries: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of `summarise` are of metrics beside the score."""
    return summaries["summary"].str.endswith(BESIDE)


def _rows(grid: Grid, order: Sequence[CellKey], mean: Mean) -> Iterator[dict[str, Any]]:
    """One column of a summary, of every cell."""
    tasks = sum(mean.where[rows].any() for rows in grid.bootstrap.rows.values())
    values = [mean.values(grid, cell) for cell in order]
    shares = [_weights(grid.bootstrap.present(own), mean.kinds) for own in values]
    estimates = grid.bootstrap.estimates(values, weights=shares)
    for cell, own, share, estimate in zip(order, values, shares, estimates, strict=True):
        expected = np.count_nonzero(mean.where & grid.expected(cell[1]))
        counts = grid.counts(cell, mean.where)
        flags = {"incomplete": estimate.n < expected, **{s: counts[s] for s in STATUSES[1:]}}
        flags["over_budget"] = (grid.values(cell, "over_budget")[mean.where] > 0).any()
        flags |= {"few": grid.bootstrap.few(own), "unknown": grid.unnamed(own)}
        yield {
            "column": mean.column,
            **estimate._asdict(),
            "n_expected": expected,
            "tasks_present": len(share),
            "tasks_expected": tasks if mean.tasks_expected is None else mean.tasks_expected,
            "flags": " ".join(name for name, here in flags.items() if here),
        }


def _weights(tasks: Iterable[str], kinds: Mapping[str, str] | None) -> dict[str, float]:
    """Task to weight: those of one category share its weight."""
    of = {task: kinds[task] if kinds else task for task in tasks}
    members = Counter(of.values())
    return {task: 1 / members[kind] for task, kind in of.items()}


def _longbench(grid: Grid) -> Iterator[Summary]:
    families = {task.rpartition("/")[0] for task in grid.bootstrap.rows}
    for family in sorted(f for f in families if f == "longbench" or f.startswith("longbench/")):
        variant = family.removeprefix("longbench").removeprefix("/")
        title = f"LongBench{f' ({variant})' if variant else ''} averages, "
        for code, language, categories in (("en", "English", ENGLISH), ("zh", "Chinese", CHINESE)):
            own = {name for kind, names in categories.items() if code == "en" or kind != "code" for name in names}
            if _of(grid, family, own).any():
                yield Summary(f"{family}/{code}", title + language, _averages(grid, family, categories))


def _of(grid: Grid, family: str, names: Collection[str] | None = None) -> Mask:
    """[S]: samples of the family's tasks with these names, or of all its tasks."""
    here = np.zeros(len(grid.samples), dtype=bool)
    for task, rows in grid.bootstrap.rows.items():
        parent, _, name = task.rpartition("/")
        here[rows] = parent == family and (names is None or name in names)
    return here


def _averages(grid: Grid, family: str, categories: Mapping[str, Sequence[str]]) -> list[Mean]:
    kinds = {f"{family}/{name}": kind for kind, names in categories.items() for name in names}
    every = {name for names in categories.values() for name in names}
    means = [Mean(kind, _of(grid, family, names), len(names)) for kind, names in categories.items()]
    means.append(Mean("Avg", _of(grid, family, every), len(every), kinds=kinds))
    if categories is ENGLISH:
        means.append(Mean(str(len(every)), _of(grid, family, every), len(every)))
    return [mean for mean in means if mean.where.any()]


def _longbench_e(grid: Grid) -> Iterator[Summary]:
    here = _of(grid, "longbench_e", BY_LENGTH)
    classes = [meta["length_bin"] if meta.get("length_bin") in CLASSES else UNKNOWN for meta in grid.metas]
    if means := _split(here, classes, CLASSES, tasks_expected=len(BY_LENGTH)):
        yield Summary("longbench_e", "LongBench-E by length", means)


def _ruler(grid: Grid) -> Iterator[Summary]:
    here = _of(grid, "ruler", RULER)
    lengths = [meta["length"] if isinstance(meta.get("length"), int) else -1 for meta in grid.metas]
    names = [str(length) for length in sorted({n for n in lengths if n >= 0})]
    parts = [str(n) if n >= 0 else UNKNOWN for n in lengths]
    if means := _split(here, parts, names, tasks_expected=len(RULER)):
        yield Summary("ruler", "RULER by length", means)


def _needles(grid: Grid) -> Iterator[Summary]:
    bands = [band_of(meta.get("depth")) for meta in grid.metas]
    deep = np.array(bands) != ""
    needles = np.any([~np.isnan(grid.values(cell, "needle")) for cell in grid.cells], axis=0)
    for family, wanted, title in (("niah", None, "NIAH"), ("ruler", NEEDLES, "RULER needles")):
        here = _of(grid, family, wanted) & deep
        if not (means := _split(here, bands, BANDS)):
            continue
        kept = here & needles
        if kept.any():
            means.append(Mean("needle %", kept, what="needle"))
        yield Summary(f"{family}/depth", f"{title} by depth", means)
        if parts := _split(kept, bands, BANDS, what="needle"):
            yield Summary(f"{family}/needle", f"{title}: needle tokens still cached by depth, %", parts)


def _beside(grid: Grid) -> Iterator[Summary]:
    for task, rows in grid.bootstrap.rows.items():
        if task.partition("/")[0] not in TELLING:
            continue
        records = [column[i] for column in grid.cells.values() for i in rows]
        own = {name for r in records if r is not None for name in r.beside}
        where = {name: _measured(grid, f"metrics.{name}", rows) for name in sorted(own, key=_natural)}
        means = [Mean(name, here, what=f"metrics.{name}") for name, here in where.items()]
        if where.keys() >= {"first", "last"}:
            means += _bias(grid, where["first"], where["last"])
        if means:
            yield Summary(f"{task}{BESIDE}", f"{task}: beside the score", means)


def _measured(grid: Grid, what: str, rows: Indexes) -> Mask:
    """[S]: samples in rows of which some cell has a value."""
    here = np.zeros(len(grid.samples), dtype=bool)
    here[rows] = np.any([~np.isnan(grid.values(cell, what)[rows]) for cell in grid.cells], axis=0)
    return here


def _bias(grid: Grid, first: Mask, last: Mask) -> Iterator[Mean]:
    """The mean score of one place less that of another as a mean over the samples of both."""
    both = first | last
    factors = both.sum() * (first / first.sum() - last / last.sum())
    yield Mean("first - last", both, factors=factors)
    if REFERENCE in grid.cells:
        yield Mean("more than fullkv's", both, factors=factors, minus=REFERENCE)


def _natural(name: str) -> tuple[int, str, int]:
    """The order of metrics: places, then by name and number."""
    stem = name.rstrip("0123456789")
    place = PLACES.index(name) if name in PLACES else len(PLACES)
    return place, stem, int(name[len(stem) :] or 0)


def _split(
    here: Mask, parts: Sequence[str], names: Sequence[str], *, tasks_expected: int | None = None, what: str = "score"
) -> list[Mean]:
    """A mean per part that has samples, in the order of `names`, and one for the samples of unknown part."""
    of = np.array(parts, dtype=object)
    found = {name: here & (of == name) for name in (*names, UNKNOWN)}
    return [Mean(name, where, tasks_expected, what) for name, where in found.items() if where.any()]


def band_of(depth: object) -> str:
    """The band of a depth in percent; empty for what is no depth."""
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 100:
        return ""
    return BANDS[min(int(depth // 20), len(BANDS) - 1)]
