"""What `harness simulate` is asked for: the cluster, and the items of the sweep whose seconds a run recorded."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from harness.errors import HarnessError, shown
from harness.plan.names import assignment
from harness.records.options import MOST_TOKENS, Lengths, Seed, Words, between
from harness.records.run_folder import RUNS, load_run
from harness.records.spec import Frozen
from harness.simulate import workload
from harness.simulate.pool import Cluster, Costs
from harness.simulate.simulate import SimulatedRun, simulate, sizes
from harness.simulate.workload import Work

KINDS = ("longbench", "ruler", "recorded")
MOST = 100_000  # workers
ITEM_TIMEOUT_S = 3600.0  # of `harness run --ray` unless it is asked for another
LONGEST_S = 1e9
Workers = Annotated[int, Strict(), AfterValidator(between(1, MOST))]
Wait = Annotated[float, Strict(), AfterValidator(between(0, LONGEST_S))]


class SimulationAsk(Frozen):
    """A cluster and a sweep. speedup: recorded seconds over those of what is planned. lengths: of RULER, in tokens."""

    nodes: Workers = 1
    gpus: Workers = 1
    tasks: Words = ("longbench", "ruler")
    lengths: Annotated[Lengths, Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Strict(), AfterValidator(between(1024, MOST_TOKENS))] = 131072
    speedup: Annotated[float, Strict(), AfterValidator(between(1e-6, 1e6))] = 1.0
    start_seconds: Wait = 60.0
    mtbf_hours: Annotated[float, Strict(), AfterValidator(between(1e-3, 1e9))] | None = None
    node_seconds: Wait = 0.0
    seed: Seed = 42

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.nodes * self.gpus > MOST:
            raise ValueError(f"{self.nodes} x {self.gpus} workers are more than {MOST:,}; lower --nodes or --gpus")
        unknown = any(name not in KINDS for name in self.tasks)
        if unknown or ("recorded" in self.tasks and len(set(self.tasks)) > 1):
            asked = shown(",".join(self.tasks))
            raise ValueError(f"--tasks {asked} cannot be simulated; give longbench, ruler, both of them, or recorded")
        bad = next((length for length in self.lengths or () if not 1024 <= length <= self.max_tokens), None)
        if bad is not None:
            raise ValueError(f"--lengths {bad} is out of range; give 1024 to --max-tokens {self.max_tokens}")
        return self


def outcomes_of(ask: SimulationAsk, work: Sequence[Work], costs: Costs) -> list[SimulatedRun]:
    """How the work goes on clusters of growing size, up to the one asked for."""
    mtbf_s = None if ask.mtbf_hours is None else ask.mtbf_hours * 3600
    cluster = Cluster(start_s=ask.start_seconds, mtbf_s=mtbf_s, node_s=ask.node_seconds, seed=ask.seed)
    shapes = sizes(ask.nodes, ask.gpus)
    return [simulate(work, replace(cluster, nodes=nodes, gpus=gpus), costs) for nodes, gpus in shapes]


def costs_of(given: Iterable[str]) -> Costs:
    """Costs of the driver with some changed, each written `name=seconds`. Raises HarnessError for another form."""
    known = asdict(Costs())
    for text in given:
        if "=" not in text:
            raise HarnessError(f"--cost {shown(text)} has no seconds; write record_s=0.001")
        name, value = assignment(text)
        if name not in known:
            raise HarnessError(f"--cost {shown(name)} is none of {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_S:
            raise HarnessError(f"--cost {shown(text)} is no number of seconds; give 0 to {LONGEST_S:g}")
        known[name] = float(value)
    return Costs(**known)


def plan_work(ask: SimulationAsk, run: Path) -> tuple[Sequence[Work], Sequence[str]]:
    """What is simulated, from a run's records, and lines that say so. Raises HarnessError for one without records."""
    manifest, records = load_run(run)
    if not records:
        raise HarnessError(f"no records in {run}; run a benchmark first")
    items, model = workload.recorded_items(records, manifest.spec.query), manifest.spec.model
    log = run / RUNS.records_file
    line_bytes = log.stat().st_size / max(1, log.read_bytes().count(b"\n"))
    line = (
        f"recorded: run {manifest.run_id}, {model.name} in {model.dtype} on {model.device}: {len(items)} items, "
        f"{len(records)} records of {line_bytes:,.0f} bytes, {manifest.cells} cells a sample"
    )
    if "recorded" in ask.tasks:
        work = workload.as_recorded(items, line_bytes=line_bytes, speedup=ask.speedup)
        return work, [line, *_planned_lines(ask, work, "the recorded items")]
    fitted = workload.fit(items)
    prompts, said = _prompts(ask)
    work = workload.extrapolated(prompts, items, fitted, line_bytes=line_bytes, speedup=ask.speedup, seed=ask.seed)
    return work, [line, *fitted.lines(), *_planned_lines(ask, work, said), *_assumptions(ask)]


def _prompts(ask: SimulationAsk) -> tuple[list[tuple[int, int]], str]:
    prompts, said = list[tuple[int, int]](), []
    if "longbench" in ask.tasks:
        prompts += workload.longbench(max_tokens=ask.max_tokens, seed=ask.seed)
        said.append(f"LongBench's {len(prompts):,} samples")
    if "ruler" in ask.tasks:
        lengths = ask.lengths or [length for length in workload.LENGTHS if length <= ask.max_tokens]
        generated = list(workload.ruler(lengths=lengths))
        prompts += generated
        said.append(f"RULER's {len(generated):,} samples of {', '.join(map(str, lengths))} tokens")
    if not prompts:
        raise HarnessError(f"--max-tokens {ask.max_tokens} is below every length of RULER; raise it or give --lengths")
    return prompts, " and ".join(said)


def _planned_lines(ask: SimulationAsk, work: Sequence[Work], said: str) -> list[str]:
    tokens, seconds = sum(item.tokens for item in work), [item.seconds for item in work]
    return [
        f"planned: {said}: {len(work):,} items, {sum(item.records for item in work):,} records, {tokens:,} prompt "
        f"tokens ({workload.ID_BYTES * tokens / 1e9:.3g} GB of ids in the driver's memory, their text not counted)",
        f"seconds of an item: {min(seconds):.3g} to {max(seconds):.3g}, {sum(seconds) / len(work):.3g} in the mean, "
        f"{sum(seconds) / 3600:,.1f} GPU-hours together",
        f"these are seconds of the recorded model and device divided by --speedup {ask.speedup:g}, your factor "
        "between them and what is planned; no run of an 8B model is recorded with this project: give one as RUN_FOLDER",
    ]


def _assumptions(ask: SimulationAsk) -> list[str]:
    per = ", ".join(f"{tokens:g} {language}" for language, tokens in workload.TOKENS_PER.items())
    lines = [
        "assumed: the recorded cells; every sample generates as many tokens as its task allows; the fit holds beyond "
        "the recorded lengths; what an item is off from it by is drawn from the recorded items"
    ]
    if "longbench" in ask.tasks:
        lines.append(
            "assumed: LongBench's lengths are lognormal around each dataset's official mean with a spread of "
            f"{workload.SPREAD:g}; tokens a word (zh: a character) {per}; cut at {ask.max_tokens - workload.CUT:,} "
            "tokens"
        )
    return lines


def cluster_lines(ask: SimulationAsk, costs: Costs) -> list[str]:
    said = ", ".join(f"{name} {value:.3g}" for name, value in asdict(costs).items())
    losses = "no node is lost"
    if ask.mtbf_hours is not None:
        losses = f"a node is lost every {ask.mtbf_hours:g} h in the mean, another comes after {ask.node_seconds:g} s"
    return [
        f"driver, in seconds, measured where not given with --cost: {said}",
        f"assumed: workers start in {ask.start_seconds:g} s, {losses}; seed {ask.seed}",
    ]


def warnings(outcomes: Sequence[SimulatedRun]) -> list[str]:
    """What a reader of the table must know of the largest cluster's run."""
    longest, lines = outcomes[-1].longest_s, []
    if longest > ITEM_TIMEOUT_S:
        lines.append(
            f"note: the longest item takes {longest:,.0f} s; `harness run --ray` takes an item that long for hung "
            f"unless --item-timeout is above it ({ITEM_TIMEOUT_S:g})"
        )
    given_up = [f"{o.given_up} at {o.cluster.nodes} x {o.cluster.gpus}" for o in outcomes if o.given_up]
    if given_up:
        lines.append(f"note: items given up because their nodes kept being lost: {', '.join(given_up)}")
    return lines
