"""`harness simulate`: makespans counted by hand, where time goes, losses, fits of recorded seconds, the command."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cli.simulate import simulate_parser
from harness.errors import HarnessError
from harness.records.record import Record
from harness.records.run_folder import RunStore
from harness.run.schedule import Schedule
from harness.simulate import simulate, workload
from harness.simulate.pool import Cluster, Costs, SimulatedClock, SimulatedPool
from harness.simulate.workload import Shape, Work
from tests.pretend import manifest, record
from tests.tiny_run import verb

FREE = Costs(0, 0, 0, 0, 0, 0, 0)


def work(*seconds: float) -> list[Work]:
    return [Work(s, tokens=100, order=round(1000 * s), records=2, nbytes=500.0) for s in seconds]


def run(seconds: Sequence[float], *, costs: Costs = FREE, **cluster: Any) -> simulate.SimulatedRun:
    return simulate.simulate(work(*seconds), Cluster(**cluster), costs)


def test_one_worker_takes_the_sum() -> None:
    found = run([2, 5, 3], start_s=10)
    assert found.makespan_s == pytest.approx(20) and found.utilisation == pytest.approx(0.5)
    assert found.shares["work"] == pytest.approx(10) and found.shares["start"] == pytest.approx(10)
    assert found.longest_s == 5 and found.items == 3
    assert found.records[0] == pytest.approx(6 / 20) and found.nbytes[0] == pytest.approx(1500 / 20)


@pytest.mark.parametrize(
    ("seconds", "workers", "makespan"),
    [
        ([3, 3, 5, 4, 3], 2, 10),  # the longest first: 5 3 and 4 3 3; the best would be 9
        ([2, 2, 3, 3, 2], 2, 7),
        ([4, 4, 4, 4], 4, 4),
        ([4, 4], 8, 4),
    ],
)
@pytest.mark.parametrize("as_nodes", [False, True])
def test_several_workers_take_the_longest_first(
    seconds: list[float], workers: int, makespan: float, *, as_nodes: bool
) -> None:
    found = run(seconds, nodes=workers if as_nodes else 1, gpus=1 if as_nodes else workers)
    assert found.makespan_s == pytest.approx(makespan)
    assert found.utilisation == pytest.approx(sum(seconds) / (workers * makespan))


def test_planning_and_every_cost_of_the_driver_are_in_the_makespan() -> None:
    costs = Costs(plan_token_s=0.5, bundle_s=1.0, token_s=0.01, look_s=0.0, record_s=0.25, append_s=2.0, byte_s=0.004)
    found = simulate.simulate([Work(10.0, 100, 1, records=2, nbytes=500.0)], Cluster(start_s=7.0), costs)
    # planned at 50, ready at 57, handed out at 59, done at 69, two records till 69.5, then appends: of them, at the end
    assert found.plan_s == pytest.approx(50)
    assert found.makespan_s == pytest.approx(69.5 + 2 * 2.0 + 500 * 0.004)
    assert found.driver_s == pytest.approx(1 + 1 + 0.5 + 4 + 2)
    assert found.shares["start"] == pytest.approx(57) and found.shares["driver"] == pytest.approx(2)


cost = st.floats(0, 0.2)


@settings(deadline=None, max_examples=60)
@given(
    seconds=st.lists(st.floats(0.01, 40), min_size=1, max_size=50),
    nodes=st.integers(1, 4),
    gpus=st.integers(1, 3),
    start_s=st.floats(0, 20),
    mtbf_s=st.none() | st.floats(30, 500),
    node_s=st.floats(0, 20),
    costs=st.builds(Costs, cost, cost, cost.map(lambda c: c / 100), cost, cost, cost, cost.map(lambda c: c / 1000)),
)
def test_every_second_of_every_worker_is_accounted_for(
    seconds: list[float], costs: Costs, mtbf_s: float | None, **cluster: Any
) -> None:
    found = run(seconds, costs=costs, mtbf_s=mtbf_s, **cluster)
    assert sum(found.shares.values()) == pytest.approx(found.worker_s, rel=1e-6)
    assert all(share > -1e-6 for share in found.shares.values())
    assert found.items == len(seconds) and (found.driver_s > 0 or costs == FREE)
    assert found.records[0] <= found.records[1] and found.nbytes[0] <= found.nbytes[1]
    if not found.given_up:
        assert found.shares["work"] == pytest.approx(sum(seconds))
        assert 0 < found.utilisation <= 1 + 1e-9
        assert found.makespan_s >= max(seconds) + found.plan_s


def test_lost_nodes_cost_time_and_no_item_and_the_seed_decides_when() -> None:
    cluster: dict[str, Any] = {"nodes": 4, "gpus": 2, "start_s": 3}
    quiet = run([5] * 200, **cluster)
    found = run([5] * 200, **cluster, mtbf_s=60.0, node_s=10)
    assert quiet.nodes_lost == 0 and quiet.shares.get("lost", 0) == 0
    assert found.nodes_lost > 0 and found.shares["lost"] > 0 and found.given_up == 0
    assert found.items == 200 and found.shares["work"] == pytest.approx(1000)
    assert found.makespan_s > quiet.makespan_s
    assert found == run([5] * 200, **cluster, mtbf_s=60.0, node_s=10)
    assert found.makespan_s != run([5] * 200, **cluster, mtbf_s=60.0, node_s=10, seed=7).makespan_s
    with pytest.raises(HarnessError, match="--mtbf-hours"):
        run([5], start_s=1000.0, mtbf_s=1.0)


def test_every_item_comes_back_once_although_nodes_are_lost() -> None:
    clock, cluster = SimulatedClock(), Cluster(nodes=3, gpus=2, mtbf_s=20.0, start_s=1.0, seed=3)
    pool = SimulatedPool(cluster, FREE, clock, size=6)
    items = work(*[0.02] * 2000, *[3.0] * 40)
    schedule = Schedule[Work, None](items, pool, timeout_s=math.inf, start_s=math.inf, clock=clock)
    ended = [id(item.work) for found in schedule.run() for item, _ in found]
    assert sorted(ended) == sorted(map(id, items)) and pool.nodes_lost > 0


@pytest.mark.parametrize(
    ("seconds", "changes", "says"),
    [
        ([1.0] * 100, {"costs": Costs(record_s=1.0)}, "the driver"),
        ([1000.0, *[1.0] * 100], {}, "the longest item takes 16 min 40 s of 16 min"),
        ([1.0] * 100, {"start_s": 500.0}, "start-up"),
        ([5.0] * 400, {"mtbf_s": 40.0, "start_s": 20.0, "seed": 1}, "lost nodes"),
    ],
)
def test_what_saturates_a_cluster_is_named(seconds: list[float], changes: dict[str, Any], says: str) -> None:
    found = run(seconds, nodes=2, gpus=4, **changes)
    said = simulate.saturation([found])
    assert found.utilisation < simulate.SATURATED
    assert says in said and said.startswith("saturated from 2 x 4 on")
    assert simulate.saturation([run([5.0] * 100, gpus=2)]).startswith("not saturated up to 1 x 2")


def test_a_busy_driver_bounds_the_makespan() -> None:
    found = run([1.0] * 100, gpus=8, costs=Costs(record_s=1.0))
    assert found.makespan_s >= 200 and found.busy > 0.95 and found.limit == "driver"  # two records an item


def test_sizes_double_up_to_what_is_asked_for() -> None:
    assert simulate.sizes(1, 1) == [(1, 1)]
    assert simulate.sizes(3, 6) == [(1, 1), (1, 2), (1, 4), (1, 6), (2, 6), (3, 6)]
    assert simulate.sizes(4, 1) == [(1, 1), (2, 1), (4, 1)]


SCORED = 8


def prefill(n: int) -> float:
    return 1 + 2e-3 * n + 1e-7 * n * n


def decode(n: int, steps: int) -> float:
    return 0.5 + 0.01 * steps + 1e-6 * n * steps + 0.02 * SCORED


def sample(n: int, steps: int, name: str = "", **changes: Any) -> list[Record]:
    """A sample of n tokens under three cells: one batch of two rows, of which the longer has `steps`, and one alone."""
    shared = {"run_id": manifest().run_id, "prompt_tokens": n, "prefill_s": prefill(n), "compress_s": 0.1 + 1e-5 * n}
    shared |= {"nll_tokens": SCORED, **changes}
    batched, alone = ({"decode_s": decode(n, s), "decode_rows": rows} for s, rows in ((steps, 2), (steps + 1, 1)))
    cells = (("a", steps, batched), ("b", max(0, steps - 2), batched), ("c", steps + 1, alone))
    return [
        record(method, "128", name or str(n), 1.0, token_ids=tuple(range(own)), **shared, **batch)
        for method, own, batch in cells
    ]


RUN = [r for n, steps in ((500, 5), (1000, 9), (2000, 30), (3000, 11), (4000, 17)) for r in sample(n, steps)]


def test_a_shared_batch_and_a_shared_prefill_count_once() -> None:
    (item,) = workload.recorded_items(sample(1000, 9), "aware")
    assert item.seconds == pytest.approx(prefill(1000) + 3 * 0.11 + decode(1000, 9) + decode(1000, 10))
    assert item.shape == Shape(1000, cells=3, batches=2.0, steps=19.0, scored=2.0 * SCORED) and item.records == 3
    questions = [*sample(1000, 9, query="agnostic"), *sample(1000, 5, "other", query="agnostic")]
    (context,) = workload.recorded_items(questions, "agnostic")
    assert context.seconds == pytest.approx(item.seconds + decode(1000, 5) + decode(1000, 6))
    assert context.records == 6 and context.shape.cells == 3
    assert len(workload.recorded_items(questions, "aware")) == 2


def test_the_fit_finds_what_the_seconds_were_made_of() -> None:
    items = workload.recorded_items(RUN, "aware")
    fitted = workload.fit(items)
    shape = Shape(100_000, cells=3, batches=2.0, steps=256.0, scored=2.0 * SCORED)
    wanted = prefill(100_000) + 3 * 1.1 + 2 * decode(100_000, 128)
    assert fitted.seconds(shape) == pytest.approx(wanted, rel=1e-6)
    assert fitted.ratios == pytest.approx([1.0] * 5)
    (large,) = workload.extrapolated([(100_000, 128)], items, fitted, line_bytes=10, speedup=4, seed=1)
    assert large == Work(pytest.approx(wanted / 4), 100_000, 100_000 + 3 * 128, records=3, nbytes=30)


def test_the_full_sweep_has_the_official_samples() -> None:
    from tasks.longbench import DATASETS

    assert {dataset.name for dataset in DATASETS} == workload.MEAN_LENGTH.keys()
    prompts = list(workload.longbench(max_tokens=131072, seed=1))
    assert len(prompts) == 4750 and prompts == list(workload.longbench(max_tokens=131072, seed=1))
    assert DATASETS[0].name == "narrativeqa"
    mean = sum(tokens for tokens, _ in prompts[:200]) / 200
    assert mean == pytest.approx(18409 * workload.TOKENS_PER["en"], rel=0.15)
    assert max(tokens for tokens, _ in workload.longbench(max_tokens=8192, seed=1)) == 8192 - workload.CUT
    generated = list(workload.ruler(lengths=(4096, 8192)))
    assert len(generated) == 2 * 13 * 500
    assert {tokens + new for tokens, new in generated} == {4096, 8192}


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    """The verb on a stored run."""
    with RunStore(tmp_path, manifest(budgets=("128",))) as store:
        store.append([r.model_copy(update={"run_id": store.manifest.run_id}) for r in RUN])

    def call(*words: str, folder: Path = store.folder) -> int:
        return verb(simulate_parser, folder, *words)

    return call


def test_the_command_prints_what_it_assumes_and_its_table(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--nodes", "2", "--gpus", "2", "--lengths", "4096", "--speedup", "100", "--tasks", "ruler")
    assert command(*words) == 0
    first = capsys.readouterr().out
    told = ("5 items, 15 records", "6,500 items", "RULER's 6,500 samples of 4096 tokens", "8B", "--speedup 100")
    assert all(part in first for part in (*told, "seed 42", " 2 x 2 ", "driver"))
    command(*words)
    assert capsys.readouterr().out == first
    lossy = ("--mtbf-hours", "0.005", "--start-seconds", "0", "--cost", "record_s=0.5")
    command("--tasks", "recorded", "--nodes", "2", *lossy)
    second = capsys.readouterr().out
    assert "planned: the recorded items: 5 items" in second and "record_s 0.5" in second and "nodes lost" in second


BAD = (
    "--nodes 0|--gpus -1|--nodes 100000|--speedup 0|--speedup 1e-320|--mtbf-hours -1|--start-seconds 1e10|--seed -1|"
    "--max-tokens 10|--tasks niah|--tasks longbench,recorded|--lengths 999999|--cost nothing=1|"
    "--cost record_s=soon|--cost record_s=-1|--cost record_s"
)


@pytest.mark.parametrize("words", BAD.split("|"))
def test_bad_options_are_named(command: Callable[..., int], words: str) -> None:
    with pytest.raises(HarnessError, match=words.split()[0]):
        command("--gpus", "2", *words.split())


def test_runs_without_seconds_are_refused(command: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="cannot read"):
        command(folder=tmp_path / "nothing")
    with RunStore(tmp_path, manifest(seed=1)) as empty:
        pass
    with pytest.raises(HarnessError, match="no records"):
        command(folder=empty.folder)
    with pytest.raises(HarnessError, match="none of 1 records has seconds"):
        workload.recorded_items([record("a", "128", "0", 1.0)], "aware")
    with pytest.raises(HarnessError, match="2 lengths are recorded.*--tasks recorded"):
        workload.fit(workload.recorded_items(RUN[:6], "aware"))
    with pytest.raises(HarnessError, match="no items"):
        run([])
