"""What a sample cannot spoil: a metric that raises, numbers that no record holds, an error of the whole group."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.engine.engine import Engine
from harness.engine.types import Outcome
from harness.models.load import describe_model
from harness.plan.sweep import plan_names
from harness.records.record import Record
from harness.records.spec import Sweep
from harness.run import sequential
from harness.run.sequential import Prepared, prepare, record_of
from tasks.base import Sample, TaskError
from tasks.stdlib import NextLine
from tests.tiny_run import CELLS, RUN, call, manifest, only

pytestmark = pytest.mark.usefixtures("_no_pictures")
Captured = pytest.CaptureFixture[str]
Metric = Callable[[Any, Sample, str], Mapping[str, Any]]
SWEEP = Sweep(
    **{"model": "tiny", "methods": ("fullkv",), "tasks": ("stdlib/next_line",), "budgets": ("32",)},
    **{"lengths": (512,), "limit": 1, "max_new_tokens": 4, "nll_tokens": 4, "dtype": "float32"},
)


def raises(error: Exception) -> Metric:
    def score(self: Any, sample: Sample, prediction: str) -> Mapping[str, float]:
        raise error

    return score


BROKEN: list[tuple[Metric, str]] = [
    (raises(TaskError("no such paragraph")), "not scored: no such paragraph"),
    (raises(IndexError("list index\x1b[2J")), "not scored: IndexError: list index"),
    (raises(RecursionError("deep")), "not scored: RecursionError: deep"),
    (lambda *_: {"score": float("nan")}, "no number to store: metrics.score: Input should be a finite number"),
    (lambda *_: {"score": "high"}, "no number to store: metrics.score: Input should be a valid number"),
    (lambda *_: None, "not scored: TypeError"),  # type: ignore[arg-type, return-value]
]


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(plan_names(SWEEP), describe_model("tiny", dtype="float32", device="cpu"), command=())


def record(prepared: Prepared, outcome: Outcome) -> Record:
    return record_of(prepared.manifest.spec, prepared.samples[0], prepared.cells[0], outcome, ["said"])


@pytest.mark.parametrize(("metric", "says"), BROKEN, ids=range(len(BROKEN)))
def test_a_metric_that_raises_fails_the_cell(
    metric: Metric, says: str, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record(prepared, Outcome()).status == "ok"
    monkeypatch.setattr(NextLine, "score", metric)
    found = record(prepared, Outcome(kv_bytes=7))
    assert (found.status, found.metrics) == ("failed", {})
    assert found.error is not None and found.error.startswith(says) and "\n" not in found.error


def test_a_number_that_no_record_holds_fails_the_cell(prepared: Prepared) -> None:
    found = record(prepared, Outcome(nll_per_token=(float("nan"),)))
    assert (found.status, found.nll, found.metrics) == ("failed", None, {})
    assert found.error is not None and found.error.startswith("no number to store: nll")


def test_a_broken_group_fails_and_another_commit_tries_it_again_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Captured
) -> None:
    real, calls = Engine.run_group, list[int]()

    def broken(self: Engine, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise IndexError("index out of range in self")
        return real(self, *given)

    monkeypatch.setattr(Engine, "run_group", broken)
    assert call(*RUN, "--out", tmp_path) == 1
    path, stored = only(tmp_path) / "records.jsonl", manifest(tmp_path)
    first = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["error"] for record in first[:CELLS]] == ["IndexError: index out of range in self"] * CELLS
    assert {record["status"] for record in first[CELLS:]} == {"ok"} and len(first) == 3 * CELLS
    monkeypatch.setattr(sequential, "git_commit", lambda: "0" * 40)
    capsys.readouterr()
    assert call(*RUN, "--out", tmp_path) == 2 and manifest(tmp_path) == stored
    change = f"commit {(stored['git_commit'] or 'none')[:12].removesuffix('-dirty')}"
    assert change in (line := capsys.readouterr().err.splitlines()[-1]) and "--resume-anyway" in line
    assert call(*RUN, "--out", tmp_path, "--resume-anyway") == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found[: 3 * CELLS] == first and len(found) == 4 * CELLS
    assert all(change in record["environment_changes"][0] for record in found[3 * CELLS :])
    stored = manifest(tmp_path)
    assert call(*RUN, "--out", tmp_path) == 0 and manifest(tmp_path) == stored  # nothing is left: nothing is refused
    assert "stays as it is, although since it was begun: commit" in caplog.text
