"""Pareto fronts by hand-computed examples, and the columns and pictures of measured tables."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.records.measured import Measured, Spread
from harness.records.record import Record
from leaderboards.stats.aggregate import Table, aggregate
from leaderboards.stats.pareto import running_best
from leaderboards.tables.board import main_frame, to_csv, to_markdown, to_terminal
from leaderboards.tables.picture import write_picture
from tests.pretend import cell, manifest, only, row

MIB = 2**20


def measured(tpot: float, **changes: Any) -> Measured:
    """A measurement; only what the tests look at differs."""
    step = Spread(median=tpot, low=0.0, high=9.0)
    values: dict[str, Any] = dict.fromkeys(("prefill_s", "observe_s", "compress_s", "tpot_s"), step)
    values |= {"ttft_s": Spread(median=100 * tpot, low=0.0, high=999.0), "tokens_per_s": 1 / tpot, "kv_bytes": (50, 50)}
    values |= {"tokens": 64, "batch": 1, "new_tokens": 8, "rounds": 1, "model_bytes": 1, "peak_bytes": 3 * MIB}
    return Measured(**{**values, "predicted_bytes": 1, "memory": "resident set", **changes})


def timed(method: str, budget: str, scores: Sequence[float | None], tpots: Sequence[float], size: int) -> list[Record]:
    """Records of one cell with a measurement each."""
    made = zip(cell(method, budget, scores, kv_bytes=size), tpots, strict=True)
    return [r.model_copy(update={"measured": measured(t) if r.status == "ok" else None}) for r, t in made]


def of_run(records: list[Record], run_id: str) -> list[Record]:
    return [r.model_copy(update={"run_id": run_id}) for r in records]


def fronts(table: Table, column: str) -> dict[str, str]:
    return dict(zip(table.rows.method + " " + table.rows.budget, table.rows[column], strict=True))


FLAT = [0.01] * 20


def test_fronts_by_hand() -> None:
    """Constant scores, so that every difference is told; TPOT turns the order of the bytes around for `slow`."""
    expected = {  # score, TPOT, bytes, on the front of bytes, on that of TPOT
        "fullkv full": (0.9, 0.04, 400, "*", "*"),
        "good 64": (0.6, 0.02, 100, "*", "*"),
        "bad 64": (0.5, 0.02, 100, "", ""),  # good costs the same
        "small 64": (0.3, 0.03, 50, "*", ""),  # the smallest; slower and worse than good
        "good 128": (0.55, 0.01, 200, "", "*"),  # dearer and worse than good at 64; the fastest
    }
    cells = [timed(*name.split(), [s] * 20, [t] * 20, size) for name, (s, t, size, *_) in expected.items()]
    table = only([r for one in cells for r in one])
    assert fronts(table, "front_bytes") == {name: own[-2] for name, own in expected.items()}
    assert fronts(table, "front_tpot") == {name: own[-1] for name, own in expected.items()}


def test_a_cheaper_cell_that_is_not_told_worse_makes_it_doubtful() -> None:
    """`dear` is 5 points better in the mean only: on no front for sure. `cheap` costs least: nothing can beat it."""
    noisy = [0.0, 1.0] * 10
    cheap = timed("cheap", "64", noisy, FLAT, 100)
    dear = timed("dear", "64", [1.0, *noisy[1:]], [0.02] * 20, 200)
    table = only(cheap + dear)
    assert fronts(table, "front_bytes") == fronts(table, "front_tpot") == {"cheap 64": "*", "dear 64": "="}
    better = timed("dear", "64", [1.0] * 20, [0.02] * 20, 200)
    assert fronts(only(cheap + better), "front_bytes") == {"cheap 64": "*", "dear 64": "*"}


def test_times_that_are_not_told_apart_put_no_cell_off() -> None:
    """The better cell is slower by noise alone: the worse one is neither on the front nor off it."""
    good = timed("good", "64", [0.9] * 20, [0.010, 0.012] * 10, 100)
    second = [0.012, 0.010] * 9 + [0.010, 0.010]
    for later, mark in ((0.0, "="), (0.01, "")):
        bad = timed("bad", "64", [0.1] * 20, [t + later for t in second], 100)
        assert fronts(only(good + bad), "front_tpot") == {"good 64": "*", "bad 64": mark}


def test_few_contexts_have_no_fronts() -> None:
    for n, mark in ((19, ""), (20, "*")):
        table = only(timed("a", "64", [0.9] * n, [0.01] * n, 100) + timed("b", "64", [0.1] * n, [0.02] * n, 100))
        assert fronts(table, "front_bytes") == fronts(table, "front_tpot") == {"a 64": mark, "b 64": ""}


def test_what_lacks_samples_or_measurements_puts_none_off() -> None:
    holey = timed("a", "64", [0.9] * 19 + [None], [0.005] * 20, 50)
    whole = timed("b", "64", [0.1] * 20, FLAT, 100)
    assert fronts(only(holey + whole), "front_bytes") == {"a 64": "=", "b 64": "="}
    partly = timed("a", "64", [0.9] * 20, [0.005] * 20, 50)
    partly[0] = partly[0].model_copy(update={"measured": None})
    table = only(partly + whole)
    assert fronts(table, "front_bytes") == {"a 64": "*", "b 64": ""}
    assert fronts(table, "front_tpot") == {"a 64": "=", "b 64": "="}
    never = only(cell("a", "64", [0.9] * 20, kv_bytes=50) + whole)
    assert fronts(never, "front_tpot") == {"a 64": "", "b 64": "*"}
    empty = only(cell("a", "64", [None] * 20) + whole)
    assert fronts(empty, "front_bytes") == {"a 64": "", "b 64": "*"}


def test_costs_are_compared_on_common_samples() -> None:
    """`a` has only long prompts here and more bytes in the mean, but fewer on each prompt that both have."""
    long = timed("a", "64", [0.9] * 20, FLAT, 300) + timed("b", "128", [0.1] * 20, FLAT, 400)
    long = [r.model_copy(update={"sample_id": f"x{r.sample_id}"}) for r in long]
    skipped = cell("a", "64", [None] * 20, status="skipped")
    table = only(long + skipped + timed("b", "128", [0.1] * 20, FLAT, 100))
    assert row(table, "a", "64")["kv_bytes_mean"] == 300 > row(table, "b", "128")["kv_bytes_mean"]
    assert fronts(table, "front_bytes") == {"a 64": "*", "b 128": ""}


def test_columns_are_means_over_what_was_measured() -> None:
    records = timed("a", "64", [1.0] * 4, [0.01, 0.02, 0.03, 0.5], 100)
    records[3] = records[3].model_copy(update={"measured": None, "notes": ("measure: oom (needs 9 GiB)",)})
    table = only(records + cell("b", "64", [1.0] * 4))
    expected = {"ttft_s_mean": 2.0, "tpot_s_mean": 0.02, "tokens_per_s_mean": (100 + 50 + 100 / 3) / 3}
    expected |= {"peak_bytes_mean": 3 * MIB, "n_measured": 3}
    found = row(table, "a", "64")
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    shown = {r["method"]: r for r in main_frame(table).to_dict("records")}
    names = ["TTFT s", "TPOT ms", "tokens/s", "peak MiB", "n measured", "front bytes", "front TPOT"]
    assert [shown["a"][name] for name in names] == ["2.000", "20.00", "61.1", "3.0", "3", "", ""]
    assert [shown["b"][name] for name in names] == ["-", "-", "-", "-", "0", "", ""]


def test_tables_without_measurements_say_nothing_of_speed(tmp_path: Path) -> None:
    plain = aggregate(cell("a", "64", [1.0] * 4))
    for text in (to_markdown(plain, title="b"), to_terminal(plain), to_csv(plain)):
        assert not any(word in text for word in ("TPOT", "tpot", "front", "peak", "n_measured"))
    assert "TPOT" not in write_picture(plain, tmp_path, "b").read_text()


def test_page_escapes_explains_and_names_the_machine() -> None:
    place = "cpu, a | b CPU, 2 threads"
    told = manifest(measured_on=place)
    records = timed("a", "64", [0.9] * 20, FLAT, 100) + timed("b", "64", [0.1] * 20, FLAT, 100)
    records = of_run(records, told.run_id)
    page = to_markdown(aggregate(records, manifests=[told]), title="b", manifests=[told])
    assert "- measured on: cpu, a \\| b CPU, 2 threads\n" in page
    assert "Pareto front of score" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| 64 ") and "90.0 ±" in line]
    assert [part.strip() for part in line.split("|")[-3:-1]] == ["\\*", "\\*"]


def test_machines_never_share_a_measured_table() -> None:
    places = [manifest(measured_on=f"cpu, CPU, {n} threads") for n in (1, 2)]
    plain = manifest()
    assert len({m.run_id for m in (*places, plain)}) == 3
    fast, slow = (
        of_run(timed("a", "64", [1.0] * 8, [tpot] * 8, 100), m.run_id)
        for m, tpot in zip(places, (0.01, 0.05), strict=True)
    )
    other = cell("b", "64", [0.5] * 8, run_id=plain.run_id)
    tables = aggregate(fast + slow + other, manifests=[*places, plain])
    assert [t.axes.settings for t in tables] == [
        "", "measured on cpu, CPU, 1 threads", "measured on cpu, CPU, 2 threads"
    ]  # fmt: skip
    assert [t.rows.tpot_s_mean[0] for t in tables[1:]] == pytest.approx([0.01, 0.05])
    (joined,) = aggregate(fast + other, manifests=[places[0], plain])  # one machine: its scores join
    assert set(joined.rows.method) == {"a", "b"}
    assert joined.axes.settings == ""
    frame = pd.read_csv(io.StringIO(to_csv(tables)), keep_default_na=False)
    assert list(frame[frame.method == "b"].front_tpot) == [""]
    assert list(frame[frame.method == "b"].n_measured) == [""]


def test_the_measured_record_of_a_cell_found_twice_is_used() -> None:
    twice = of_run(timed("a", "64", [1.0] * 8, [0.01] * 8, 100), "z")
    table = only(twice + cell("a", "64", [1.0] * 8, run_id="b"))
    assert row(table, "a", "64")["n_measured"] == 8
    assert table.duplicates == 8


def test_picture_has_a_front_in_two_of_three_panels(tmp_path: Path) -> None:
    records = [
        *timed("fullkv", "full", [0.9] * 20, [0.04] * 20, 400),
        *timed("a", "64", [0.6] * 20, [0.02] * 20, 100),
        *timed("b|<i>", "64", [0.5] * 20, [0.03] * 20, 100),
    ]
    tables = aggregate(records)
    text = write_picture(tables, tmp_path, "b").read_text()
    assert text == write_picture(tables, tmp_path / "..", "b").read_text()
    assert "TPOT, ms (measured)" in text
    assert text.count(">front of the means<") == 1
    assert '<g id="axes_3">' in text
    assert '<g id="axes_4">' not in text
    unscored = [r.model_copy(update={"measured": None}) if r.method != "a" else r for r in records]
    assert "TPOT" in write_picture(aggregate(unscored), tmp_path, "b").read_text()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_running_best_is_the_front(points: list[tuple[float, float]]) -> None:
    best = running_best(points)
    for point in set(points):
        beaten = any(p != point and p[0] <= point[0] and p[1] >= point[1] for p in points)
        assert (point in best) is not beaten
    assert best == sorted(set(best))
