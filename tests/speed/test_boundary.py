"""The search for a boundary against probers with known bytes, and its folder."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.records.boundary_folder import (
    RECORDS_FILE,
    BoundaryManifest,
    BoundaryRecord,
    BoundaryStore,
    load_boundaries,
)
from harness.records.measured import ProbeResult, ProbeSpec, ProbeStatus
from harness.records.spec import ModelSpec
from harness.speed.boundary import Search, first_guess, largest, run_search
from tests.pretend import measured

LIMIT = 1000


class Known:
    """A prober of known bytes: tokens * batch * rate. ends: what other sizes (tokens, batch) end with."""

    def __init__(self, rate: float, ends: dict[tuple[int, int], ProbeStatus | BaseException] | None = None) -> None:
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
        found = measured(spec, peak_bytes=need, predicted_bytes=7) if end == "ok" else None
        return ProbeResult(status=end, measured=found, error=None if end == "ok" else f"it\nwas {end}")


def manifest(**changes: Any) -> BoundaryManifest:
    values: dict[str, Any] = {
        **{"command": ("harness", "boundary"), "created": "2026-01-01T00:00:00+00:00", "context": 8192, "threads": 1},
        "model": ModelSpec(name="tiny", revision="r", dtype="float32", device="cpu"),
        **{"limit_bytes": LIMIT, "limit_kind": "address space", "model_bytes": 100, "chunk": None},
        **{"new_tokens": 32, "timeout_s": 7.0},
    }
    return BoundaryManifest(**{**values, **changes})


def search(kind: str = "context", first: int = 1024, **changes: Any) -> Search:
    """A search from `first`, the largest that is predicted to fit."""
    values: dict[str, Any] = {"method": "snapkv", "budget": "128", "kind": kind, "limit_bytes": LIMIT}
    if kind == "batch":
        values |= {"least": 1, "most": 64, "step": 1, "at_context": 1024}
    else:
        values |= {"least": 256, "most": 8192, "step": 256}
    spec = ProbeSpec(method="snapkv", budget="128", tokens=1024, warm_up=False)
    most = first if kind == "context" else 1024 * first
    return Search(
        BoundaryRecord(**{**values, **changes}), spec, lambda probe: LIMIT if probe.tokens * probe.batch > most else 1
    )


def found(folder: Path, prober: Known, *searches: Search) -> list[BoundaryRecord]:
    with BoundaryStore(folder, manifest()) as store:
        return [run_search(each, prober, store) for each in searches]  # type: ignore[arg-type]


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
    asked, sizes = [], range(least, least + count * step, step)

    def fits(size: int) -> ProbeStatus:
        asked.append(size)
        return "ok" if size <= threshold else "oom"

    result = largest(fits, sizes, first=first)
    fitting = [size for size in sizes if size <= threshold]
    assert result.answer == (fitting[-1] if fitting else 0)
    assert result.whole == (len(fitting) == len(sizes))
    larger = next((size for size in sizes if size > threshold), None)
    assert (result.next_size, result.next_status) == (larger, "oom" if larger else None)
    assert len(set(asked)) == len(asked) and set(asked) <= set(sizes)
    far = abs(len(fitting) - min(max((first - least) // step, 0), count - 1)) + 1
    assert len(asked) <= 2 * math.log2(far) + (2 if far == 1 else 3)  # a good guess takes two probes


@given(rate=st.integers(1, 50), room=st.integers(0, 20_000), count=st.integers(1, 60))
def test_the_guess_is_the_largest_predicted_to_fit(rate: int, room: int, count: int) -> None:
    sizes = range(3, 3 + 2 * count, 2)
    assert first_guess(lambda size: rate * size, room, sizes) == max(
        (size for size in sizes if rate * size <= room), default=3
    )


@pytest.mark.parametrize("first", [0, 1792, 10**6])
def test_both_boundaries_of_a_known_model(tmp_path: Path, first: int) -> None:
    prober = Known(0.5)
    context, batch = found(tmp_path, prober, search(first=first), search("batch", first=first // 256))
    assert prober.asked[0] == (min(max(first, 256), 8192), 1)
    assert context.found is not None and batch.found is not None
    assert (context.found.answer, context.found.next_size, context.found.next_status) == (1792, 2048, "oom")
    assert (batch.found.answer, batch.found.next_size, batch.at_context) == (1, 2, 1024)
    edge, past = context.probe(1792), context.probe(2048)
    assert edge is not None and past is not None
    assert (edge.status, edge.peak_bytes, edge.predicted_bytes) == ("ok", 896, 7)
    assert (past.status, past.peak_bytes, past.error) == ("oom", None, "it was oom")


@pytest.mark.parametrize("end", ["timeout", "failed"])
def test_a_hang_or_a_failure_counts_as_not_fitting_and_says_so(tmp_path: Path, end: ProbeStatus) -> None:
    prober = Known(0.5, {(1536, 1): end})
    (record,) = found(tmp_path, prober, search(first=1280))
    assert record.found is not None
    assert (record.found.answer, record.found.next_size, record.found.next_status) == (1280, 1536, end)
    assert [p.status for p in record.probes] == ["ok", end]


def test_a_prober_that_breaks_never_ends_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prober = Known(0.5, {(1024, 1): OSError("pipe\nbroke"), (768, 1): MemoryError()})
    (record,) = found(tmp_path, prober, search(first=1024))
    lines = capsys.readouterr().err.splitlines()
    assert record.found is not None and (record.found.answer, record.found.next_status) == (512, "failed")
    assert [p.error for p in record.probes if p.status == "failed"] == ["OSError: pipe broke", "MemoryError:"]
    assert len(lines) == len(record.probes) and "1024 tokens x 1: failed" in lines[0] and "pipe broke" in lines[0]


def test_an_unusable_machine_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no limit can be set"):
        found(tmp_path, Known(0.5, {(1024, 1): HarnessError("no limit can be set")}), search())


def test_after_a_kill_no_probe_is_repeated(tmp_path: Path) -> None:
    todo = [search(first=512), search("batch", first=30)]
    straight = Known(0.3)
    wanted = found(tmp_path / "straight", straight, *todo)
    assert len(straight.asked) > 10
    for killed in straight.asked:
        folder = tmp_path / f"{killed}"
        first, second, third = Known(0.3, {killed: KeyboardInterrupt()}), Known(0.3), Known(0.3)
        with pytest.raises(KeyboardInterrupt):
            found(folder, first, *todo)
        first.asked.pop()
        got = found(folder, second, *todo)
        assert first.asked + second.asked == straight.asked
        assert [(r.key, r.found) for r in got] == [(r.key, r.found) for r in wanted]
        assert found(folder, third, *todo) == got and third.asked == []


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


def test_a_search_whose_line_was_lost_asks_only_what_is_not_known(tmp_path: Path) -> None:
    todo = [search(), search("batch", first=1)]
    wanted = found(tmp_path, Known(0.5), *todo)
    path = tmp_path / RECORDS_FILE
    path.write_bytes(path.read_bytes()[:-20])
    prober = Known(0.5)
    again = found(tmp_path, prober, *todo)
    assert {batch for _, batch in prober.asked} == {2}  # batch 1 is known from the contexts
    assert [r.found for r in again] == [r.found for r in wanted]


def test_another_limit_is_refused(tmp_path: Path) -> None:
    found(tmp_path, Known(0.5), search())
    with pytest.raises(HarnessError, match="was searched with limit_bytes 1000, not 2000; choose another --out"):
        BoundaryStore(tmp_path, manifest(limit_bytes=2000))
    BoundaryStore(tmp_path, manifest(model_bytes=101)).close()
