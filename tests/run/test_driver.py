"""`harness run --ray` on the tiny model: equal to the run without Ray, through kills, refusals and resumes."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from harness.errors import HarnessError
from harness.machine import versions
from harness.models.load import describe_model
from harness.plan.sweep import plan_names
from harness.records.run_folder import RunStore, load_run
from harness.records.spec import ModelSpec, Sweep
from harness.run import driver
from harness.run.driver import MakeRunner
from harness.run.fan import FanOut
from harness.run.progress import PROGRESS_FILE, Progress, Snapshot
from harness.run.ray_pool import WorkerShape
from harness.run.schedule import Item
from harness.run.sequential import prepare
from methods.base import KV, PromptView
from methods.fullkv import FullKV
from methods.registry import METHODS, Method
from tests import tiny_run
from tests.records import test_run_folder
from tests.tiny_run import CELLS, FAST, RUN, call, key, manifest, only

pytestmark = pytest.mark.xdist_group("ray")
OWN = {"prefill_s", "observe_ms", "compress_s", "decode_s", "accelerator"}  # how a record was made, not what came out


@dataclass(frozen=True)
class Poison(FullKV):
    """Keeps every token, and kills its process at a prompt of `tokens` tokens."""

    tokens: int = 0

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        if view.tokens == self.tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        return [layer.kv for layer in view.layers]


@pytest.fixture(scope="module", autouse=True)
def _by_value() -> Iterator[None]:
    """Workers need not find the tests."""
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    yield
    cloudpickle.unregister_pickle_by_value(here)


def rows(root: Path) -> list[dict[str, Any]]:
    """Every stored line without what is its own, by key."""
    return sorted(({k: v for k, v in line.items() if k not in OWN} for line in _lines(root)), key=key)


def _lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (only(root) / "records.jsonl").read_text().splitlines()]


def board(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in only(root).glob("board.*")}


def complained(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command leaves."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("harness: ")]
    return line


def test_a_run_on_ray_equals_the_run_without(finished: Path, tmp_path: Path) -> None:
    assert call(*RUN, "--ray", "local", "--workers", "1", "--out", tmp_path) == 0
    assert only(tmp_path).name == only(finished).name
    assert rows(tmp_path) == rows(finished) and len(rows(tmp_path)) == 3 * CELLS
    assert board(tmp_path) == board(finished) and len(board(tmp_path)) >= 3
    ours, theirs = manifest(tmp_path), manifest(finished)
    assert {name for name in ours if ours[name] != theirs[name]} <= {"command", "started", "finished"}
    told = Snapshot.model_validate_json((only(tmp_path) / PROGRESS_FILE).read_text())
    assert (told.cells, told.total, told.samples_left) == ({"ok": 3 * CELLS}, 3 * CELLS, 0) and told.tokens > 1000
    assert "'torch': " in (only(tmp_path) / "logs" / "worker-0.log").read_text()


@pytest.mark.usefixtures("_no_pictures")
def test_ray_finishes_what_was_begun_without(cluster: str, finished: Path, results: Path) -> None:
    path = only(results) / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: CELLS + 2]) + lines[CELLS + 2][:40])
    assert call(*RUN, "--ray", cluster, "--workers", "1", "--out", results) == 0
    assert path.read_bytes().splitlines(keepends=True)[: CELLS + 2] == lines[: CELLS + 2]
    assert sorted(tiny_run.records(results), key=key) == sorted(tiny_run.records(finished), key=key)
    assert manifest(results)["status"] == "finished"


@pytest.mark.usefixtures("_no_pictures")
def test_a_sample_that_kills_its_workers_costs_its_own_cells_alone(
    cluster: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "poison", Method("poison", Poison, "", {}))
    lengths = {row["sample_id"]: row["prompt_tokens"] for row in rows(finished)}
    deadly, tokens = next((name, own) for name, own in lengths.items() if list(lengths.values()).count(own) == 1)
    command = ("run", *FAST, "--methods", "fullkv,poison", "--set", f"poison.tokens={tokens}", "--out", tmp_path)
    assert call(*command, "--ray", cluster, "--workers", "1", "--tries", "2") == 1
    assert f"2 of {2 * len(lengths)} cells failed" in complained(capsys)
    stored = rows(tmp_path)
    assert {row["sample_id"]: row["status"] for row in stored} == dict.fromkeys(lengths, "ok") | {deadly: "failed"}
    assert len(stored) == 2 * len(lengths)
    (why,) = {row["error"] for row in stored if row["status"] == "failed"}
    assert why.startswith("given up after 2 tries: ActorDiedError: The actor is dead because its worker process")
    assert manifest(tmp_path)["status"] == "finished"
    assert sum("lost: " in path.read_text() for path in only(tmp_path).glob("logs/worker-*.log")) == 2


def test_a_worker_with_other_packages_ends_the_run(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "versions", lambda: versions() | {"torch": "1.0"})
    assert call(*RUN, "--ray", cluster, "--workers", "1", "--out", tmp_path) == 2
    line = complained(capsys)
    assert line.startswith("harness: worker on ") and ", the driver 1.0; install the same versions" in line
    assert manifest(tmp_path)["status"] == "failed" and rows(tmp_path) == []


OUT_OF_RANGE = ("--workers 0", "--tries 0", "--item-timeout 0", "--gpus-per-worker -1", "--gpus-per-worker 1.5")
WITHOUT = ("--workers 2", "--tries 2", "--autoscale", "--gpus-per-worker 0")
REFUSED = [
    ("--ray @ --workers 99", "99 workers of 1 CPU do not fit into the cluster, which has 2 CPU"),
    ("--ray @ --gpus-per-worker 3", "1 workers of 1 CPU, 3 GPU do not fit into the cluster, which has"),
    ("--ray 127.0.0.1:1", "no Ray cluster at '127.0.0.1:1'"),
    ("--ray moon", "--ray 'moon' is no address"),
    ("--ray local --measure", "--measure times one cell alone on a machine, --ray fills it"),
    ("--ray local --device cuda:1", "--device 'cuda:1' is of this machine; give auto, cpu, cuda"),
    ("--ray local --threads 2", "--threads 2 is of this process; give --cpus-per-worker"),
    *((f"--ray local {option}", f"{option} is out of range") for option in OUT_OF_RANGE),
    *((option, f"{option.split()[0]} is for runs on a Ray cluster; add --ray") for option in WITHOUT),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    assert call(*RUN, *options.replace("@", cluster).split(), "--out", tmp_path) == 2
    assert says in complained(capsys) and not list(tmp_path.iterdir())


def test_without_ray_its_option_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("harness.run.driver", "harness.run.ray_pool"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call(*RUN, "--ray", "--out", tmp_path) == 2
    assert "--ray needs Ray; install it with" in complained(capsys)


SWEEP = Sweep(
    **{"model": "tiny", "methods": ("fullkv", "snapkv"), "tasks": ("stdlib/next_line",), "budgets": ("32",)},
    **{"lengths": (512,), "limit": 1, "max_new_tokens": 4, "nll_tokens": 4, "dtype": "float32"},
)


@pytest.mark.parametrize(
    ("device", "fan", "resources", "expected"),
    [
        ("auto", {}, {"CPU": 8, "GPU": 2}, (WorkerShape(1, 1), 2)),
        ("cpu", {}, {"CPU": 8, "GPU": 2}, (WorkerShape(1, 0), 8)),
        ("auto", {}, {"CPU": 3}, (WorkerShape(1, 0), 3)),
        ("cuda", {"gpus": 4}, {"CPU": 9, "GPU": 9}, (WorkerShape(1, 4), 2)),
        ("auto", {"cpus": 3, "workers": 2}, {"CPU": 8}, (WorkerShape(3, 0), 2)),
        ("auto", {"workers": 5, "autoscale": True}, {"CPU": 1}, (WorkerShape(1, 0), 5)),
        ("cuda", {}, {"CPU": 8}, None),
        ("auto", {"autoscale": True}, {}, None),
    ],
)
def test_what_a_worker_takes_and_how_many_fit(device: str, fan: Any, resources: Any, expected: Any) -> None:
    sweep = SWEEP.model_copy(update={"device": device})
    refused = pytest.raises(HarnessError, match="do not fit into the cluster.*lower --workers")
    with nullcontext() if expected else refused:
        assert driver._shape(sweep, FanOut(**fan), resources) == expected


def test_other_packages_and_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelSpec(name="m", revision="r" * 40, dtype="float32", device="cpu")
    accept = driver._accept(model, tmp_path)
    machine = {"accelerators": ["a GPU"], "processor": "p"}
    about = {"host": "h", "node": "n", "time": time.time(), "versions": versions(), "machine": machine, "model": model}
    accept(0, about)
    assert "on h, node n: ['a GPU'], {'python'" in (tmp_path / "worker-0.log").read_text()
    for other in ({"torch": "1.0"}, {"tokenizers": None}, {"flash-attn": "2"}):
        with pytest.raises(HarnessError, match=f"^worker on h has {next(iter(other))} .*install the same versions"):
            accept(1, about | {"versions": versions() | other})
    accept(2, about | {"versions": versions() | {"wonderwords": "0"}})  # data are the driver's
    with pytest.raises(HarnessError, match="^model m on h is ssssssssssss, on the driver rrrrrrrrrrrr; give every"):
        accept(3, about | {"model": model.model_copy(update={"revision": "s" * 40})})
    assert capsys.readouterr().err == ""
    accept(4, about | {"time": time.time() - 3600})
    assert "note: the clock of h is off by -3600 s" in capsys.readouterr().err


def test_care_decodes_one_row_at_a_time() -> None:
    prepared = prepare(plan_names(SWEEP), describe_model("tiny", dtype="float32", device="cpu"), command=())
    spec, work = prepared.manifest.spec, prepared.missing(frozenset())
    handle, about = MakeRunner(SWEEP, spec, prepared.policies, prepared.samples[0].ids, WorkerShape())()
    assert about["model"] == spec.model
    (plain,), (careful,) = handle(work, False), handle(work, True)
    assert [record.decode_rows for record in plain] == [2, 2] and [record.decode_rows for record in careful] == [1, 1]
    assert [record.token_ids for record in plain] == [record.token_ids for record in careful]


@pytest.mark.usefixtures("_no_pictures")
def test_ray_measures_observing_on_the_samples_that_a_run_without_does(cluster: str, tmp_path: Path) -> None:
    ask = ("run", *FAST, "--budgets", "32", "--methods", "fullkv,h2o", "--observe", "2")
    assert call(*ask, "--out", tmp_path / "without") == 0
    assert call(*ask, "--ray", cluster, "--workers", "1", "--out", tmp_path / "with") == 0
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    timed = [
        {key(record): record["observe_ms"] is not None for record in _lines(tmp_path / name)}
        for name in ("with", "without")
    ]
    assert timed[0] == timed[1] and sum(timed[0].values()) == 4


def test_care_measures_nothing_besides() -> None:
    prepared = prepare(plan_names(SWEEP), describe_model("tiny", dtype="float32", device="cpu"), command=())
    spec, work = prepared.manifest.spec, prepared.missing(frozenset())
    make = MakeRunner(SWEEP, spec, prepared.policies, prepared.samples[0].ids, WorkerShape(), prepared.observed)
    handle, _ = make()
    (plain,), (careful,) = handle(work, False), handle(work, True)
    assert plain[0].observe_ms == 0.0 and isinstance(plain[1].observe_ms, float)
    assert [record.observe_ms for record in careful] == [None, None]


def test_records_do_not_wait_for_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script() -> Iterator[list[tuple[Item[Any], Any]]]:
        """In the place of a schedule."""
        monkeypatch.setattr(driver, "STORE_S", 3600.0)
        yield [(Item(None), [test_run_folder.record("0")])]
        assert load_run(store.folder)[1] == []
        monkeypatch.setattr(driver, "STORE_S", 0.0)
        yield []  # nothing came, but what came before has waited long enough
        assert len(load_run(store.folder)[1]) == 1
        monkeypatch.setattr(driver, "STORE_S", 3600.0)
        yield [(Item(None), [test_run_folder.record("1")])]
        raise HarnessError("no worker is left")

    with RunStore(tmp_path, test_run_folder.manifest()) as store:
        progress = Progress(store.folder, samples=2, total=2, done=0, workers=lambda: 1)
        with pytest.raises(HarnessError, match="no worker is left"):
            driver.store_all(store, SimpleNamespace(run=script), progress)
        assert [record.sample_id for record in load_run(store.folder)[1]] == ["0", "1"]
        (store.folder / "logs").touch()
        with pytest.raises(HarnessError, match="^cannot write .*worker-0.log"):
            driver.tell(store.folder / "logs", 0, "no folder")
