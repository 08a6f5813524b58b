"""From records to one table per comparable setting: the one place where scores are averaged and intervals computed.

Averages. A task's score (0-100) is the mean over its samples; a cell's is the unweighted mean of its task means. NLL
(nats per token) is averaged as the score is, over the samples that have one; bytes are means over samples. Only `ok`
records count; what is missing is counted beside the mean, never scored 0.

Intervals. Percentile bootstrap, 95 % (`leaderboards.stats.bootstrap`): clusters of samples that share `meta.group` are
redrawn within each task, 2,000 times, with a seed kept in the table; one that names no group counts as its own here,
which is marked `unknown`. A difference is paired: it is taken per sample, on
the samples that both cells have, and the differences are redrawn. There is no interval below 6 clusters (no two-sided
sign test can reach 5 % with fewer) or with a task of one. With few clusters per task the interval is too narrow, by
about sqrt(1 - 1/n); cells with fewer than 10 in some task are flagged. `n` always counts samples.

Marks. They follow the rank intervals (`leaderboards.stats.ranks`), which are corrected for the number of methods,
budgets and measures. At each budget the cells that may be first, of those within their bytes, are `=`; a cell is `*`
only when it is the one that may be, and is told apart from every other. `=` is no proof of equality. A cell that lacks
samples has no mark: its mean is over others. Nothing is marked where there are fewer than two methods or none is
complete, or where the table ranks nothing (`leaderboards.stats.eligible`).

Flags. `incomplete`: other cells of that budget have samples that this one lacks. `other_samples`: no other one of its
budget has more, but those of another budget do. `timed_on_fewer`: others were timed on prompts that it was not.
`resumed`: some record was made in another environment than its run began in. `uncompiled`: nothing was compiled for
the model that the method would look up.

Memory. A cell of which some record has simulated memory is `simulated`: scored and ranked as any other, but with no
place on the fronts. The column `memory` is there when some table has such a cell.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from harness.errors import HarnessError
from harness.records.board_record import BoardRecord, board_records
from harness.records.record import LACKS, CellKey, Key, Record, RunManifest
from harness.records.spec import AS, OWN
from leaderboards.stats.bootstrap import LEVEL, NOTHING, RESAMPLES, SEED, Array, Estimate
from leaderboards.stats.closed import closed
from leaderboards.stats.comparable import FULL, NOT_GIVEN, STATUSES, Axes, budget_order, one_per_key, split_by_axes
from leaderboards.stats.floors import floors
from leaderboards.stats.frontiers import Frontiers, compare_kinds
from leaderboards.stats.grid import MEASURED, Grid, Wanted
from leaderboards.stats.lengths import lengths
from leaderboards.stats.observing import observe_columns
from leaderboards.stats.pairs import pairs
from leaderboards.stats.pareto import FRONTS, fronts
from leaderboards.stats.processors import Elsewhere, elsewhere
from leaderboards.stats.ranks import Ranking, rank_columns
from leaderboards.stats.reads import read_columns
from leaderboards.stats.relay import relayed
from leaderboards.stats.stored import stored_columns
from leaderboards.stats.subject import compare
from leaderboards.stats.summaries import summarise
from leaderboards.stats.visible import visible
from leaderboards.stats.worst import tail_columns

BASELINES = ("fullkv", "snapkv")
"""Methods that every cell is compared with."""


@dataclass(frozen=True)
class Note:
    """A footnote: what (a note of the method, or a status), where, in how many records, and the first error."""

    method: str
    budgets: tuple[str, ...]
    what: str
    count: int
    error: str = ""


@dataclass(frozen=True)
class Table:
    """One board. `rows`: one per (budget, method), columns as `_row` writes them; `tasks`: one per cell and task.

    summaries, rivals: as `summaries.summarise` and `subject.compare` make them; may be empty. ranking: which tasks
    rank, or why none does. baselines: wanted label to the label used, or None. duplicates: cells measured in several
    runs; one of each is used, see `comparable.one_per_key`, which says `differing` too. elsewhere: the same sweep on
    other processors. changes: of the environment, since a run began, and how many records have each. floors, closed,
    visible, lengths, pairs, relay, frontiers: as the modules of these names make them.
    """

    axes: Axes
    rows: pd.DataFrame
    tasks: pd.DataFrame
    summaries: pd.DataFrame
    rivals: pd.DataFrame
    ranking: Ranking
    run_ids: tuple[str, ...]
    samples: int
    baselines: dict[str, str | None]
    notes: tuple[Note, ...]
    duplicates: int
    elsewhere: tuple[Elsewhere, ...] = ()
    differing: tuple[tuple[str, str, int, Key], ...] = ()
    changes: tuple[tuple[str, int], ...] = ()
    floors: pd.DataFrame = field(default_factory=pd.DataFrame)
    closed: pd.DataFrame = field(default_factory=pd.DataFrame)
    visible: pd.DataFrame = field(default_factory=pd.DataFrame)
    lengths: pd.DataFrame = field(default_factory=pd.DataFrame)
    pairs: pd.DataFrame = field(default_factory=pd.DataFrame)
    relay: pd.DataFrame = field(default_factory=pd.DataFrame)
    frontiers: pd.DataFrame = field(default_factory=pd.DataFrame)


TableRow = Mapping[Any, Any]
"""A row of `Table.rows` or of its other frames: column to value."""


def aggregate(
    records: Iterable[Record | BoardRecord],
    *,
    manifests: Sequence[RunManifest] = (),
    subject: str | None = None,
    frontiers: Frontiers = MappingProxyType({}),
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> list[Table]:
    """Tables in the order of their axes. The order of `records` does not matter, nor whether they are in brief.

    manifests: of the runs the records come from; without them only the axes that are in the records are told apart.
    subject: label of the method to judge against the strongest other one of each task family. frontiers: kinds of
    methods to set against each other.

    Raises HarnessError when there is no record, an ok record has no score, one sample id stands for two prompts, or no
    table has the subject.
    """
    groups = split_by_axes(board_records(records), manifests=manifests)
    if not groups:
        raise HarnessError("no records to make a board of; run a benchmark first")
    labels = {r.method for group in groups.values() for r in group if r.budget not in NOT_GIVEN}
    if subject is not None and subject not in labels:
        known = ", ".join(sorted(labels)) or "none"
        raise HarnessError(f"no method {subject!r} with a budget in these records; methods with one: {known}")
    others = elsewhere(groups, manifests)
    tables = [
        _table(axes, group, manifests, subject, frontiers, others[axes], seed=seed, resamples=resamples)
        for axes, group in groups.items()
    ]
    if all((table.rows["memory"] == "physical").all() for table in tables):
        for table in tables:
            del table.rows["memory"]
    if not any(axes.division for axes in groups):
        for table in tables:
            del table.rows["division"]
    return tables


def _table(
    axes: Axes,
    records: list[BoardRecord],
    manifests: Sequence[RunManifest],
    subject: str | None,
    frontiers: Frontiers,
    others: tuple[Elsewhere, ...],
    *,
    seed: int,
    resamples: int,
) -> Table:
    chosen, duplicates, differing = one_per_key(records, manifests=manifests)
    grid = Grid(chosen, seed=seed, resamples=resamples)
    used = {wanted: _baseline(wanted, grid.cells) for wanted in BASELINES}
    grid.prepare(_wanted(grid, used))
    means = {c: grid.estimate(c, "score").mean for c in grid.cells}
    order = sorted(grid.cells, key=lambda c: (budget_order(c[1]), -np.nan_to_num(means[c], nan=-1), c[0]))
    ranked, ranking = rank_columns(grid)
    tailed, timed = tail_columns(grid), _measured(grid, told=not ranking.eligible["score"].why)
    observing, stored, read = observe_columns(grid), stored_columns(grid), read_columns(grid)
    marks = _marks(grid, ranked)
    costs = {c: stored[c] | read[c] | observing[c] for c in order}
    more = {c: {**costs[c], "mark": marks.get(c, ""), **timed[c], **ranked[c], **tailed[c]} for c in order}
    rows = pd.DataFrame([_flagged({**asdict(axes), **_row(grid, c, used), **more[c]}, grid, c) for c in order])
    rows.attrs = {"seed": seed, "resamples": resamples, "level": LEVEL}
    rows.attrs["state_bytes"] = max(r.state_bytes for r in chosen)
    tasks = pd.DataFrame([row for c in order for row in _task_rows(grid, c)])
    runs = tuple(sorted({r.run_id for r in records}))
    summaries, rivals = summarise(grid, order), compare(grid, subject)
    samples, notes = len(grid.samples), _notes(chosen)
    made = (axes, rows, tasks, summaries, rivals, ranking, runs, samples, used, notes, duplicates, others, differing)
    seen, decoded = visible(grid, ranking), lengths(grid, order)
    changes = tuple(sorted(Counter(change for r in chosen for change in r.environment_changes).items()))
    last = (floors(grid), closed(grid), seen, decoded, pairs(grid), relayed(grid, order))
    kinds = compare_kinds(grid, frontiers)
    return Table(*made, changes, *last, kinds)


def _baseline(wanted: str, cells: Iterable[CellKey]) -> str | None:
    """The label itself, else the only preset of that method, else None."""
    labels = {method for method, _ in cells if method.partition("@")[0] == wanted}
    if wanted in labels or not labels:
        return wanted if labels else None
    return labels.pop() if len(labels) == 1 else None


def _base(grid: Grid, cell: CellKey, label: str | None) -> CellKey | None:
    """The cell of a baseline at the same budget, else without one: of a method of its own, at what that kept."""
    same = AS + cell[0] if cell[1] == OWN else cell[1]
    candidates = [(label, budget) for budget in (same, FULL) if label is not None and label != cell[0]]
    return next((c for c in candidates if c in grid.cells), None)


def _wanted(grid: Grid, baselines: dict[str, str | None]) -> Iterator[Wanted]:
    """The estimates of all rows."""
    for cell in grid.cells:
        bases = [_base(grid, cell, label) for label in baselines.values()]
        yield cell, "needle", None
        yield from product([cell], ["score", "nll"], [None, *filter(None, bases)])


def _row(grid: Grid, cell: CellKey, baselines: dict[str, str | None]) -> dict[str, Any]:
    """One row of the table.

    Columns: `score_points` (0-100) and `nll_nats` (per token), each with `_mean _low _high _n` and the same behind
    `_vs_<baseline>`; `needle_percent` still cached; mean bytes; counts by status; and flags in words.
    """
    row: dict[str, Any] = {"budget": cell[1], "method": cell[0], "memory": grid.memory(cell)}
    for name, what in (("score_points", "score"), ("nll_nats", "nll")):
        row |= _columns(name, grid.estimate(cell, what))
        for wanted, label in baselines.items():
            base = _base(grid, cell, label)
            paired = grid.estimate(cell, what, minus=base) if base else NOTHING
            row |= _columns(f"{name}_vs_{wanted}", paired)
    row |= _columns("needle_percent", grid.estimate(cell, "needle"))
    counts = grid.counts(cell)
    sizes = {what: grid.values(cell, what) for what in ("kv_bytes", "asked_bytes", "full_bytes")}
    row |= {f"{what}_mean": _mean(column) for what, column in sizes.items()}
    kept, full = np.nansum(sizes["kv_bytes"]), np.nansum(sizes["full_bytes"])
    row |= {
        "kv_percent_of_full": 100 * kept / full if full else math.nan,
        **{f"n_{status}": counts[status] for status in STATUSES},
        "n_over_budget": grid.over_budget(cell),
        "n_expected": np.count_nonzero(grid.expected(cell[1])),
    }
    present = {"incomplete": not grid.complete(cell), **{s: counts[s] for s in STATUSES[1:]}}
    present |= {"over_budget": row["n_over_budget"], "few": grid.few(cell)}
    present["unknown"] = grid.unnamed(grid.values(cell, "score"))
    return {**row, "flags": " ".join(name for name, here in present.items() if here)}


def _flagged(row: dict[str, Any], grid: Grid, cell: CellKey) -> dict[str, Any]:
    """The row with the flags that more than its own samples tell."""
    more = {
        "under_budget": row.get("n_under_budget"),
        "other_samples": grid.complete(cell) and (grid.expected(FULL) & ~grid.expected(cell[1])).any(),
        "timed_on_fewer": grid.timed_on_fewer(cell),
        "resumed": any(r is not None and r.environment_changes for r in grid.cells[cell]),
        "uncompiled": any(note.startswith(LACKS) for r in grid.cells[cell] if r is not None for note in r.notes),
    }
    return {**row, "flags": " ".join([*row["flags"].split(), *(name for name, here in more.items() if here)])}


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {f"{name}_{part}": value for part, value in estimate._asdict().items()}


def _marks(grid: Grid, ranked: Mapping[CellKey, Mapping[str, Any]]) -> dict[CellKey, str]:
    """`*` or `=` for the cells that have one; the rule is in the module's header."""
    marks: dict[CellKey, str] = {}
    for budget in {budget for _, budget in grid.cells} - NOT_GIVEN:
        rivals = [c for c in grid.cells if c[1] == budget and grid.counts(c)["ok"] and not grid.over_budget(c)]
        if len(rivals) < 2 or not any(map(grid.complete, rivals)):
            continue
        first = [c for c in rivals if ranked[c]["rank_low"] == 1]
        alone = len(first) == 1 and ranked[first[0]]["rank_high"] == 1
        marks.update(dict.fromkeys(filter(grid.complete, first), "*" if alone else "="))
    return marks


def _measured(grid: Grid, *, told: bool) -> dict[CellKey, dict[str, Any]]:
    """Columns of a table with a measurement, none otherwise: means over the samples measured, their number, fronts.

    told: whether a score may be told better; else there are no fronts.
    """
    if not grid.measured():
        return {cell: {} for cell in grid.cells}
    marks = fronts(grid) if told else {cell: dict.fromkeys(FRONTS, "") for cell in grid.cells}
    rows = {}
    for cell in grid.cells:
        means = {f"{what}_mean": _mean(grid.values(cell, what)) for what in MEASURED}
        rows[cell] = {**means, "n_measured": np.count_nonzero(~np.isnan(grid.values(cell, "tpot_s"))), **marks[cell]}
    return rows


def _mean(column: Array) -> float:
    return math.nan if np.isnan(column).all() else float(np.nanmean(column))


def _task_rows(grid: Grid, cell: CellKey) -> Iterator[dict[str, Any]]:
    for task, here in grid.bootstrap.rows.items():
        score, nll, needle = (grid.values(cell, what)[here] for what in ("score", "nll", "needle"))
        yield {
            "budget": cell[1],
            "method": cell[0],
            "task": task,
            "n_ok": np.count_nonzero(~np.isnan(score)),
            "n_expected": np.count_nonzero(grid.expected(cell[1])[here]),
            "score_points_mean": _mean(score),
            "nll_nats_mean": _mean(nll),
            "needle_percent_mean": _mean(needle),
        }


def _notes(records: Sequence[BoardRecord]) -> tuple[Note, ...]:
    """One per method and note, and one per method and status that is not ok, with the first error in key order."""
    found: dict[tuple[str, str], list[BoardRecord]] = defaultdict(list)
    for r in records:
        states = {r.status, "over budget" if r.over_budget else "ok"} - {"ok"}
        for what in states | set(filter(None, r.notes)):
            found[r.method, what].append(r)
    notes = []
    for (method, what), where in sorted(found.items()):
        budgets = tuple(sorted({r.budget for r in where}, key=budget_order))
        error = next((r.error for r in where if r.error), "") if what in STATUSES else ""
        notes.append(Note(method, budgets, what, len(where), error))
    return tuple(notes)
