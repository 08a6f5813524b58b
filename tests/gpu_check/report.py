"""What a check found, as markdown: each goal with its figure, from the steps' files and the records beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError
from harness.records.bench_folder import BENCHES, BenchRecord, load_bench
from harness.records.boundary_folder import BOUNDARIES, BoundaryRecord, load_boundaries


@dataclass(frozen=True)
class Found:
    """Everything in a folder of results. steps: files of steps, by name without its number."""

    steps: dict[str, dict[str, Any]]
    benches: list[BenchRecord] = field(default_factory=list)
    searches: list[BoundaryRecord] = field(default_factory=list)

    @classmethod
    def read(cls, out: Path) -> Found:
        """Raises HarnessError where there is no result, or a damaged record."""
        files = files_of(out)
        if not files:
            raise HarnessError(f"no results of a GPU check in {out}; run `make gpu-check` first")
        steps = {path.stem.partition("-")[2]: json.loads(path.read_text(encoding="utf-8")) for path in files}
        folders = sorted({path.parent for path in (out / "records").glob("*/*.json")})
        benches = [own for own in folders if (own / BENCHES.manifest_file).exists()]
        searches = [own for own in folders if (own / BOUNDARIES.manifest_file).exists()]
        return cls(
            steps,
            [record for own in benches for record in load_bench(own)[1]],
            [record for own in searches for record in load_boundaries(own)[1]],
        )

    def at(self, step: str, name: str, figure: str) -> float | None:
        """A figure of a measurement; None where it was not made."""
        found = self.steps.get(step, {}).get("results", {}).get(name)
        return found.get(figure) if isinstance(found, dict) else None

    def ratio(self, step: str, one: tuple[str, str], other: tuple[str, str]) -> float | None:
        """One figure over another of the same step."""
        return over(self.at(step, *one), self.at(step, *other))

    def share_equal(self, step: str) -> float | None:
        """Of the measurements of a step that came to be, the share that say `same`."""
        results = self.steps.get(step, {}).get("results", {}).values()
        told = [own.get("float32", own).get("same", False) for own in results if own.get("status") != "skipped"]
        return sum(told) / len(told) if told else None

    def probe(self, method: str) -> BenchRecord | None:
        """The longest prompt's probe of a method, alone."""
        own = [r for r in self.benches if r.method == method and r.batch == 1 and r.measured is not None]
        return max(own, key=lambda record: record.tokens, default=None)

    def phase(self, method: str, phase: str) -> float | None:
        """Seconds of observing or compressing over those of the prefill."""
        found = self.probe(method)
        if found is None or found.measured is None:
            return None
        return over(getattr(found.measured, phase).median, found.measured.prefill_s.median)

    def largest(self, method: str) -> float | None:
        """The largest batch that fits."""
        own = [r.found for r in self.searches if r.method == method and r.found is not None]
        return float(own[0].answer) if own else None

    @property
    def rehearsal(self) -> bool:
        return any(step["rehearsal"] for step in self.steps.values())


class Goal(NamedTuple):
    """What is hoped for, in words; the figure found, None where there is none; and whether it is good enough."""

    words: str
    figure: Callable[[Found], float | None]
    good: Callable[[float], bool]


def files_of(out: Path) -> list[Path]:
    """The files of steps, in their order."""
    return sorted(out.glob("[0-9]*-*.json"), key=lambda path: int(path.name.partition("-")[0]))


def failed_tests(found: Found) -> float | None:
    """How many of the project's own tests failed; None when not both parts ran to their end."""
    parts = [found.at("tests", name, "failed") for name in ("marked", "kernels")]
    return None if None in parts else float(sum(map(len, parts)))


def over_floor(found: Found) -> float | None:
    """A step of one prompt at few slots over the time that a copy's bandwidth needs for what it reads."""
    return over(found.at("ceilings", "copy", "TBps"), found.at("decoding", "snapkv x 1", "TBps"))


def faster(found: Found) -> float | None:
    """The largest share of the full cache's time per token that few slots save, over the batches."""
    batches = [
        name.removeprefix("fullkv") for name in found.steps.get("decoding", {}).get("results", {}) if " x " in name
    ]
    pairs = {(f"snapkv{batch}", f"fullkv{batch}") for batch in batches}
    ratios = [found.ratio("decoding", (one, "graph_ms"), (other, "graph_ms")) for one, other in pairs]
    return max((1 - ratio for ratio in ratios if ratio is not None), default=None)


def furthest_peak(found: Found) -> float | None:
    """The largest relative difference of a measured peak from its prediction."""
    told = [record.measured for record in found.benches if record.measured is not None]
    return max((abs(m.peak_bytes / m.predicted_bytes - 1) for m in told), default=None)


GOALS = (
    Goal("own tests that fail", failed_tests, lambda x: x == 0),
    Goal("kernels equal to float64, share", lambda f: f.share_equal("kernels-equal"), lambda x: x == 1),
    Goal("methods equal to a CPU in float32, share", lambda f: f.share_equal("methods-equal"), lambda x: x == 1),
    Goal(
        "column sums over attention, at most 0.6",
        lambda f: f.ratio("whole-prompts", ("column sums", "ms"), ("engine", "ms")),
        lambda x: x <= 0.6,
    ),
    Goal("h2o: observing over prefill, at most 0.15", lambda f: f.phase("h2o", "observe_s"), lambda x: x <= 0.15),
    Goal(
        "compilerkv: observing over prefill, at most 0.15",
        lambda f: f.phase("compilerkv", "observe_s"),
        lambda x: x <= 0.15,
    ),
    Goal(
        "snapkv: compressing over prefill, at most 0.02", lambda f: f.phase("snapkv", "compress_s"), lambda x: x <= 0.02
    ),
    Goal(
        "adakv: compressing over prefill, at most 0.02", lambda f: f.phase("adakv", "compress_s"), lambda x: x <= 0.02
    ),
    Goal("snapkv x 1: a step over its floor, at most 1.1", over_floor, lambda x: x <= 1.1),
    Goal(
        "adakv x 16 over snapkv x 16, a step, at most 1.1",
        lambda f: f.ratio("decoding", ("adakv x 16", "graph_ms"), ("snapkv x 16", "graph_ms")),
        lambda x: x <= 1.1,
    ),
    Goal("peaks from their predictions, at most 0.05", furthest_peak, lambda x: x <= 0.05),
    Goal("largest batch of fullkv under 80 GB, 14 or 15", lambda f: f.largest("fullkv"), lambda x: 14 <= x <= 15),
    Goal("largest batch of snapkv there, at least 64", lambda f: f.largest("snapkv"), lambda x: x >= 64),
    Goal("papers: batch 16 at 32k fits at 1.56 % of the cache", lambda f: f.largest("snapkv"), lambda x: x >= 16),
    Goal("papers: up to 60 % less time per token", faster, lambda x: x >= 0.6),
    Goal(
        "seconds of all steps, at most 480",
        lambda f: sum(s.get("seconds", 0) for s in f.steps.values()),
        lambda x: x <= 480,
    ),
)


def report(out: Path) -> str:
    """Raises HarnessError as `Found.read` does."""
    found = Found.read(out)
    first = next(iter(found.steps.values()))
    title = f"# GPU check: {first['device']}"
    lines = [title, "", f"commit {first['commit']}, {first['at']}, torch {first['versions'].get('torch')}", ""]
    if found.rehearsal:
        lines += ["**A rehearsal on a CPU. Nothing was measured.**", ""]
    lines += table(("goal", "found", ""), [(goal.words, *_verdict(goal, found)) for goal in GOALS])
    for name, step in found.steps.items():
        lines += [f"## {name}: {step['status']}{'; ' + step['error'] if 'error' in step else ''}", ""]
        lines += table(("measured", "found"), [(own, _told(value)) for own, value in step["results"].items()])
    lines += ["## steps of batches", "", *table(STEP_COLUMNS, _step_rows(found))]
    lines += ["## probes", "", *table(PROBE_COLUMNS, map(_probe_row, found.benches))]
    return "\n".join(lines)


def _verdict(goal: Goal, found: Found) -> tuple[str, str]:
    figure = None if found.rehearsal else goal.figure(found)
    if figure is None:
        return "", "not measured"
    return f"{figure:.4g}", "met" if goal.good(figure) else "not met"


STEP_COLUMNS = ("method x batch", "step ms", "captured ms", "captured tokens/s", "share of the copy's bandwidth")


def _step_rows(found: Found) -> Iterator[tuple[str, ...]]:
    for name in found.steps.get("decoding", {}).get("results", {}):
        captured, batch = found.at("decoding", name, "graph_ms"), name.partition(" x ")[2]
        if captured is not None:
            share = over(found.at("decoding", name, "TBps"), found.at("ceilings", "copy", "TBps"))
            figures = (found.at("decoding", name, "eager_ms"), captured, 1000 * int(batch) / captured, share)
            yield name, *map(_told, figures)


PROBE_COLUMNS = (
    "method",
    "tokens x batch",
    "prefill ms",
    "observe ms",
    "compress ms",
    "step ms",
    "peak GB",
    "predicted GB",
)


def _probe_row(record: BenchRecord) -> tuple[str, ...]:
    shape, m = (record.method, f"{record.tokens} x {record.batch}"), record.measured
    if m is None:
        return (*shape, record.status, "", "", "", "", "")
    spent = (m.prefill_s, m.observe_s, m.compress_s, m.tpot_s)
    return (
        *shape,
        *(f"{1000 * own.median:.4g}" for own in spent),
        *(f"{x / 1e9:.2f}" for x in (m.peak_bytes, m.predicted_bytes)),
    )


def _told(value: Any) -> str:
    """A value of a step's file in a cell of a table; what is None is left out."""
    if isinstance(value, dict):
        told = ((name, f"({_told(own)})" if isinstance(own, dict) else _told(own)) for name, own in value.items())
        return ", ".join(f"{name} {own}" for name, own in told if own)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table, and an empty one."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def over(one: float | None, other: float | None) -> float | None:
    """One over the other, None where either is missing or the other is 0."""
    return None if one is None or not other else one / other
