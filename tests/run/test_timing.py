"""`run --measure` on the tiny model with a pretend prober: what is asked of it and what comes of its answers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from harness.errors import HarnessError
from harness.records.measured import Measured, ProbeResult, ProbeSpec, Spread
from harness.records.record import Record, RunManifest
from harness.records.run_folder import load_run
from harness.records.spec import ModelSpec
from harness.run.timing import measured_on
from tests.pretend import measured
from tests.tiny_run import call, only

pytestmark = pytest.mark.usefixtures("_no_pictures")
METHODS = "fullkv,snapkv@kvcf,streamingllm"
TASK = ("--tasks", "stdlib/next_line", "--lengths", "512", "--limit", "2", "--max-new-tokens", "6")
FAST = ("--model", "tiny", "--dtype", "float32", "--device", "cpu", "--nll-tokens", "8", "--budgets", "32", *TASK)
RUN = ("run", *FAST, "--methods", METHODS, "--set", "streamingllm.sinks=2")
CELLS = {("fullkv", "full"), ("snapkv@kvcf", "32"), ("streamingllm[sinks=2]", "32")}


def answer(spec: ProbeSpec) -> Measured:
    """A measurement whose TPOT tells how long the prompt was."""
    return measured(spec, tpot_s=Spread(median=len(spec.ids) / 1e5, low=0.001, high=0.5))


class FakeProber:
    """Answers every question, but those for the methods in `trouble`."""

    trouble: ClassVar[dict[str, ProbeResult | BaseException]] = {}
    opened: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[ProbeSpec]] = []
    entered: ClassVar[list[bool]] = []
    left: ClassVar[list[bool]] = []

    def __init__(self, *, model: str, dtype: str, device: str, threads: int | None) -> None:
        self.opened.append({"model": model, "dtype": dtype, "device": device, "threads": threads})

    def __enter__(self) -> FakeProber:
        self.entered.append(True)
        return self

    def __exit__(self, *_: object) -> None:
        self.left.append(True)

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, *, timeout_s: float) -> ProbeResult:
        assert limit_bytes is None
        assert timeout_s > 0
        self.asked.append(spec)
        end = self.trouble.get(spec.method, ProbeResult(status="ok", measured=answer(spec)))
        if isinstance(end, BaseException):
            raise end
        return end


@pytest.fixture(autouse=True)
def _prober(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "harness.speed.client", SimpleNamespace(Prober=FakeProber))
    for name, empty in {"trouble": {}, "opened": [], "asked": [], "entered": [], "left": []}.items():
        monkeypatch.setattr(FakeProber, name, empty)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, type[FakeProber]]:
    """A folder with one finished run that was measured, and its prober. Only read."""
    root, prober = tmp_path_factory.mktemp("timed"), type("Own", (FakeProber,), {"opened": [], "asked": [], "left": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "harness.speed.client", SimpleNamespace(Prober=prober))
        assert call(*RUN, "--measure", "--out", root) == 0
    return root, prober


def runs(root: Path) -> list[tuple[RunManifest, list[Record]]]:
    return [load_run(path) for path in sorted(root.iterdir()) if path.is_dir()]


def scores(records: list[Record]) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """What measuring must not change."""
    return {r.key: (r.status, r.token_ids, r.metrics, round(r.nll or 0, 4), r.kv_bytes) for r in records}


def test_every_cell_is_measured_on_its_own_prompt(timed: tuple[Path, type[FakeProber]]) -> None:
    root, prober = timed
    ((manifest, records),) = runs(root)
    assert len(records) == len(prober.asked) == 6
    (opened,) = prober.opened
    assert (opened["model"], opened["dtype"], opened["device"]) == ("tiny", "float32", "cpu")
    assert opened["threads"] == manifest.machine["torch_threads"]
    for record, spec in zip(records, prober.asked, strict=True):
        assert record.measured == answer(spec)
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
    assert prober.left == [True]


def test_measuring_changes_no_score_and_is_a_run_of_its_own(
    timed: tuple[Path, type[FakeProber]], tmp_path: Path
) -> None:
    assert call(*RUN, "--out", tmp_path) == 0
    assert FakeProber.opened == []
    ((plain, without),), ((other, with_it),) = runs(tmp_path), runs(timed[0])
    assert scores(without) == scores(with_it)
    assert all(r.measured is None for r in without)
    assert plain.spec.measured_on is None
    assert other.spec.measured_on == measured_on(other.machine, other.spec.model)
    assert plain.run_id != other.run_id
    assert plain.spec == other.spec.model_copy(update={"measured_on": None})


def test_a_run_cut_short_resumes_without_measuring_twice(timed: tuple[Path, type[FakeProber]], tmp_path: Path) -> None:
    shutil.copytree(timed[0], tmp_path, dirs_exist_ok=True)
    path = only(tmp_path) / "records.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    assert len(FakeProber.asked) == 2
    assert len(FakeProber.entered) == 1
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    assert len(FakeProber.entered) == 1  # nothing to do: no probe server was started
    ((_, records),) = runs(tmp_path)
    assert len(records) == 6
    assert all(r.measured is not None for r in records)


def test_an_interrupted_probe_leaves_whole_samples(tmp_path: Path) -> None:
    FakeProber.trouble["snapkv@kvcf"] = KeyboardInterrupt()
    assert call(*RUN, "--measure", "--out", tmp_path) == 130
    ((manifest, records),) = runs(tmp_path)
    assert manifest.status == "interrupted"
    assert records == []
    assert FakeProber.left == [True]
    FakeProber.trouble.clear()
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    ((manifest, records),) = runs(tmp_path)
    assert (manifest.status, len(records)) == ("finished", 6)


def test_a_probe_that_ends_badly_costs_no_score(tmp_path: Path) -> None:
    for method, status in (("fullkv", "oom"), ("streamingllm", "timeout")):
        FakeProber.trouble[method] = ProbeResult(status=status, error="needs | more\nthan *1 GiB*")  # type: ignore[arg-type]
    FakeProber.trouble["snapkv@kvcf"] = HarnessError("the probe server of tiny ended (-9); try again")
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    ((manifest, records),) = runs(tmp_path)
    assert (manifest.status, len(records)) == ("finished", 6)
    assert all(r.status == "ok" and "score" in r.metrics and r.measured is None for r in records)
    assert {r.method.partition("[")[0]: r.notes[-1] for r in records} == {
        "fullkv": "measure: oom (needs | more than *1 GiB*)",
        "snapkv@kvcf": "measure: failed (the probe server of tiny ended (-9); try again)",
        "streamingllm": "measure: timeout (needs | more than *1 GiB*)",
    }
    assert len(FakeProber.entered) == len(FakeProber.left) == 3  # started again after each that went down
    board = next(path for path in tmp_path.rglob("*.md")).read_text()
    assert "- fullkv at full: measure: oom (needs \\| more than \\*1 GiB\\*) (2 records)" in board
    assert "TPOT" not in board
    FakeProber.asked.clear()
    assert call(*RUN, "--measure", "--out", tmp_path) == 0
    assert FakeProber.asked == []  # a score is done, whatever its probe did


def test_a_cell_without_a_score_is_not_measured(tmp_path: Path) -> None:
    assert call(*RUN, "--budgets", "32,400", "--lengths", "256,512", "--measure", "--out", tmp_path) in (0, 1)
    ((_, records),) = runs(tmp_path)
    skipped = [r for r in records if r.status == "skipped"]
    assert skipped
    assert all(r.measured is None and not any("measure" in note for note in r.notes) for r in skipped)
    assert len(FakeProber.asked) == len(records) - len(skipped)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--query", "agnostic"), "--measure with --query agnostic"),
        (("--trust-remote-code",), "load plain models only"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...], says: str
) -> None:
    assert call(*RUN, *option, "--measure", "--out", tmp_path) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_machine_in_words_names_what_speed_depends_on() -> None:
    here = {"processor": "Xeon", "cores": 8, "accelerators": ["H100", "H100"], "torch_threads": 4}
    model = ModelSpec(name="tiny", revision="r0", dtype="float32", device="cpu")
    assert measured_on(here, model) == "cpu, Xeon, 4 threads"
    cuda = model.model_copy(update={"device": "cuda:0"})
    assert measured_on(here, cuda) == "cuda:0, H100, H100, Xeon, 4 threads"
    assert measured_on({**here, "torch_threads": 1}, model) != measured_on(here, model)
    with pytest.raises(HarnessError, match="'mps' cannot be measured; give --device cpu or cuda"):
        measured_on(here, model.model_copy(update={"device": "mps"}))
