"""The check of a card: rehearsed on the CPU, its steps alone, its report, and its CUDA calls against fakes."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cli import main as harness
from tests.gpu_check import __main__ as command
from tests.gpu_check.card import Card, NoCard
from tests.gpu_check.report import GOALS, Found, _step_rows, report
from tests.gpu_check.step import REHEARSAL, Check, Late, Step

FIGURES = {"ms", "TBps", "TFLOPs", "eager_ms", "graph_ms", "peak_bytes", "held_bytes"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsed")
    assert command.main(["--rehearse", "--out", str(out)]) == 0
    gc.unfreeze()
    return out


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in out.glob("*.json")]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a JSON value that is no dictionary, with its name."""
    if isinstance(value, dict):
        for key, own in value.items():
            yield from leaves(own, key)
    else:
        yield name, value


def test_a_rehearsal_runs_every_step(rehearsed: Path) -> None:
    found = {step["step"]: step for step in steps_of(rehearsed)}
    assert set(found) == {step.name for step in command.STEPS}
    assert {step["status"] for step in found.values()} == {"ok"}
    tests = found["1-tests"]["results"]["rehearsed"]
    assert (tests["passed"], tests["skipped"], len(tests["failed"])) == (1, 1, 1)
    assert all(own["float32"]["same"] for own in found["3-methods-equal"]["results"].values())
    lost = [name for step in found.values() for name, own in step["results"].items() if wrong(own)]
    assert [
        name for name in lost if not name.startswith(("triton", "one call", "varlen"))
    ] == []  # need Triton, or a card


def wrong(found: Any) -> bool:
    return isinstance(found, dict) and found.get("status") in ("failed", "oom", "timeout")


def test_a_rehearsal_has_no_figure_and_says_so(rehearsed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in steps_of(rehearsed):
        assert step["rehearsal"] is True and step["device"] == "cpu"
        assert {value for name, value in leaves(step["results"]) if name in FIGURES} <= {None}
    assert command.main(["--report", "--out", str(rehearsed)]) == 0
    told = capsys.readouterr().out
    assert "Nothing was measured" in told
    assert told.count("not measured |") == len(GOALS)


def test_no_board_is_made_of_a_rehearsal(rehearsed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness(["board", str(rehearsed)]) == 2
    assert "no run in" in capsys.readouterr().err
    assert not (rehearsed / "records").exists()


def test_without_a_card_it_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "no CUDA device here; give --rehearse" in capsys.readouterr().err


def test_results_are_never_mixed(rehearsed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--rehearse", "--out", str(rehearsed)]) == 2
    assert "has results already" in capsys.readouterr().err


def test_no_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--report", "--out", str(tmp_path)]) == 2
    assert "run `make gpu-check` first" in capsys.readouterr().err


def checked(out: Path, body: Any, *, seconds: float = 60, limit_s: float = 30) -> tuple[str, dict[str, Any]]:
    check = Check(NoCard(), REHEARSAL, out, seconds)
    status = check.run(Step("0-own", limit_s, body))
    return status, json.loads((out / "0-own.json").read_text())


def test_what_a_step_measured_before_its_time_was_up_is_kept(tmp_path: Path) -> None:
    def slow(check: Check) -> None:
        check.measure("first", lambda: {"ms": 1.0})
        assert json.loads((tmp_path / "0-own.json").read_text())["results"]["first"]  # before the step is over
        check.measure("second", lambda: [None for _ in iter(int, 1)])  # without an end

    status, kept = checked(tmp_path, slow, limit_s=0.2)
    assert status == kept["status"] == "late"
    assert kept["results"] == {"first": {"ms": 1.0}}


def test_out_of_memory_and_errors_are_told_and_the_next_measurement_is_made(tmp_path: Path) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("tried to allocate\n2 GiB")

    def body(check: Check) -> None:
        for name, call in (("a", full), ("b", lambda: 1 / 0), ("c", lambda: 3)):
            check.measure(name, call)
        raise ValueError("and then")

    status, kept = checked(tmp_path, body)
    assert status == "failed" and kept["error"] == "ValueError: and then"
    told = [own if name == "c" else (own["status"], own["error"]) for name, own in kept["results"].items()]
    zero = ("failed", "ZeroDivisionError: division by zero")
    assert told == [("oom", "OutOfMemoryError: tried to allocate 2 GiB"), zero, 3]


def test_late_is_no_exception_that_a_probe_would_catch() -> None:
    assert not issubclass(Late, Exception)


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    assert checked(tmp_path, lambda check: None, seconds=1)[0] == "no time"


def test_after_an_error_that_spoils_the_card_another_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[list[str]] = []

    def replaced(_: str, arguments: list[str]) -> None:
        began.append(arguments)
        raise SystemExit

    steps = (Step("0-own", 9, lambda check: None), Step("1-next", 9, lambda check: None))
    monkeypatch.setattr(command, "STEPS", steps)
    monkeypatch.setattr(command, "Card", NoCard)
    monkeypatch.setattr(NoCard, "alive", lambda self: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.os, "execv", replaced)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--shape", "qwen3-8b", "--seconds", "40"])
    assert began[0][-4:] == ["--after", "0-own", "--shape", "qwen3-8b"]
    assert 0 < float(began[0][-5]) < 40


class Event:
    """Of a card on which every second event is 2 ms later."""

    def __init__(self, *, enable_timing: bool) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, last: "Event") -> float:
        return 2.0


def test_figures_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([100, 0])
    fakes: dict[str, Any] = {
        "Event": Event,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(held),
        "max_memory_allocated": lambda: 150,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    card, calls = Card(), []
    assert card.ms(lambda: calls.append(1), repeat=3, warm=1) == 2.0
    assert len(calls) == 4
    assert card.peak(lambda: None) == 50
    card.free()


def test_a_card_that_is_full_is_alive_and_one_that_failed_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> Any:
        def ones(*_: Any, **__: Any) -> None:
            raise error

        return ones

    for error, alive in ((torch.OutOfMemoryError("full"), True), (RuntimeError("CUDA error: misaligned"), False)):
        monkeypatch.setattr(torch, "ones", raises(error))
        assert Card().alive() is alive


def test_figures_beside_their_goals() -> None:
    steps: dict[str, Any] = {
        "ceilings": {"copy": {"TBps": 3.0}},
        "tests": {"marked": {"failed": []}, "kernels": {"failed": ["test_a"]}},
        "kernels-equal": {"a": {"same": True}, "b": {"status": "failed", "error": "no"}},
        "methods-equal": {"snapkv": {"float32": {"same": True}, "bfloat16": {"slots": 0.9}}},
        "whole-prompts": {"engine": {"ms": 20.0}, "column sums": {"ms": 10.0}},
        "decoding": {
            "fullkv x 16": {"graph_ms": 26.0},
            "snapkv x 1": {"graph_ms": 5.0, "TBps": 2.5},
            "snapkv x 16": {"graph_ms": 5.2},
            "adakv x 16": {"graph_ms": 6.5},
        },
    }
    found = Found({name: {"rehearsal": False, "results": own} for name, own in steps.items()})
    figures = {goal.words: goal.figure(found) for goal in GOALS}
    told = {words: figure for words, figure in figures.items() if figure is not None}
    assert list(told.values()) == pytest.approx([1, 0.5, 1, 0.5, 1.2, 1.25, 0.8, 0])
    assert ("snapkv x 1", "", "5", "200", "0.8333") in list(_step_rows(found))
    verdicts = [goal.good(told[goal.words]) for goal in GOALS if goal.words in told]
    assert verdicts == [False, False, True, True, False, False, True, True]


def test_a_report_reads_the_records_of_probes(rehearsed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes' steps, rehearsed as if on a card, so that their records stay."""
    from tests.gpu_check import probes

    monkeypatch.setattr(NoCard, "rehearsal", False)
    check = Check(NoCard(), REHEARSAL, tmp_path, 60)
    for name, body in (("6-prompts", probes.second_model), ("8-boundary", probes.boundary)):
        assert check.run(Step(name, 30, body)) == "ok"
    found = Found.read(tmp_path)
    assert {(r.method, r.tokens) for r in found.benches} == {(name, 48) for name in probes.BATCH_METHODS}
    assert found.largest("fullkv") == found.largest("snapkv") == 3
    share = found.phase("snapkv", "compress_s")
    assert share is not None and share > 0
    assert "| snapkv | 48 x 1 |" in report(tmp_path)
    assert harness(["board", str(tmp_path / "records"), "--out", str(tmp_path / "board")]) == 0
