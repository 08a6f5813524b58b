"""Two runs side by side: the settings in which they differ, and row by row their means on the prompts that both have.

Rows. A cell (method, budget, task) that both runs have, and of each method at a budget the mean over tasks. Where both
have the same prompt, by its hash, and are ok, the row is paired: both means are over those samples, with the
difference, second less first, its bootstrap interval over contexts and a two-sided sign-flip test. A row without such a
prompt has the means of each run's own samples, and no difference.

Surely different. Two-sided p, twice the smaller side, corrected by Holm and Tarone over the scores and NLLs of all rows
(`leaderboards.stats.paired`): any wrong claim among them has a chance of 5 % at most.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from leaderboards.stats.bootstrap import LEVEL, NOTHING, Estimate
from leaderboards.stats.comparable import budget_order, one_per_key, split_by_axes
from leaderboards.stats.paired import ALL, SIGNS, changes, holm, joined, table_of

Run = tuple[RunManifest, Sequence[Record]]
Cell = tuple[str, str, str]
CELL = ["budget", "method", "task"]


@dataclass(frozen=True)
class Setting:
    """A setting as both runs have it, as text; empty where a run lacks it."""

    name: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        return self.first != self.second


@dataclass(frozen=True)
class Pair:
    """A measure of a row: both means, their difference, and its two-sided p after correction."""

    first: float
    second: float
    difference: Estimate = NOTHING
    corrected_p: float = 1.0

    @property
    def sure(self) -> bool:
        return self.corrected_p <= 1 - LEVEL


@dataclass(frozen=True)
class Row:
    """A row of both runs. n: prompts that both have and that are ok in both; outputs: of those, how many differ.

    first_bytes, second_bytes: kept after compression on those, in sum.
    """

    budget: str
    method: str
    task: str
    score: Pair
    nll: Pair
    n: int = 0
    outputs: int = 0
    first_bytes: int = 0
    second_bytes: int = 0


@dataclass(frozen=True)
class TwoRuns:
    """settings: all of them, those that differ among them. only: what one run has alone, a line each.

    tokens, behind: of the paired outputs, and of those the ones from the first difference on. unnamed: paired prompts
    that do not name their context, and count as one each.
    """

    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]
    only: tuple[str, ...]
    tokens: int
    behind: int
    unnamed: int


def compare_runs(first: Run, second: Run) -> TwoRuns:
    """What differs between two runs. Raises HarnessError when a run has no records, or no row is in both."""
    tables = [_table(*run) for run in (first, second)]
    cells = [set(zip(*(table[name] for name in CELL), strict=True)) for table in tables]
    if not cells[0] & cells[1]:
        ids = f"{first[0].run_id} and {second[0].run_id}"
        raise HarnessError(f"runs {ids} have no method at a budget on a task in common; name runs that share some")
    both = joined(*tables)
    both = both[(both.prompt == both.prompt_before) & (both.prompt != "")]
    both = both[(both.status == "ok") & (both.status_before == "ok")].reset_index(drop=True)
    lengths = [_lengths(*outputs) for outputs in zip(both.output_before, both.output, strict=True)]
    both["differs"] = [behind > 0 for _, behind in lengths]
    rows = list(_paired_rows(both))
    paired = {(row.budget, row.method, row.task) for row in rows}
    rows += [_own_means(tables, cell) for cell in cells[0] & cells[1] - paired]
    rows.sort(key=lambda row: (budget_order(row.budget), row.method, row.task == ALL, row.task))
    return TwoRuns(
        settings=_settings(first, second),
        rows=tuple(rows),
        only=tuple(_only(tables, cells)),
        tokens=sum(tokens for tokens, _ in lengths),
        behind=sum(behind for _, behind in lengths),
        unnamed=len(both[both.group == ""].groupby(["task", "sample_id"])),
    )


def _table(manifest: RunManifest, records: Sequence[Record]) -> pd.DataFrame:
    """The run's lines with their outputs: token ids, or the text where there are none."""
    chosen = one_per_key(records).records
    if not chosen:
        raise HarnessError(f"no records in run {manifest.run_id}; there is nothing to compare")
    outputs: list[Any] = [r.token_ids or r.prediction for r in chosen]
    return table_of(chosen).assign(output=outputs)


def _lengths(first: Sequence[object], second: Sequence[object]) -> tuple[int, int]:
    """Tokens of the longer output, and of those the ones from the first difference on."""
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    longer = max(len(first), len(second))
    return longer, longer - same


def _paired_rows(both: pd.DataFrame) -> Iterator[Row]:
    """The rows that have a prompt of both runs."""
    found = list(changes(both))
    p = np.array([min(1.0, 2 * min(c.worse, c.better)) for c in found])
    least = np.array([min(1.0, 2 * c.least) for c in found])
    corrected, _ = holm(p, least, 1 - LEVEL)
    pairs: dict[Cell, dict[str, Pair]] = {}
    for c, own in zip(found, corrected.tolist(), strict=True):
        pairs.setdefault((c.budget, c.method, c.task), {})[c.measure] = Pair(c.before, c.now, c.change, own)
    for (budget, method, task), measures in pairs.items():
        own = both[(both.budget == budget) & (both.method == method)]
        own = own if task == ALL else own[own.task == task]
        sums = [sum(own[name].tolist()) for name in ("differs", "kv_bytes_before", "kv_bytes")]
        nothing = Pair(float("nan"), float("nan"))
        score, nll = (measures.get(measure, nothing) for measure in SIGNS)
        yield Row(budget, method, task, score, nll, len(own), *sums)


def _own_means(tables: Sequence[pd.DataFrame], cell: Cell) -> Row:
    """A row whose prompts differ: the means of each run's own samples."""
    budget, method, task = cell
    here = [t[(t.budget == budget) & (t.method == method) & (t.task == task)] for t in tables]
    score, nll = (Pair(float(here[0][measure].mean()), float(here[1][measure].mean())) for measure in SIGNS)
    return Row(budget, method, task, score, nll)


def _only(tables: Sequence[pd.DataFrame], cells: Sequence[set[Cell]]) -> Iterator[str]:
    """What one of the runs has alone: tasks, methods at budgets, and single rows; and prompts that differ."""
    for i, words in ((0, "first"), (1, "second")):
        own, other = cells[i], cells[1 - i]
        tasks = {task for *_, task in own} - {task for *_, task in other}
        methods = {cell[:2] for cell in own} - {cell[:2] for cell in other}
        yield from (f"only in the {words}: task {task}" for task in sorted(tasks))
        yield from (f"only in the {words}: {method} at {budget}" for budget, method in sorted(methods))
        rest = (cell for cell in own - other if cell[2] not in tasks and cell[:2] not in methods)
        yield from (f"only in the {words}: {method} at {budget} on {task}" for budget, method, task in sorted(rest))
    prompts = [t[t.prompt != ""].groupby(["task", "sample_id"]).prompt.max() for t in tables]
    first, second = prompts[0].align(prompts[1], join="outer")
    for task, same in (first == second).groupby(level="task"):
        has = [int(p[p.index.get_level_values("task") == task].size) for p in prompts]
        if all(has) and not same.all():
            yield f"{task}: {int(same.sum())} prompts in common, of {has[0]} in the first and {has[1]} in the second"


def _settings(first: Run, second: Run) -> tuple[Setting, ...]:
    """Every setting of both, in the order of the first; of methods and tasks those that both have."""
    specs = (first[0].spec, second[0].spec)
    labels = set.intersection(*({method.label for method in spec.methods} for spec in specs))
    tasks = set.intersection(*({task.name for task in spec.tasks} for spec in specs))
    told = [_told(*run, labels | tasks) for run in (first, second)]
    return tuple(Setting(name, *(own.get(name, "") for own in told)) for name in {**told[0], **told[1]})


def _told(manifest: RunManifest, records: Sequence[Record], shared: set[str]) -> dict[str, str]:
    """The settings of a run by name, whatever fields its spec has. shared: labels and task names to look into."""
    spec = manifest.spec
    plain = spec.model_dump(mode="json", exclude={"schema_version", "model", "methods", "tasks"})
    processors = sorted({axes.processor for axes in split_by_axes(records, manifests=[manifest])})
    found: dict[str, Any] = {"model": spec.model.name, **spec.model.model_dump(mode="json", exclude={"name"})}
    found |= {"processor": " + ".join(processors), "commit": manifest.git_commit, **plain}
    found["methods"] = [method.label for method in spec.methods]
    found["tasks"] = [task.name for task in spec.tasks]
    for method in spec.methods:
        found |= {f"{method.label} {name}": value for name, value in method.params.items() if method.label in shared}
    for task in spec.tasks:
        about = {"protocol": task.protocol, **task.provenance}
        found |= {f"{task.name} {name}": value for name, value in about.items() if task.name in shared}
    found |= {f"version of {name}": value for name, value in manifest.versions.items()}
    found |= {f"machine {name}": value for name, value in manifest.machine.items() if name != "processor"}
    return {name: _text(value) for name, value in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(part, str | int) for part in value):
        return ", ".join(map(str, value))
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
