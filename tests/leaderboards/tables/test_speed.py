"""Tables of speed from stored records: merged passes, ratios, alarms, what came to grief, and text from outside."""

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.errors import HarnessError
from harness.records.bench_folder import BenchRecord
from harness.records.measured import Measured, Spread
from leaderboards.tables.speed import frame, to_csv, to_markdown, to_terminal, write_speed
from leaderboards.tables.speed_rows import SpeedRow, merge, tables

MIB = 2**20


def measured(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        **{"tokens": 2048, "batch": 1, "new_tokens": 32, "rounds": 1, "tokens_per_s": 100.0, "kv_bytes": (MIB, MIB)},
        **{name: Spread.of([0.5]) for name in ("prefill_s", "observe_s", "compress_s", "ttft_s")},
        "tpot_s": Spread.of([0.01]),
        **{"model_bytes": 9 * MIB, "peak_bytes": 100 * MIB, "predicted_bytes": 98 * MIB, "memory": "resident set"},
    }
    return Measured(**{**values, **changes})


def record(method: str, budget: str = "128", found: Measured | None = None, **changes: Any) -> BenchRecord:
    values: dict[str, Any] = {
        **{"bench_id": "b1", "kind": "bench", "machine": "m1", "model": "tiny", "dtype": "float32", "device": "cpu"},
        **{"kernel": "sdpa", "threads": 1, "method": method, "budget": budget, "tokens": 2048, "batch": 1},
        **{"new_tokens": 32, "chunk": None, "warm_up": True, "limit_bytes": None, "round": 0, "status": "ok"},
        "budget_tokens": None if budget == "full" else int(budget),
    }
    if changes.get("status", "ok") == "ok":
        values["measured"] = found or measured()
    return BenchRecord(**{**values, **changes})


def test_passes_are_merged_by_the_median_of_their_medians() -> None:
    passes = ((0.02, 0.01, 0.9, 100), (0.03, 0.02, 0.04, 300), (0.08, 0.07, 0.1, 200))
    merged = merge(
        [measured(tpot_s=Spread(median=m, low=lo, high=hi), peak_bytes=p, batch=3) for m, lo, hi, p in passes]
    )
    assert merged.tpot_s == Spread(median=0.03, low=0.01, high=0.9)
    assert merged.peak_bytes == 300 and merged.rounds == 3
    assert merged.tokens_per_s == pytest.approx(3 / 0.03)
    with pytest.raises(HarnessError, match="measured different things"):
        merge([measured(), measured(tokens=99)])


def test_a_row_has_ratios_shares_and_an_alarm() -> None:
    full = measured(tpot_s=Spread.of([0.04]), peak_bytes=200 * MIB, predicted_bytes=200 * MIB)
    small = measured(compress_s=Spread.of([0.01]), peak_bytes=106 * MIB, predicted_bytes=100 * MIB)
    (table,) = tables([record("snapkv", found=small), record("fullkv", "full", full)])
    first, second = frame(table).to_dict("records")
    assert (first["method"], second["method"]) == ("fullkv", "snapkv")
    assert second["TPOT / full"] == "0.25" and second["peak / full"] == "0.53" and second["compress %"] == "2.0"
    assert second["peak MiB"] == "106.0 !" and "!" not in first["peak MiB"]
    assert second["KV MiB"] == "2.00" and second["TPOT ms"] == "10.00"
    said = to_terminal([record("snapkv", found=small)])
    assert "! snapkv at 128: peak 6% above its prediction" in said and "differ by more than 5%" in said
    steps = measured(tpot_s=Spread(median=0.02, low=0.01, high=0.04), tokens_per_s=50.0)
    assert frame(tables([record("snapkv", found=steps)])[0])["tokens/s"][0] == "50.0 [25.0, 100.0]"


def test_five_percent_is_the_border() -> None:
    rows = (SpeedRow(record("h2o"), 1, measured(peak_bytes=peak, predicted_bytes=100)) for peak in (94, 95, 105, 106))
    assert [row.alarm for row in rows] == [True, False, False, True]


def test_what_came_to_grief_is_a_row_and_no_baseline() -> None:
    records = [
        *(record("fullkv", "full"), record("fullkv", "full", status="oom", error="out of memory", round=1)),
        record("snapkv"),
        record("h2o", status="timeout", error="more than 5 s"),
        record("random", "4096", status="skipped", error="not below"),
    ]
    (table,) = tables(records)
    found = {line["method"]: line for line in frame(table).to_dict("records")}
    ended = {"fullkv": "oom", "snapkv": "ok", "h2o": "timeout", "random": "skipped"}
    assert {name: line["status"] for name, line in found.items()} == ended
    assert found["fullkv"]["TPOT ms"] == "-" and found["snapkv"]["TPOT / full"] == "-"
    page = to_markdown(records)
    assert "fullkv at full, pass 2: oom: out of memory" in page and "no ratios" in page


def test_what_differs_never_shares_a_table_and_two_benches_are_two_rows() -> None:
    axes = {"machine": "m2", "dtype": "bfloat16", "device": "cuda:0", "threads": 2, "limit_bytes": 5, "chunk": 7}
    records = [record("fullkv", "full"), *(record(name, **{name: value}) for name, value in axes.items())]
    assert sorted([row.first.method for row in table.rows] for table in tables(records)) == sorted(
        [[name] for name in ("fullkv", *axes)]
    )
    (table,) = tables([record("snapkv"), record("snapkv", bench_id="b2")])
    assert list(frame(table)["bench"]) == ["b1", "b2"]


def test_serving_counts_tokens_with_and_without_prefill() -> None:
    shape = {"batch": 4, "new_tokens": 11, "ttft_s": Spread.of([2.0]), "tpot_s": Spread.of([0.2])}
    found = {"full": measured(**shape), "128": measured(**{**shape, "tpot_s": Spread.of([0.1])})}
    methods = {"full": "fullkv", "128": "snapkv"}
    (table,) = tables([record(methods[b], b, m, kind="serve-bench", batch=4) for b, m in found.items()])
    first, second = frame(table).to_dict("records")
    assert first["tokens/s"] == "20.0" and first["with prefill"] == "4.4"  # 44 tokens in 4 * 2 + 10 * 0.2 s
    assert second["tokens/s"] == "40.0" and second["tokens/s / full"] == "2.00" and second["KV MiB"] == "8.00"


def test_the_csv_keeps_bytes_and_spreads() -> None:
    low = Spread(median=0.01, low=0.0099, high=0.02)
    read = pd.read_csv(io.StringIO(to_csv([record("snapkv", found=measured(tpot_s=low)), record("h2o", status="oom")])))
    snap = read[read.method == "snapkv"].iloc[0]
    assert snap.kv_bytes == 2 * MIB and snap.kv_bytes_per_layer == f"{MIB} {MIB}" and snap.tpot_s_low == 0.0099
    assert read[read.method == "h2o"].tpot_s_median.isna().all()


def test_hostile_text_breaks_no_table(tmp_path: Path) -> None:
    model = "a|b\n## c"
    records = [record("x|y\n# **h**\x1b[31m<b>\u202e", model=model)]
    records += [record("snapkv", model=model, status="failed", error="<i>|\n\n# z")]
    md, csv = write_speed(records, tmp_path, "bench")
    page = md.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert "<b>" not in page.replace("\\<b\\>", "") and "\x1b" not in page and "\u202e" not in page
    assert sum(line.startswith("#") for line in page.splitlines()) == 1
    assert len(pd.read_csv(csv)) == 2 and "\x1b" not in to_terminal(records)


def test_the_same_records_give_the_same_page_in_any_order() -> None:
    records = [record("fullkv", "full"), record("snapkv"), record("snapkv", round=1), record("h2o", "512", tokens=8192)]
    assert to_markdown(records) == to_markdown(records[::-1]) and to_csv(records) == to_csv(records[::-1])


def test_nothing_to_show_and_a_bad_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no records"):
        to_terminal([])
    with pytest.raises(HarnessError, match="no file name"):
        write_speed([record("snapkv")], tmp_path, "../x")
