"""The search for a boundary against probers with known bytes, its folder, and the command with a pretend prober."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from harness.boundary import Boundaries, Search, first_guess, largest
from harness.boundary_store import RECORDS_FILE, BoundaryManifest, BoundaryRecord, BoundaryStore, load_boundaries
from harness.cli_boundary import boundary_parser
from harness.errors import HarnessError
from harness.limits import Limit
from harness.measured import Measured, ProbeResult, ProbeSpec, Spread, Status
from harness.spec import ModelSpec

LIMIT = 1000
GRID = {"least": 256, "most": 8192, "step": 256}


def measured(spec: ProbeSpec, *, peak: int) -> Measured:
    """What a probe brings back; all seconds are 1, 7 bytes were predicted."""
    seconds = {
        f"{name}_s": Spread(median=1, low=1, high=1) for name in ("prefill", "observe", "compress", "ttft", "tpot")
    }
    return Measured(
        tokens=spec.tokens,
        batch=spec.batch,
        new_tokens=spec.new_tokens,
        rounds=1,
        tokens_per_s=1.0,
        kv_bytes=(1,),
        model_bytes=100,
        peak_bytes=peak,
        predicted_bytes=7,
        memory="resident set",
        **seconds,
    )


class Known:
    """A prober of known bytes: tokens * batch * rate. ends: what other sizes (tokens, batch) end with."""

    def __init__(self, rate: float, ends: dict[tuple[int, int], Status | BaseException] | None = None) -> None:
        self.rate, self.ends = rate, ends or {}
        self.asked: list[tuple[int, int]] = []

    def ask(self, spec: ProbeSpec, *, limit_bytes: int | None = None, timeout_s: float = 1.0) -> ProbeResult:
        assert limit_bytes == LIMIT and timeout_s == 7.0 and spec.method == "snapkv" and spec.new_tokens == 32
        size = (spec.tokens, spec.batch)
        self.asked.append(size)
        need = math.ceil(spec.tokens * spec.batch * self.rate)
        end = self.ends.get(size, "ok" if need <= LIMIT else "oom")
        if isinstance(end, BaseException):
            raise end
        found = measured(spec, peak=need) if end == "ok" else None
        return ProbeResult(status=end, measured=found, error=None if end == "ok" else f"it\nwas {end}")


def manifest(**changes: Any) -> BoundaryManifest:
    values: dict[str, Any] = {
        "command": ("harness", "boundary"),
        "created": "2026-01-01T00:00:00+00:00",
        "model": ModelSpec(name="tiny", revision="r", dtype="float32", device="cpu"),
        "context": 8192,
        "limit_bytes": LIMIT,
        "limit_kind": "address space",
        "model_bytes": 100,
        "threads": 1,
        "chunk": None,
        "new_tokens": 32,
        "timeout_s": 7.0,
    }
    return BoundaryManifest(**{**values, **changes})


def search(kind: str = "context", first: int = 1024, **changes: Any) -> Search:
    spec = ProbeSpec(method="snapkv", budget="128", tokens=1024, warm_up=False)
    values: dict[str, Any] = {"spec": spec, "method": "snapkv", "kind": kind, "first": first, **GRID}
    if kind == "batch":
        values |= {"least": 1, "most": 64, "step": 1, "at_context": 1024}
    return Search(**{**values, **changes})


def found(folder: Path, prober: Known, *searches: Search, say: Callable[[str], None] = print) -> list[BoundaryRecord]:
    with BoundaryStore.open(folder, manifest()) as store:
        boundaries = Boundaries(prober, store, limit_bytes=LIMIT, timeout_s=7.0, say=say)
        return [boundaries.run(each) for each in searches]


@given(
    threshold=st.integers(-1, 300),
    first=st.integers(-50, 400),
    least=st.integers(1, 40),
    count=st.integers(1, 200),
    step=st.integers(1, 7),
)
def test_the_largest_size_is_exact_from_any_guess_in_few_probes(
    threshold: int, first: int, least: int, count: int, step: int
) -> None:
    most, asked = least + count * step - 1, []

    def fits(size: int) -> ProbeResult:
        asked.append(size)
        return ProbeResult(status="ok" if size <= threshold else "oom")

    result = largest(fits, first=first, least=least, most=most, step=step)
    sizes = range(least, most + 1, step)
    fitting = [size for size in sizes if size <= threshold]
    assert result.answer == (fitting[-1] if fitting else 0)
    assert result.whole == (len(fitting) == len(sizes))
    larger = next((size for size in sizes if size > threshold), None)
    assert (result.next_size, result.next_status) == (larger, "oom" if larger else None)
    assert len(set(asked)) == len(asked) and set(asked) <= set(sizes)
    far = abs(len(fitting) - min(max((first - least) // step, 0), count - 1)) + 1
    assert len(asked) <= 2 * math.log2(far) + 3


def test_a_good_guess_takes_two_probes() -> None:
    asked = []

    def fits(size: int) -> ProbeResult:
        asked.append(size)
        return ProbeResult(status="ok" if size <= 3000 else "oom")

    assert largest(fits, first=2816, **GRID).answer == 2816
    assert asked == [2816, 3072]


def test_no_size_at_all_is_refused() -> None:
    with pytest.raises(HarnessError, match="least size, 512, is above the most, 256"):
        largest(lambda size: ProbeResult(status="ok"), first=1, least=512, most=256, step=256)


@given(rate=st.integers(1, 50), room=st.integers(0, 20_000), count=st.integers(1, 60))
def test_the_guess_is_the_largest_predicted_to_fit(rate: int, room: int, count: int) -> None:
    sizes = range(3, 3 + 2 * count, 2)
    guess = first_guess(lambda size: rate * size, room=room, least=3, most=sizes[-1], step=2)
    assert guess == max((size for size in sizes if rate * size <= room), default=3)


@pytest.mark.parametrize("first", [0, 256, 1024, 1792, 2048, 5000, 8192, 10**6])
def test_both_boundaries_of_a_known_model(tmp_path: Path, first: int) -> None:
    context, batch = found(tmp_path, Known(0.5), search(first=first), search("batch", first=first // 256))
    assert context.found is not None and batch.found is not None
    assert (context.found.answer, context.found.next_size, context.found.next_status) == (1792, 2048, "oom")
    assert (batch.found.answer, batch.found.next_size, batch.at_context) == (1, 2, 1024)
    edge, past = context.probe(1792), context.probe(2048)
    assert edge is not None and past is not None
    assert (edge.status, edge.peak_bytes, edge.predicted_bytes) == ("ok", 896, 7)
    assert (past.status, past.peak_bytes, past.error) == ("oom", None, "it was oom")


def test_everything_fits_and_nothing_fits(tmp_path: Path) -> None:
    (whole,) = found(tmp_path / "a", Known(0.0), search())
    assert whole.found is not None
    assert (whole.found.answer, whole.found.whole, whole.found.next_size) == (8192, True, None)
    (none,) = found(tmp_path / "b", Known(100.0), search())
    assert none.found is not None
    assert (none.found.answer, none.found.whole, none.found.next_size, none.found.next_status) == (0, False, 256, "oom")


@pytest.mark.parametrize("end", ["timeout", "failed"])
def test_a_hang_or_a_failure_counts_as_not_fitting_and_says_so(tmp_path: Path, end: Status) -> None:
    prober = Known(0.5, {(1536, 1): end})
    (record,) = found(tmp_path, prober, search(first=1280))
    assert record.found is not None
    assert (record.found.answer, record.found.next_size, record.found.next_status) == (1280, 1536, end)
    assert [p.status for p in record.probes] == ["ok", end]


def test_a_prober_that_breaks_never_ends_the_search(tmp_path: Path) -> None:
    lines: list[str] = []
    prober = Known(0.5, {(1024, 1): OSError("pipe\nbroke"), (768, 1): MemoryError()})
    (record,) = found(tmp_path, prober, search(first=1024), say=lines.append)
    assert record.found is not None and (record.found.answer, record.found.next_status) == (512, "failed")
    assert [p.error for p in record.probes if p.status == "failed"] == ["OSError: pipe broke", "MemoryError:"]
    assert len(lines) == len(record.probes) and "1024 tokens x 1: failed" in lines[0] and "pipe broke" in lines[0]


def test_an_unusable_machine_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no limit can be set"):
        found(tmp_path, Known(0.5, {(1024, 1): HarnessError("no limit can be set")}), search())


@pytest.mark.parametrize("killed", [256 * n for n in range(1, 12)])
def test_after_a_kill_no_probe_is_repeated(tmp_path: Path, killed: int) -> None:
    todo = [search(first=512), search("batch", first=30)]
    straight = Known(0.3)
    wanted = found(tmp_path / "straight", straight, *todo)
    first = Known(0.3, {(killed, 1): KeyboardInterrupt()})
    if (killed, 1) in straight.asked:
        with pytest.raises(KeyboardInterrupt):
            found(tmp_path / "killed", first, *todo)
        first.asked.pop()
    second = Known(0.3)
    got = found(tmp_path / "killed", second, *todo)
    assert first.asked + second.asked == straight.asked
    assert [(r.key, r.found) for r in got] == [(r.key, r.found) for r in wanted]
    third = Known(0.3)
    assert found(tmp_path / "killed", third, *todo) == got and third.asked == []


def test_a_probe_serves_both_searches_and_a_wider_one(tmp_path: Path) -> None:
    prober = Known(0.5)
    found(tmp_path, prober, search(first=1024, most=1024), search("batch", first=1))
    assert prober.asked.count((1024, 1)) == 1
    (wider,) = found(tmp_path, prober, search(first=1024))
    assert prober.asked.count((1024, 1)) == 1 and wider.found is not None and wider.found.answer == 1792
    stored = load_boundaries(tmp_path)[1]
    assert [r.kind for r in stored] == ["context", "batch"] and stored[0] == wider


def test_another_parameter_is_searched_again(tmp_path: Path) -> None:
    prober = Known(0.5)
    found(tmp_path, prober, search(params={"window": 32, "path": Path("a")}))
    asked = len(prober.asked)
    found(tmp_path, prober, search(params={"window": 32, "path": Path("a")}))
    assert len(prober.asked) == asked
    found(tmp_path, prober, search(params={"window": 64, "path": Path("a")}))
    assert len(prober.asked) == 2 * asked


def test_a_truncated_last_line_is_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    todo = [search(), search("batch", first=1)]
    wanted = found(tmp_path, Known(0.5), *todo)
    path = tmp_path / RECORDS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    prober = Known(0.5)
    with caplog.at_level(logging.WARNING):
        again = found(tmp_path, prober, *todo)
    assert "unfinished last line" in caplog.text
    assert {batch for _, batch in prober.asked} == {2}  # batch 1 is known from the contexts
    assert [r.found for r in again] == [r.found for r in wanted]
    assert path.read_bytes().count(b"\n") == 2 and path.read_bytes().endswith(b"\n")


def test_a_damaged_line_another_limit_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    found(tmp_path, Known(0.5), search())
    with pytest.raises(HarnessError, match="was searched with limit_bytes 1000, not 2000; choose another --out"):
        BoundaryStore.open(tmp_path, manifest(limit_bytes=2000))
    BoundaryStore.open(tmp_path, manifest(model_bytes=101)).close()
    with FileLock(tmp_path / ".lock"), pytest.raises(HarnessError, match="being written by another process"):
        BoundaryStore.open(tmp_path, manifest())
    path = tmp_path / RECORDS_FILE
    path.write_text("{}\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(HarnessError, match=r"boundary.jsonl:1 is damaged: method: Field required"):
        load_boundaries(tmp_path)
    with pytest.raises(HarnessError, match="cannot read"):
        load_boundaries(tmp_path / "nowhere")


def test_another_commit_is_said_and_the_earlier_manifest_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BoundaryStore.open(tmp_path, manifest(git_commit="a")).close()
    BoundaryStore.open(tmp_path, manifest(git_commit="b")).close()
    assert "another commit" in caplog.text
    kept = json.loads((tmp_path / "boundary.1.json").read_text(encoding="utf-8"))
    assert kept["git_commit"] == "a" and load_boundaries(tmp_path)[0].git_commit == "b"


class Pretend(Known):
    """A prober for the command: a known model of bytes under a limit of 2000, the model's own 1000 among them."""

    started: ClassVar[list[dict[str, Any]]] = []
    dies: ClassVar[set[tuple[int, int]]] = set()

    def __init__(self, **named: Any) -> None:
        super().__init__(0.5)
        self.started.append(named)
        self.model_bytes, self.limit = 1000, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def ask(self, spec: ProbeSpec, limit_bytes: int | None = None, timeout_s: float = 600.0) -> ProbeResult:
        self.limit = Limit("address space", 2000, "no cgroup of its own: Permission denied")
        if (spec.tokens, spec.batch) in self.dies:
            raise HarnessError("the probe server ended (-9)")
        fits = spec.tokens * spec.batch * (1 if spec.method == "fullkv" else 0.25) <= 1000
        return ProbeResult(status="ok", measured=measured(spec, peak=5)) if fits else ProbeResult(status="oom")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command on the tiny model with `Pretend`; arguments as typed."""
    monkeypatch.setitem(sys.modules, "harness.probe", SimpleNamespace(Prober=Pretend))
    monkeypatch.setattr(Pretend, "started", [])
    monkeypatch.setattr(Pretend, "dies", set())

    def run(*typed: str) -> int:
        parser = argparse.ArgumentParser()
        boundary_parser(parser)
        base = ["--model", "tiny", "--dtype", "float32", "--device", "cpu", "--methods", "fullkv,snapkv"]
        args = parser.parse_args([*base, "--memory-limit", "2000", "--out", str(tmp_path), *typed])
        return int(args.action(args, ("harness", "boundary", *typed)))

    return run


def test_the_command_finds_prints_and_writes(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--context", "512", "--max-batch", "8", "--threads", "1") == 0
    told = capsys.readouterr()
    assert "note: limit by address space, no cgroup of its own: Permission denied" in told.err
    assert "harness: fullkv full: 1024 tokens x 1: oom in" in told.err
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for cells in map(str.split, told.out.splitlines()):  # the table is folded
        rows[tuple(cells[:2])] += cells[2:]
    assert rows["full", "fullkv"] == ["768", "0.0", "1024", "oom", "1", "0.0", "2", "oom"]
    assert rows["128", "snapkv"] == ["3840", "0.0", "4096", "oom", "7", "0.0", "8", "oom"]
    manifest, records = load_boundaries(tmp_path)
    assert (manifest.limit_kind, manifest.model_bytes, manifest.threads, len(records)) == ("address space", 1000, 1, 4)
    assert (tmp_path / "frontier.svg").is_file() and (tmp_path / "frontier.md").is_file()
    assert Pretend.started == [{"model": "tiny", "dtype": "float32", "device": "cpu", "threads": 1}]


def test_a_prober_that_goes_down_is_started_again(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Pretend.dies.add((768, 1))
    assert command("--methods", "fullkv", "--context", "512", "--max-batch", "2") == 1
    context = load_boundaries(tmp_path)[1][0].found
    assert context is not None and (context.answer, context.next_size, context.next_status) == (512, 768, "failed")
    assert len(Pretend.started) == 2
    err = capsys.readouterr().err
    assert "the probe server ended (-9)" in err and "1 of 2 searches end at a probe that failed" in err


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--memory-limit", "900"], "--memory-limit 900 is 900 bytes, the loaded model alone takes 1000; raise it"),
        (["--memory-limit", "much"], "'much' is no size"),
        (["--methods", "snapvk"], "unknown method 'snapvk'"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available here"),
        (["--budgets", "many"], "many"),
        (["--budgets", "600", "--context", "512"], "budget 600 is not below the --context of 512 tokens"),
        (["--context", "5000"], "--context 5000 exceeds 4096"),
        (["--max-tokens", "200"], "a longest context of 200 is below 256"),
        (["--max-batch", "0"], "--max-batch 0 is too small"),
        (["--timeout", "nan"], "--timeout nan is too small"),
        (["--set", "snapkv.window"], "has no value"),
        (["--model", "tinny"], "unknown model 'tinny'"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    command: Callable[..., int], typed: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(HarnessError) as refused:
        command(*typed)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
