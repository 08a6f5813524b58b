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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

from harness.errors import HarnessError
from harness.records.board_record import BoardRecord, board_records
from harness.records.record import READ, Key, Record, RunManifest
from harness.records.spec import AS, OWN, TaskSpec
from harness.records.spec import FULL as FULL
from leaderboards.stats.machines import listed, processor

AnyRecord = TypeVar("AnyRecord", Record, BoardRecord)
STATUSES = ("ok", "skipped", "failed", "oom")
NOT_GIVEN = frozenset({FULL, OWN})
"""Budgets of methods that are given none, among which nothing is ranked."""
UNKNOWN = "unknown processor"
SEEN = 5e-4
"""Nats per token by which two records of a cell differ on a board."""
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
    cards = listed(manifest.machine, "accelerators") if kind != "cpu" else []
    name = name or next(iter(cards), processor(manifest.machine) or UNKNOWN)
    return name if kind == "cpu" else f"{name} ({kind})"


class Chosen(NamedTuple, Generic[AnyRecord]):
    """One record per key, in key order. several: keys that had more than one; differing: pairs of runs that disagree.

    differing: the run whose record is used, the other one, how many keys they disagree in, and the first of those.
    """

    records: list[AnyRecord]
    several: int
    differing: tuple[tuple[str, str, int, Key], ...]


def one_per_key(records: Iterable[AnyRecord], *, manifests: Sequence[RunManifest] = ()) -> Chosen[AnyRecord]:
    """Choose one record of each key.

    Ok goes first, then physical memory, then a measured one, then that of a finished run, then of the run that was
    started last, as its manifest says. Raises HarnessError when one sample id stands for two prompts.
    """
    by_key: dict[Key, AnyRecord] = {}
    several: dict[Key, list[AnyRecord]] = {}
    for r in records:
        key = r.key
        if key in by_key:
            several.setdefault(key, [by_key[key]]).append(r)
        else:
            by_key[key] = r
    age = {m.run_id: (m.status != "finished", -_seconds(m.started)) for m in manifests}
    by_key |= {key: min(found, key=lambda r: _preference(r, age)) for key, found in several.items()}
    chosen = [by_key[key] for key in sorted(by_key)]
    _check_prompts(chosen)
    pairs: dict[tuple[str, str], list[Key]] = defaultdict(list)
    for key in sorted(several):
        for other in several[key]:
            if _differ(by_key[key], other):
                pairs[by_key[key].run_id, other.run_id].append(key)
    differing = [(used, other, len(keys), keys[0]) for (used, other), keys in sorted(pairs.items())]
    return Chosen(chosen, len(several), tuple(differing))


def _preference(record: Record | BoardRecord, age: Mapping[str, tuple[bool, float]]) -> tuple[object, ...]:
    """Smaller is better. The last two settle what is equal in everything else."""
    (r,) = board_records([record])
    state = (STATUSES.index(r.status), r.memory != "physical", r.timed is None)
    return (*state, *age.get(r.run_id, (True, 0.0)), r.run_id, repr(r))


def _differ(one: Record | BoardRecord, other: Record | BoardRecord) -> bool:
    """Whether both are ok and a reader would see another score, NLL or number of bytes."""
    a, b = board_records([one, other])
    if a.status != "ok" or b.status != "ok":
        return False
    nlls = [math.nan if r.nll is None else r.nll for r in (a, b)]
    moved = abs(nlls[0] - nlls[1]) > SEEN or math.isnan(nlls[0]) != math.isnan(nlls[1])
    return (a.score, a.kv_bytes, a.stored_bytes) != (b.score, b.kv_bytes, b.stored_bytes) or moved


def _seconds(when: str) -> float:
    """Since 1970, of a time as manifests hold it; one that is none is older than all others."""
    try:
        found = datetime.fromisoformat(when)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return -math.inf


def is_of_reading(budget: str) -> bool:
    """Whether it says how much of a cache is read and not how much is held: nothing such is ranked by what it holds."""
    return budget.startswith(READ)


def is_of_given(budget: str) -> bool:
    """Whether it is a number of tokens or a share of the full cache."""
    return budget_order(budget)[0] in (1, 2)


def budget_order(budget: str) -> tuple[int, float, str]:
    """Sort key: methods that are given none first, then tokens, fractions, and what another method kept.

    Those of what is read come behind all.
    """
    if is_of_reading(budget):
        return (5, budget_order(budget.removeprefix(READ))[1], budget)
    try:
        size = float(budget)
    except ValueError:
        size = math.nan
    if not math.isfinite(size):
        return (0 if budget in NOT_GIVEN else 4 if budget.startswith(AS) else 3, 0.0, budget)
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
        places |= {"answered by": f"{m.spec.answered_by.name} {m.spec.answered_map[:12]}"} if m.spec.answered_by else {}
        protocols = {f"{task.name} protocol": task.protocol for task in m.spec.tasks}
        runs[m.run_id] = {f"{m.spec.model.name} revision": m.spec.model.revision, **fixed, **protocols, **places}
    seen = {pair for values in runs.values() for pair in values.items()}
    differ = sorted(name for name, n in Counter(name for name, _ in seen).items() if n > 1)
    return {run: ", ".join(f"{name} {v[name]}" for name in differ if name in v) for run, v in runs.items()}
