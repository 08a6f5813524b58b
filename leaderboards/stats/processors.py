"""The same sweep on another processor: how far the mean of a row moves, on the prompts that both have.

Tables that differ in nothing but their processor, or in the machine that timed them, are of one sweep. Each says of
each other one which row, a method at a budget, moves most: in score and in NLL, by means of task means.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from harness.records.board_record import BoardRecord
from harness.records.record import CellKey, RunManifest
from leaderboards.stats.comparable import Axes, one_per_key, settings_of

Values = Mapping[CellKey, Mapping[tuple[str, str, str], tuple[float | None, float | None]]]
"""Of a cell by (task, sample, prompt): score in points and NLL, None where there is none."""


class Moved(NamedTuple):
    """The row that moves most. here, there: its means, points or nats a token, over the same `n` prompts."""

    method: str
    budget: str
    here: float
    there: float
    n: int


class Elsewhere(NamedTuple):
    """What is known of another processor; None where no row has both."""

    processor: str
    score: Moved | None
    nll: Moved | None


def elsewhere(
    groups: Mapping[Axes, Sequence[BoardRecord]], manifests: Sequence[RunManifest]
) -> dict[Axes, tuple[Elsewhere, ...]]:
    """Of each table what the others of its sweep say, in the order of their axes; nothing where it is alone."""
    settings = settings_of(manifests, timed=False)
    sweeps: dict[tuple[object, ...], list[Axes]] = {}
    for axes, records in groups.items():
        run = settings.get(records[0].run_id, "")
        sweep = (axes.model, axes.dtype, axes.query, axes.first_token, axes.seed, axes.division, run)
        sweeps.setdefault(sweep, []).append(axes)
    found: dict[Axes, tuple[Elsewhere, ...]] = dict.fromkeys(groups, ())
    for alike in sweeps.values():
        if len({axes.processor for axes in alike}) < 2:
            continue
        values = {axes: _values(groups[axes], manifests) for axes in alike}
        for one, other in permutations(alike, 2):
            if one.processor != other.processor:
                score, nll = (_most_moved(values[one], values[other], measure) for measure in (0, 1))
                found[one] = (*found[one], Elsewhere(other.processor, score, nll))
    return found


def _values(records: Sequence[BoardRecord], manifests: Sequence[RunManifest]) -> Values:
    values: dict[CellKey, dict[tuple[str, str, str], tuple[float | None, float | None]]] = {}
    for r in one_per_key(records, manifests=manifests).records:
        if r.status == "ok":
            score = None if r.score is None else 100 * r.score
            values.setdefault((r.method, r.budget), {})[r.task, r.sample_id, r.prompt_sha256] = (score, r.nll)
    return values


def _most_moved(here: Values, there: Values, measure: int) -> Moved | None:
    """The row whose mean differs most; of equal differences the first by name."""
    found = []
    for cell in sorted(here.keys() & there.keys()):
        pairs = [
            (*key, here[cell][key][measure], there[cell][key][measure]) for key in here[cell] if key in there[cell]
        ]
        tasks: dict[str, list[tuple[float, float]]] = {}
        for task, _, _, one, other in pairs:
            if one is not None and other is not None:
                tasks.setdefault(task, []).append((one, other))
        if tasks:
            one, other = np.mean([np.mean(own, axis=0) for own in tasks.values()], axis=0).tolist()
            found.append(Moved(*cell, one, other, sum(map(len, tasks.values()))))
    return max(found, key=lambda moved: round(abs(moved.here - moved.there), 9), default=None)
