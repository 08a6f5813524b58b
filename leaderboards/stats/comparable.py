"""Which records may share a table, in which order, and which one stands for a cell that several runs hold.

Records that differ in model, dtype, processor, query mode, first_token, seed, or in any setting of their runs that
decides numbers (model revision, token limits, a task's protocol) never share a table: each combination is its own.
So do runs that timed their cells on different machines: speed is ranked within one machine only. A run that timed
nothing joins those of one machine, for its scores do.

Divisions. Tasks of our own, whose protocol is named as their family is, are never averaged with those of a published
protocol: a group of records with both is two tables, `official tasks` and `own tasks`, each with its own means, ranks
and verdicts. One with either kind alone, or of runs without a manifest, is as it was.

Processor. That of a record is what ran it: two processors round sums differently, and in bfloat16 that moves answers. A
record that nothing ran takes the processor of most of its run's, or what the manifest says.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TypeVar

from harness.errors import HarnessError
from harness.records.board_record import BoardRecord, board_records
from harness.records.record import Record, RunManifest
from harness.records.spec import TaskSpec

AnyRecord = TypeVar("AnyRecord", Record, BoardRecord)
STATUSES = ("ok", "skipped", "failed", "oom")
FULL = "full"
"""The budget of a method without one."""
UNKNOWN = "unknown processor"
DIVISIONS = ("official tasks", "own tasks")


@dataclass(frozen=True, order=True)
class Axes:
    """What all records of a table share. settings: run settings that differ between the runs given, else empty.

    processor: GPU, with its kind of device, or processor, as `processor_of` names it. division: one of `DIVISIONS`
    where the same sweep has both, else empty.
    """

    model: str
    dtype: str
    processor: str
    query: str
    first_token: str
    seed: int
    settings: str = ""
    division: str = ""


def split_by_axes(
    records: Iterable[AnyRecord], *, manifests: Sequence[RunManifest] = ()
) -> dict[Axes, list[AnyRecord]]:
    """Records by axes, axes in order. Without the manifests only the axes that are in a record are told apart."""
    settings, about = settings_of(manifests), {m.run_id: m for m in manifests}
    of_run = attrgetter("run_id", "model", "dtype", "query", "first_token", "seed")
    runs: dict[tuple[str, str, str, str, str, int], dict[str, list[AnyRecord]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        runs[of_run(r)][r.accelerator].append(r)
    groups: dict[Axes, list[AnyRecord]] = defaultdict(list)
    for (run_id, model, dtype, query, first_token, seed), by_name in runs.items():
        named = sorted((-len(some), name) for name, some in by_name.items() if name)
        most = named[0][1] if named else ""
        for name, some in by_name.items():
            place = processor_of(name or most, about.get(run_id))
            groups[Axes(model, dtype, place, query, first_token, seed, settings.get(run_id, ""))] += some
    own = {(m.run_id, task.name) for m in manifests for task in m.spec.tasks if is_own(task)}
    return {axes: some for at in sorted(groups) for axes, some in _divisions(at, groups[at], own).items()}


def is_own(task: TaskSpec) -> bool:
    """Whether a task follows no protocol but our own, which begins with the name of its family."""
    return task.protocol.partition("/")[0] == task.name.partition("/")[0]


def _divisions(axes: Axes, records: list[AnyRecord], own: Collection[tuple[str, str]]) -> dict[Axes, list[AnyRecord]]:
    """The records by division where they are of both, else together. own: run and name of tasks of our own."""
    parts: tuple[list[AnyRecord], list[AnyRecord]] = ([], [])
    for r in records:
        parts[(r.run_id, r.task) in own].append(r)
    if not all(parts):
        return {axes: records}
    return {replace(axes, division=name): part for name, part in zip(DIVISIONS, parts, strict=True)}


def processor_of(name: str, manifest: RunManifest | None) -> str:
    """What computed, in words: `name` or what the manifest says, and the kind of device where that is no CPU."""
    if manifest is None:
        return name or UNKNOWN
    kind = manifest.spec.model.device.partition(":")[0]
    cards = manifest.machine.get("accelerators") or () if kind != "cpu" else ()
    name = name or str(next(iter(cards), manifest.machine.get("processor") or UNKNOWN))
    return name if kind == "cpu" else f"{name} ({kind})"


def one_per_key(records: Iterable[AnyRecord]) -> tuple[list[AnyRecord], int]:
    """One record per key, in key order, and how many keys had several.

    Ok goes first, then physical memory, then a measured one, then the smallest run id.
    Raises HarnessError when one sample id stands for two prompts.
    """
    by_key: dict[tuple[str, str, str, str], AnyRecord] = {}
    several: dict[tuple[str, str, str, str], list[AnyRecord]] = {}
    for r in records:
        key = r.key
        if key in by_key:
            several.setdefault(key, [by_key[key]]).append(r)
        else:
            by_key[key] = r
    by_key |= {key: min(found, key=_preference) for key, found in several.items()}
    chosen = [by_key[key] for key in sorted(by_key)]
    _check_prompts(chosen)
    return chosen, len(several)


def _preference(record: Record | BoardRecord) -> tuple[int, bool, bool, str, str]:
    (r,) = board_records([record])
    return (STATUSES.index(r.status), r.memory != "physical", r.timed is None, r.run_id, repr(r))


def budget_order(budget: str) -> tuple[int, float, str]:
    """Sort key: without a budget first, then tokens, then fractions."""
    try:
        size = float(budget)
    except ValueError:
        size = math.nan
    if not math.isfinite(size):
        return (0 if budget == FULL else 3, 0.0, budget)
    return (2 if "." in budget else 1, size, budget)


def _check_prompts(records: Iterable[Record | BoardRecord]) -> None:
    prompts: dict[tuple[str, str], Record | BoardRecord] = {}
    for r in (r for r in records if r.prompt_sha256):
        first = prompts.setdefault((r.task, r.sample_id), r)
        if first.prompt_sha256 != r.prompt_sha256:
            raise HarnessError(
                f"{r.task} sample {r.sample_id} is not the same prompt in runs {first.run_id} and {r.run_id} "
                "(other data or another truncation); make one board for each"
            )


def settings_of(manifests: Sequence[RunManifest], *, timed: bool = True) -> dict[str, str]:
    """Run id to the number-deciding settings in which the runs differ; a setting all runs agree on is no axis.

    timed: whether the machine that cells were timed on is one.
    """
    runs: dict[str, dict[str, str]] = {}
    for m in manifests:
        fixed = {name: str(getattr(m.spec, name)) for name in ("max_tokens", "max_new_tokens", "nll_tokens")}
        places = {"measured on": m.spec.measured_on} if timed and m.spec.measured_on is not None else {}
        protocols = {f"{task.name} protocol": task.protocol for task in m.spec.tasks}
        runs[m.run_id] = {f"{m.spec.model.name} revision": m.spec.model.revision, **fixed, **protocols, **places}
    seen = {pair for values in runs.values() for pair in values.items()}
    differ = sorted(name for name, n in Counter(name for name, _ in seen).items() if n > 1)
    return {run: ", ".join(f"{name} {v[name]}" for name in differ if name in v) for run, v in runs.items()}
