"""`run --measure` on the tiny model with a pretend prober: what is asked of it and what comes of its answers."""

import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import HarnessError
from harness.records.measured import ProbeResult, ProbeSpec, Spread
from harness.records.record import Record, RunManifest
from harness.records.run_folder import load_run
from harness.records.spec import ModelSpec
from harness.run.timing import measured_on
from tests.pretend import measured
from tests.speed.test_bench import FakeProber
from tests.tiny_run import FAST, call, only

pytestmark = pytest.mark.usefixtures("_no_pictures")
METHODS = "fullkv,snapkv@kvcf,streamingllm"
RUN = ("run", *FAST, "--budgets", "32", "--limit", "2", "--methods", METHODS, "--set", "streamingllm.sinks=2")
CELLS = {("fullkv", "full"), ("snapkv@kvcf", "32"), ("streamingllm[sinks=2]", "32")}


def answer(spec: ProbeSpec) -> ProbeResult:
    """A measurement whose TPOT tells how long the prompt was."""
    tpot = Spread(median=len(spec.ids) / 1e5, low=0.001, high=0.5)
    return ProbeResult(status="ok", measured=measured(spec, tpot_s=tpot))


def answer_or(ends: Mapping[str, ProbeResult | BaseException], spec: ProbeSpec) -> ProbeResult:
    found = ends.get(spec.method) or answer(spec)
    if isinstance(found, BaseException):
        raise found
    return found


@pytest.fixture(autouse=True)
def prober(monkeypatch: pytest.MonkeyPatch) -> FakeProber:
    """In the place of the real one."""
    found = FakeProber(answer)
    monkeypatch.setitem(sys.modules, "harness.speed.client", SimpleNamespace(Prober=found))
    return found


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeProber]:
    """A folder with one finished run that was measured, and its prober. Only read."""
    root, asked = tmp_path_factory.mktemp("timed"), FakeProber(answer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "harness.speed.client", SimpleNamespace(Prober=asked))
        assert call(*RUN, "--measure", "--out", root) == 0
    return root, asked


def runs(root: Path) -> list[tuple[RunManifest, list[Record]]]:
    return [load_run(path) for path in sorted(root.iterdir()) if path.is_dir()]


def scores(records: list[Record]) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """What measuring must not change."""
    return {r.key: (r.status, r.token_ids, r.metrics, round(r.nll or 0, 4), r.kv_bytes) for r in records}


def test_every_cell_is_measured_on_its_own_prompt(timed: tuple[Path, FakeProber]) -> None:
    root, prober = timed
    ((manifest, records),) = runs(root)
    assert len(records) == len(prober.asked) == 6
    threads = manifest.machine["torch_threads"]
    assert prober.given == {"model": "tiny", "dtype": "float32", "device": "cpu", "threads": threads}
    assert all(limit is None and timeout_s > 0 for limit, timeout_s in prober.limits)
    for record, spec in zip(records, prober.asked, strict=True):
        assert record.measured == answer(spec).measured
        assert spec.tokens == len(spec.ids) == record.prompt_tokens
        assert (spec.batch, spec.rounds, spec.warm_up, spec.chunk) == (1, 1, True, None)
        assert spec.new_tokens == max(2, len(record.token_ids)) <= 6
    assert {(r.method, r.budget) for r in records} == CELLS
    asked = {(s.method, s.budget, *s.set.items()) for s in prober.asked}
    assert asked == {("fullkv", None), ("snapkv@kvcf", "32"), ("streamingllm", "32", ("sinks", 2))}
    assert len({s.ids for s in prober.asked}) == 2
    board = next(path for path in root.rglob("*.md")).read_text()
    for column in ("TTFT s", "TPOT ms", "tokens/s", "peak MiB", "front bytes", "front TPOT", "measured on: cpu, "):
        assert column in board
    assert prober.entered == prober.left == 1


def test_measuring_changes_no_score_and_is_a_run_of_its_own(
    timed: tuple[Path, FakeProber], prober: FakeProber, tmp_path: Path
) -> None:
    assert call(*RUN, "--out", tmp_path) == 0 and prober.entered == 0
    ((plain, without),), ((other, with_it),) = runs(tmp_path), runs(timed[0])
    assert scores(without) == scores(with_it)
    assert all(r.measured is None for r in without)
    assert plain.run_id != other.run_id and plain.spec == other.spec.model_copy(update={"measured_on": None})
    assert other.spec.measured_on == measured_on(other.machine, other.spec.model)


def test_a_run_cut_short_resumes_without_measuring_twice(
    timed: tuple[Path, FakeProber], prober: FakeProber, tmp_path: Path
) -> None:
    shutil.copytree(timed[0], tmp_path, dirs_exist_ok=True)
    path = only(tmp_path) / "records.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    assert (len(prober.asked), prober.entered) == (2, 1)
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    assert prober.entered == 1  # nothing to do: no probe server was started
    ((_, records),) = runs(tmp_path)
    assert len(records) == 6 and all(r.measured is not None for r in records)


def test_an_interrupted_probe_leaves_whole_samples(prober: FakeProber, tmp_path: Path) -> None:
    prober.answer = partial(answer_or, {"snapkv@kvcf": KeyboardInterrupt()})
    assert call(*RUN, "--measure", "--out", tmp_path) == 130
    ((manifest, records),) = runs(tmp_path)
    assert (manifest.status, records, prober.left) == ("interrupted", [], 1)
    prober.answer = answer
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    ((manifest, records),) = runs(tmp_path)
    assert (manifest.status, len(records)) == ("finished", 6)


def test_a_probe_that_ends_badly_costs_no_score(prober: FakeProber, tmp_path: Path) -> None:
    oom, late = (ProbeResult(status=status, error="needs | more\nthan *1 GiB*") for status in ("oom", "timeout"))
    down = HarnessError("the probe server of tiny ended (-9); try again")
    prober.answer = partial(answer_or, {"fullkv": oom, "streamingllm": late, "snapkv@kvcf": down})
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    ((manifest, records),) = runs(tmp_path)
    assert (manifest.status, len(records)) == ("finished", 6)
    assert all(r.status == "ok" and "score" in r.metrics and r.measured is None for r in records)
    assert {r.method.partition("[")[0]: r.notes[-1] for r in records} == {
        "fullkv": "measure: oom (needs | more than *1 GiB*)",
        "snapkv@kvcf": "measure: failed (the probe server of tiny ended (-9); try again)",
        "streamingllm": "measure: timeout (needs | more than *1 GiB*)",
    }
    assert prober.entered == prober.left == 3  # started again after each that went down
    board = next(path for path in tmp_path.rglob("*.md")).read_text()
    assert "- fullkv at full: measure: oom (needs \\| more than \\*1 GiB\\*) (2 records)" in board
    assert "TPOT" not in board
    prober.asked.clear()
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    assert prober.asked == []  # a score is done, whatever its probe did


def test_a_cell_without_a_score_is_not_measured(prober: FakeProber, tmp_path: Path) -> None:
    assert call(*RUN, "--budgets", "32,400", "--lengths", "256,512", "--measure", "--out", tmp_path) in (0, 1)
    ((_, records),) = runs(tmp_path)
    skipped = [r for r in records if r.status == "skipped"]
    assert len(prober.asked) == len(records) - len(skipped) < len(records)
    assert all(r.measured is None and not any("measure" in note for note in r.notes) for r in skipped)


@pytest.mark.parametrize(
    ("option", "says"),
    [("--query=agnostic", "--measure with --query agnostic"), ("--trust-remote-code", "load plain models only")],
)
def test_what_cannot_be_measured_is_refused_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, says: str
) -> None:
    assert call(*RUN, option, "--measure", "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_machine_in_words_names_what_speed_depends_on() -> None:
    here = {"processor": "Xeon", "cores": 8, "accelerators": ["H100", "H100"], "torch_threads": 4}
    model = ModelSpec(name="tiny", revision="r0", dtype="float32", device="cpu")
    assert measured_on(here, model) == "cpu, Xeon, 4 threads"
    cuda = model.model_copy(update={"device": "cuda:0"})
    assert measured_on(here, cuda) == "cuda:0, H100, H100, Xeon, 4 threads"
    with pytest.raises(HarnessError, match="'mps' cannot be measured; give --device cpu or cuda"):
        measured_on(here, model.model_copy(update={"device": "mps"}))
