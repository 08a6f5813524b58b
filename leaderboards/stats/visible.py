"""The smallest visible difference: which gap between two methods a task, a family or the whole table can show.

It is what a paired comparison of two methods at one budget finds with `POWER` (80 %), in points: Student's t over
contexts at 5 %, two-sided, for one comparison alone (`one`); and at the joint limit by which the table tells all its
pairs apart (`all`), where it ranks something. The noncentral t gives it, as for a table's least difference.

Spread. That of a paired difference varies from pair to pair. It is pooled: the root of the mean variance over all pairs
of methods at one budget that differ in it at all, of those that are within their bytes and lack no sample. A mean of
variances is right on average however few contexts there are, where the median of such pairs is too low. Two methods
that both answer nothing have no spread, and say nothing of two that differ.

Families. The mean over those of their tasks that may rank; contexts of two tasks are independent, so variances add up,
with the degrees of freedom of Welch and Satterthwaite. A task is also split by the length of its prompts where every
length has `FEWEST` samples or more. There is nothing where samples do not name their contexts, or name fewer than
`FEWEST`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from leaderboards.stats.bootstrap import LEVEL, Array, Bootstrap, Indexes
from leaderboards.stats.closed import UNNAMED
from leaderboards.stats.comparable import NOT_GIVEN
from leaderboards.stats.eligible import REFERENCE, Eligible, contexts
from leaderboards.stats.floors import ALL, family_of
from leaderboards.stats.grid import Grid
from leaderboards.stats.ranks import Ranking, deviates

FEWEST = 3
"""Contexts below which a spread says nothing."""
ONE = float(special.ndtri((1 + LEVEL) / 2))
"""The normal deviate of one two-sided comparison."""
SAME = 1e-9
"""Variance, points squared, up to which two methods do not differ."""
COLUMNS = ["kind", "name", "length", "full", "full_error", "n", "contexts", "pairs", "one", "all", "ranks", "why"]


class Part(NamedTuple):
    """What is known of some samples of one task. full: of the full cache, with its standard error; NaN without it.

    variance: of a paired difference's mean, points squared, pooled over so many pairs; NaN where `why` says why.
    """

    full: float
    full_error: float
    n: int
    contexts: int
    variance: float
    pairs: int
    why: str


def visible(grid: Grid, ranking: Ranking) -> pd.DataFrame:
    """One row per task, or task and length, then per family, then over all; with `COLUMNS`.

    kind: `task`, `family` or `all`. length: of the prompts, empty for all. full, one, all: points. contexts: of all its
    tasks together. ranks: `yes`, `no` where the table ranks nothing, or why the task does not. why: why there is no
    difference.
    """
    own = ranking.eligible["score"]
    scored = np.any([~np.isnan(grid.values(cell, "score")) for cell in grid.cells], axis=0)
    parts, rows = dict[str, Part](), list[dict[str, Any]]()
    for task, every in grid.bootstrap.rows.items():
        here = every[scored[every]]
        if not here.size:
            continue
        parts[task] = _part(grid, here)
        of_length = _by_length(grid, here)
        split = {length: _part(grid, some) for length, some in of_length.items()} or {"": parts[task]}
        ranks = _ranks(task, own)
        rows += [{"kind": "task", **_row(task, [part], at, ranking), "ranks": ranks} for at, part in split.items()]
    rows += _families(parts, ranking)
    return pd.DataFrame(rows, columns=COLUMNS)


def pooled(bootstrap: Bootstrap, fields: Iterable[Array], rows: Indexes) -> tuple[float, int]:
    """The mean variance of a paired difference, and over how many pairs. fields: [S, K], a budget's methods."""
    found = [np.zeros(0)]
    for values in fields:
        parts = bootstrap.noise_parts(values, rows)
        shared = parts.T @ parts
        alone = np.diagonal(shared)
        pairs = np.triu_indices(len(shared), 1)
        found.append((alone[:, None] + alone - 2 * shared)[pairs])
    variances = np.concatenate(found)
    variances = variances[variances > SAME]
    return (float(variances.mean()) if variances.size else math.nan), variances.size


def smallest(variances: Array, contexts: Array, limit: float) -> float:
    """The visible difference of the mean over T tasks. variances, contexts: [T], of each task's mean; limit: a deviate.

    NaN where one is NaN.
    """
    whole = float(variances.sum())
    if not whole > 0 or math.isnan(limit):
        return math.nan
    freedom = whole**2 / float((variances**2 / (contexts - 1)).sum())
    return float(deviates(np.array([freedom]), limit)[0]) * math.sqrt(whole) / len(variances)


def _part(grid: Grid, rows: Indexes) -> Part:
    known, mean, error = contexts(grid, rows), math.nan, math.nan
    full = grid.values(REFERENCE, "score") if REFERENCE in grid.cells else np.full(len(grid.samples), math.nan)
    if (there := rows[~np.isnan(full[rows])]).size:
        mean, error = float(full[there].mean()), grid.bootstrap.noise(full, there)
    variance, pairs = pooled(grid.bootstrap, _fields(grid, rows), rows)
    why = "" if pairs else "no two methods that lack nothing differ"
    if known < FEWEST:
        why = f"{known} contexts, {FEWEST} are needed" if known else UNNAMED
    return Part(mean, error if known else math.nan, len(rows), known, math.nan if why else variance, pairs, why)


def _fields(grid: Grid, rows: Indexes) -> Iterator[Array]:
    """Of each budget the scores [S, K] of its methods that are within their bytes and have all these samples."""
    for budget in sorted({budget for _, budget in grid.cells} - NOT_GIVEN):
        cells = [cell for cell in grid.cells if cell[1] == budget and not grid.over_budget(cell)]
        values = [own for cell in cells if not np.isnan((own := grid.values(cell, "score"))[rows]).any()]
        if len(values) > 1:
            yield np.column_stack(values)


def _by_length(grid: Grid, rows: Indexes) -> dict[str, Indexes]:
    """The samples by length, where there are several and each has enough; else nothing."""
    lengths = [grid.metas[i].get("length") for i in rows]
    if not all(isinstance(length, int) for length in lengths):
        return {}
    found = {length: rows[[own == length for own in lengths]] for length in sorted(set(lengths))}
    enough = len(found) > 1 and min(map(len, found.values())) >= FEWEST
    return {str(length): own for length, own in found.items()} if enough else {}


def _ranks(task: str, own: Eligible) -> str:
    return dict(own.left_out).get(task, "no" if own.why else "yes")


def _families(parts: Mapping[str, Part], ranking: Ranking) -> Iterator[dict[str, Any]]:
    """A row for each family with a task that may rank, and one for all where there are several."""
    own = ranking.eligible["score"]
    there = {task: part for task, part in parts.items() if task in own.tasks}
    families = list(dict.fromkeys(map(family_of, there)))
    for name in [*families, ALL] if len(families) > 1 else families:
        some = [part for task, part in there.items() if name in (ALL, family_of(task))]
        kind, ranks = "all" if name == ALL else "family", "no" if own.why else "yes"
        yield {"kind": kind, **_row(name, some, "", ranking), "ranks": ranks}


def _row(name: str, parts: Sequence[Part], length: str, ranking: Ranking) -> dict[str, Any]:
    """The mean over the tasks of these parts."""
    variances, known = np.array([part.variance for part in parts]), np.array([part.contexts for part in parts])
    return {
        **{"name": name, "length": length, "full": float(np.mean([part.full for part in parts]))},
        "full_error": math.sqrt(sum(part.full_error**2 for part in parts)) / len(parts),
        **{"n": sum(part.n for part in parts), "contexts": int(known.sum()) if known.all() else 0},
        "pairs": sum(part.pairs for part in parts),
        "one": smallest(variances, known, ONE),
        "all": smallest(variances, known, ranking.limit),
        "why": next((part.why for part in parts if part.why), ""),
    }
