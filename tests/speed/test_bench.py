"""A bench with a pretend prober: order, resume, what comes to grief, bad input, and what is written down."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import HarnessError, checked
from harness.records.bench_folder import BENCH_FILE, BENCHES, LINES_FILE, load_bench, machine_id
from harness.records.measured import ProbeResult, ProbeSpec
from harness.speed import bench, target
from harness.speed.asked import BenchAsk
from harness.speed.bench import clocks_mhz, run_bench
from harness.speed.memory_limit import Limit
from harness.speed.target import SHORT
from leaderboards.tables.speed import to_markdown
from tests.pretend import measured

ASK: dict[str, Any] = {
    **{"model": "tiny", "dtype": "float32", "device": "cpu", "threads": 1, "methods": ("fullkv", "snapkv", "h2o")},
    **{"budgets": ("16",), "lengths": (64,), "rounds": 2, "new_tokens": 4},
}
Answer = Callable[[ProbeSpec], ProbeResult]


def fine(spec: ProbeSpec) -> ProbeResult:
    return ProbeResult(status="ok", measured=measured(spec, rounds=1))


class FakeProber:
    """Answers by a function and notes what it was asked."""

    model_bytes = 1000
    limit: Limit | None = None

    def __init__(self, answer: Answer = fine) -> None:
        self.answer, self.asked, self.given = answer, list[ProbeSpec](), dict[str, Any]()
        self.limits: list[tuple[int | None, float]] = []
        self.entered = self.left = 0

    def __call__(self, **given: Any) -> FakeProber:
        self.given = given
        return self

    def __enter__(self) -> FakeProber:
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.left += 1

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, timeout_s: float = 600.0) -> ProbeResult:
        if spec.tokens == SHORT:
            self.limit = Limit("address space", limit_bytes or 0, "no cgroup of its own: Permission denied")
            return fine(spec)
        self.asked.append(spec)
        self.limits.append((limit_bytes, timeout_s))
        return self.answer(spec)

    @property
    def order(self) -> list[str]:
        return [spec.method for spec in self.asked]


def run(root: Path, prober: FakeProber, **changes: Any) -> Path:
    return run_bench(checked(BenchAsk, {**ASK, **changes}), root=root, command=("harness", "bench"), prober=prober)


def test_a_method_without_its_tables_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods, note = ("snapkv", "headkv"), "headkv: no tables for this model: uniform budgets"
    manifest, _ = load_bench(run(tmp_path, FakeProber(), methods=methods, rounds=1))
    assert [told for told in manifest.machine["notes"] if "tables" in told] == [note]
    assert f"note: {note}" in capsys.readouterr().err


def test_passes_go_over_all_methods_in_turn_and_back(tmp_path: Path) -> None:
    prober = FakeProber()
    manifest, records = load_bench(run(tmp_path, prober, limit_bytes=5000, timeout_s=7.5))
    assert prober.order == ["fullkv", "snapkv", "h2o", "h2o", "snapkv", "fullkv"]
    assert prober.given == {"model": "tiny", "dtype": "float32", "device": "cpu", "threads": 1}
    assert set(prober.limits) == {(5000, 7.5)} and {spec.rounds for spec in prober.asked} == {1}
    assert [spec.budget for spec in prober.asked[:3]] == [None, "16", "16"]
    assert len(records) == 6 and {record.round for record in records} == {0, 1}
    assert manifest.git_commit == bench.git_commit()
    assert manifest.status == "finished" and manifest.model_bytes == 1000 and manifest.spec.kernel == "sdpa"
    assert {record.machine for record in records} == {machine_id(manifest.machine)}
    assert {record.model_revision for record in records} == {manifest.spec.model_revision} != {""}


def test_for_a_gpu_the_model_is_read_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(target, "resolve_dtype", lambda dtype, place: torch.bfloat16)
    monkeypatch.setattr(target, "load_model", None)
    monkeypatch.setattr(bench, "describe", lambda device: {"gpu": {"name": str(device)}})
    prober = FakeProber()
    manifest, records = load_bench(run(tmp_path, prober, rounds=1, device="cuda"))
    assert prober.given["device"] == manifest.spec.device == "cuda:0" and manifest.spec.dtype == "bfloat16"
    assert [record.status for record in records] == ["ok"] * 3 and manifest.machine["gpu"] == {"name": "cuda:0"}


def test_what_holds_a_probe_is_said_once_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, _ = load_bench(run(tmp_path, FakeProber(), limit_bytes=5000))
    told = "limit by address space, no cgroup of its own: Permission denied"
    assert manifest.machine["limit_kind"] == "address space" and told in manifest.machine["notes"]
    assert capsys.readouterr().err.count(told) == 1
    manifest, _ = load_bench(run(tmp_path, FakeProber()))
    assert "limit_kind" not in manifest.machine


def test_a_prompt_above_the_context_or_not_above_the_budget_is_skipped_without_a_probe(tmp_path: Path) -> None:
    prober = FakeProber()
    changes = {"budgets": ("16", "64"), "lengths": (64, 4096, 4097), "rounds": 1, "methods": ("snapkv",)}
    _, records = load_bench(run(tmp_path, prober, **changes))
    assert [(spec.tokens, spec.budget) for spec in prober.asked] == [(64, "16"), (4096, "16"), (4096, "64")]
    long = "the prompt of 4097 tokens is longer than the model's context of 4096"
    assert {(r.tokens, r.budget, r.error) for r in records if r.status == "skipped"} == {
        *((64, "64", "the budget of 64 is not below the 64 tokens of the prompt"),),
        *((4097, budget, long) for budget in ("16", "64")),
    }


def ending(method: str, end: BaseException | ProbeResult) -> Answer:
    """Answers well, but for one method ends as told."""

    def answer(spec: ProbeSpec) -> ProbeResult:
        if spec.method == method and isinstance(end, BaseException):
            raise end
        return end if spec.method == method else fine(spec)  # type: ignore[return-value]

    return answer


def test_a_prober_that_goes_down_costs_one_probe(tmp_path: Path) -> None:
    prober = FakeProber(ending("snapkv", HarnessError("the probe server of tiny ended (-9); try again")))
    _, records = load_bench(run(tmp_path, prober, rounds=1))
    assert [(r.method, r.status) for r in records] == [("fullkv", "ok"), ("snapkv", "failed"), ("h2o", "ok")]
    assert prober.entered == 2 and "ended (-9)" in (records[1].error or "")


def test_out_of_memory_says_what_was_expected(tmp_path: Path) -> None:
    prober = FakeProber(lambda spec: ProbeResult(status="oom", error="killed by SIGKILL"))
    _, (record,) = load_bench(run(tmp_path, prober, methods=("fullkv",), rounds=1, limit_bytes=3 * 2**20))
    said = r"\d+ MiB were predicted above the model's 0; the limit is 3 MiB; killed by SIGKILL"
    assert record.error is not None and re.fullmatch(said, record.error)


def test_what_is_recorded_is_not_run_again(tmp_path: Path) -> None:
    folder = run(tmp_path, FakeProber())
    path = folder / LINES_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # as a kill leaves it
    prober = FakeProber()
    assert run(tmp_path, prober) == folder
    assert prober.order == ["snapkv", "fullkv"] and path.read_bytes().count(b"\n") == 6
    cells = (("fullkv", "full"), ("snapkv", "16"), ("h2o", "16"))
    assert {record.key for record in load_bench(folder)[1]} == {(*cell, 64, n) for cell in cells for n in (0, 1)}


@pytest.mark.parametrize(("status", "again"), [("oom", 0), ("timeout", 2), ("failed", 2)])
def test_a_cell_that_comes_to_grief_is_left_out_of_later_passes(tmp_path: Path, status: Any, again: int) -> None:
    prober = FakeProber(ending("h2o", ProbeResult(status=status, error="so it went")))
    _, records = load_bench(run(tmp_path, prober))
    assert prober.order.count("h2o") == 1 and prober.order.count("snapkv") == 2
    (lost,) = (record for record in records if record.method == "h2o")
    assert lost.status == status and (lost.error or "").endswith("so it went") and lost.measured is None
    second = FakeProber()
    run(tmp_path, second)
    assert second.order == ["h2o"] * again


def test_changed_parameters_reach_the_probe_and_the_label(tmp_path: Path) -> None:
    prober = FakeProber()
    _, records = load_bench(run(tmp_path, prober, methods=("snapkv@kvpress", "h2o"), set={"snapkv.kernel": 5}))
    assert prober.asked[0].method == "snapkv@kvpress" and prober.asked[0].set == {"kernel": 5}
    assert prober.asked[1].set == {} and "snapkv@kvpress[kernel=5]" in {record.method for record in records}


def test_an_interrupt_keeps_what_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeProber(ending("h2o", KeyboardInterrupt())))
    (folder,) = BENCHES.find(tmp_path)
    manifest, records = load_bench(folder)
    assert manifest.status == "interrupted" and len(records) == 2
    prober = FakeProber()
    run(tmp_path, prober)
    assert len(prober.order) == 4


def test_another_machine_or_another_shape_is_another_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[dict[str, Any]] = [{}, {}, {"batch": 2}, {"threads": 2}, {"chunk": 32}]
    folders = {run(tmp_path, FakeProber(), **changed) for changed in changes}
    monkeypatch.setattr(bench, "machine", lambda: {"processor": "another", "cores": 3})
    folders.add(run(tmp_path, FakeProber()))
    assert len(folders) == 5


def test_a_batch_of_copies_is_another_bench_and_says_so(tmp_path: Path) -> None:
    """And one without copies has the id that it had before there were any."""
    prober = FakeProber()
    shape: dict[str, Any] = {"methods": ("snapkv",), "rounds": 1, "batch": 8}
    folder = run(tmp_path, prober, **shape, distinct=4)
    manifest, records = load_bench(folder)
    assert prober.asked[0].distinct == manifest.spec.distinct == records[0].distinct == 4
    assert "batch 8, 4 new tokens, 4 prompts prefilled and the others copies" in to_markdown(records)
    whole = run(tmp_path, FakeProber(), **shape)
    assert whole != folder and whole == run(tmp_path, FakeProber(), **shape, distinct=8)
    spec = load_bench(whole)[0].spec
    told = [spec.model_dump(mode="json", exclude={"distinct"}), machine_id(manifest.machine)]
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == whole.name


def test_clocks_and_threads_are_no_identity() -> None:
    one = {"processor": "p", "cores": 2, "memory_gib": 4, "accelerators": [], "system": "s"}
    assert machine_id(one) == machine_id({**one, "clocks_mhz": {"low": 1}, "torch_threads": 9})
    assert machine_id(one) != machine_id({**one, "accelerators": ["gpu"]})
    assert all(value > 0 for value in clocks_mhz().values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "no methods asked for"),
        ({"budgets": ("0",)}, "keeps nothing"),
        ({"lengths": ()}, "no lengths asked for"),
        ({"lengths": (1,)}, "--lengths 1 is too small"),
        ({"distinct": 1}, "--distinct 1 is too small; give at least 2"),
        ({"dtype": "int4"}, "unknown dtype"),
        ({"set": {"pyramidkv.beta": 3}}, "names no method of this run"),
        ({"limit_bytes": 1000}, "--memory-limit of 1000 bytes is not above the loaded model's own 1000; raise it"),
        ({"methods": ("compilerkv",), "set": {"compilerkv.tables": "nowhere"}}, "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    prober = FakeProber()
    with pytest.raises(HarnessError) as error:
        run(tmp_path, prober, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not prober.asked and not list(tmp_path.iterdir())


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    path = run(tmp_path, FakeProber()) / BENCH_FILE
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["machine"]["processor"] = "a faster one"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(HarnessError, match="was edited"):
        load_bench(path.parent)
