"""Averages, paired intervals and marks against hand-computed values and simulation."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from random import Random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from harness.errors import HarnessError
from harness.records.record import Record
from leaderboards.stats.aggregate import aggregate
from tests.pretend import cell, only, record, row

ROOT = Path(__file__).parents[3]


def test_mean_is_the_unweighted_mean_of_task_means() -> None:
    """NLL over the samples that have one."""
    records = cell("snapkv", "128", [1.0, 0.0, 0.5, 0.5]) + cell("snapkv", "128", [1.0], task="ruler/vt")
    records[1] = records[1].model_copy(update={"nll": 2.0})
    found = row(only(records), "snapkv", "128")
    assert found["score_points_mean"] == pytest.approx((50 + 100) / 2)
    assert found["score_points_n"] == found["n_ok"] == 5
    assert (found["nll_nats_mean"], found["nll_nats_n"]) == (2, 1)
    table = only(records).tasks.set_index("task")
    assert table.loc["niah", "score_points_mean"] == 50
    assert table.loc["ruler/vt", "score_points_mean"] == 100


def test_differences_are_paired_on_common_samples() -> None:
    records = [
        *cell("fullkv", "full", [1.0, 1.0, 1.0, None], nll=1.0),
        *cell("snapkv", "128", [0.5, None, 0.0, 1.0], nll=1.5),
        *cell("h2o", "128", [1.0, 1.0, 1.0, 1.0], nll=2.5),
    ]
    table = only(records)
    h2o, snapkv, full = row(table, "h2o", "128"), row(table, "snapkv", "128"), row(table, "fullkv", "full")
    assert (snapkv["score_points_vs_fullkv_mean"], snapkv["score_points_vs_fullkv_n"]) == ((-50 - 100) / 2, 2)
    assert h2o["score_points_vs_snapkv_mean"] == pytest.approx((50 + 100 + 0) / 3)
    assert (h2o["nll_nats_vs_snapkv_mean"], h2o["nll_nats_vs_snapkv_n"]) == (1.0, 3)
    assert h2o["nll_nats_vs_fullkv_mean"] == 1.5
    assert math.isnan(snapkv["score_points_vs_snapkv_mean"]) and math.isnan(full["score_points_vs_fullkv_mean"])
    assert (full["score_points_mean"], full["n_failed"]) == (100, 1)


def test_a_baseline_is_at_the_same_budget_and_may_be_the_only_preset() -> None:
    h2o, paper, kvcf = (cell(m, "64", [s] * 8) for m, s in (("h2o", 0.0), ("snapkv@paper", 1.0), ("snapkv@kvcf", 0.5)))
    table = only(h2o + paper + cell("h2o", "128", [0.0] * 8))
    assert table.baselines == {"fullkv": None, "snapkv": "snapkv@paper"}
    assert row(table, "h2o", "64")["score_points_vs_snapkv_mean"] == -100
    assert math.isnan(row(table, "h2o", "128")["score_points_vs_snapkv_mean"])
    assert row(table, "h2o", "128")["score_points_vs_fullkv_n"] == 0
    assert only(h2o + paper + kvcf).baselines["snapkv"] is None
    assert only(h2o + paper + cell("snapkv", "64", [1.0] * 8)).baselines["snapkv"] == "snapkv"


def test_bytes_and_counts() -> None:
    records = [
        record("snapkv", "0.25", "0", 1.0, kv_bytes=90, full_bytes=400, asked_bytes=100),
        record("snapkv", "0.25", "1", 1.0, kv_bytes=60, full_bytes=200, asked_bytes=50, over_budget=True),
        record("snapkv", "0.25", "2", None, kv_bytes=7, full_bytes=7),
        record("snapkv", "0.25", "3", None, status="oom"),
        record("snapkv", "0.25", "4", None, status="skipped"),
    ]
    found = row(only(records), "snapkv", "0.25")
    assert [found[f"{what}_bytes_mean"] for what in ("kv", "full", "asked")] == [75, 300, 75]
    assert found["kv_percent_of_full"] == pytest.approx(25)
    assert [found[f"n_{s}"] for s in ("ok", "skipped", "failed", "oom", "over_budget")] == [2, 1, 1, 1, 1]
    assert found["flags"] == "incomplete skipped failed oom over_budget few"
    assert found["n_expected"] == 4


def test_a_sample_skipped_by_all_is_not_missing_but_counted() -> None:
    records = [*cell("fullkv", "full", [1.0] * 3)]
    for method in ("a", "b"):
        records += [*cell(method, "64", [1.0, 1.0]), record(method, "64", "2", None, status="skipped")]
    table = only(records)
    a, full = row(table, "a", "64"), row(table, "fullkv", "full")
    assert (a["flags"], a["n_expected"], full["n_expected"]) == ("skipped few other_samples", 2, 3)


def test_a_cell_without_any_score_is_empty() -> None:
    found = row(only(cell("a", "64", [None, None]) + cell("b", "64", [1.0, 1.0])), "a", "64")
    assert math.isnan(found["score_points_mean"]) and math.isnan(found["kv_percent_of_full"])
    assert (found["mark"], found["flags"]) == ("", "incomplete failed")


def test_unusable_input_is_refused() -> None:
    with pytest.raises(HarnessError, match="no records"):
        aggregate([])
    with pytest.raises(HarnessError, match="has no score"):
        aggregate([record("a", "64", "0", 1.0, metrics={"f1": 1.0})])
    with pytest.raises(ValidationError, match="finite"):
        record("a", "64", "0", float("nan"))


def test_mark_separates_only_what_the_interval_separates() -> None:
    def marks(**scores: list[float]) -> dict[str, str]:
        table = only([r for method, own in scores.items() for r in cell(method, "64", own)])
        return dict(zip(table.rows.method, table.rows["mark"], strict=True))

    spread = [0.0, 1.0] * 20
    assert marks(a=spread, b=[*spread[:-1], 0.0], c=[0.0] * 40) == {"a": "=", "b": "=", "c": ""}
    assert marks(a=[0.9] * 40, b=[0.8] * 40) == {"a": "*", "b": ""}
    assert marks(a=[0.9] * 40) == {"a": ""}


def test_a_failed_record_keeps_the_sample_in_its_cluster() -> None:
    """The group is a field of the sample, whichever record of it says so."""
    ok = [record("a", "64", str(i), float(i % 2), meta={"group": i // 2}) for i in range(20)]
    bare = [record("b", "64", str(i), float(i % 2)) for i in range(20)]
    found = row(only(ok + bare), "b", "64")
    assert found["score_points_low"] == found["score_points_high"] == 50  # every cluster holds a 0 and a 1
    assert row(only(bare), "b", "64")["score_points_low"] < 50


def test_needle_share_is_the_mean_over_layers_and_heads() -> None:
    def at(sample: str, tokens: int, *kept: tuple[int, int], score: float | None = 1.0, task: str = "niah") -> Record:
        return record("a", "64", sample, score, task=task, needle_tokens=tokens, needle_kept=kept)

    records = [at("0", 8, (8, 4), (0, 0)), at("1", 4, (4, 4), (4, 4))]  # (100 + 50 + 0 + 0) / 4, and all
    records += [at("2", 0), at("3", 4), at("4", 4, (0, 0), (0, 0), score=None), at("0", 10, (1, 0), (0, 1), task="vt")]
    table = only(records)
    assert row(table, "a", "64")["needle_percent_mean"] == pytest.approx(((37.5 + 100) / 2 + 5) / 2)
    assert row(table, "a", "64")["needle_percent_n"] == 3
    assert table.tasks.set_index("task")["needle_percent_mean"].to_dict() == {"niah": 68.75, "vt": 5}


def test_rows_are_sorted_by_budget_then_score() -> None:
    scores = {("a", "128"): 0.3, ("a", "64"): 0.1, ("b", "64"): 0.2, ("b", "1024"): 1.0, ("fullkv", "full"): 0.0}
    scores |= {("a", "0.25"): 0.0, ("a", "0.1"): 0.0}
    table = only([r for (m, b), s in scores.items() for r in cell(m, b, [s] * 6)])
    assert list(zip(table.rows.budget, table.rows.method, strict=True)) == [
        ("full", "fullkv"), ("64", "b"), ("64", "a"), ("128", "a"), ("1024", "b"), ("0.1", "a"), ("0.25", "a")
    ]  # fmt: skip
    assert table.rows.attrs == {"seed": 0, "resamples": 2000, "level": 0.95, "state_bytes": 0}


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=24, max_size=24))
def test_order_of_records_does_not_matter_and_bounds_hold(shuffle: int, scores: list[float | None]) -> None:
    names = itertools.product(("fullkv", "snapkv"), ("niah", "trec"), range(6))
    records = [
        record(m, "full" if m == "fullkv" else "64", str(i), s, task=t, nll=s)
        for (m, t, i), s in zip(names, scores, strict=True)
    ]
    one = only(records)
    Random(shuffle).shuffle(records)
    two = only(records)
    pd.testing.assert_frame_equal(one.rows, two.rows)
    pd.testing.assert_frame_equal(one.tasks, two.tasks)
    assert one.notes == two.notes
    for found in one.rows.to_dict("records"):
        low, mean, high = (found[f"score_points_{part}"] for part in ("low", "mean", "high"))
        assert math.isnan(low) or 0 <= low <= mean + 1e-9 <= high + 2e-9 <= 100 + 3e-9


def test_no_torch_and_no_ray() -> None:
    names = "{'torch', 'ray', 'transformers', 'methods.registry'}"
    code = f"import sys, leaderboards.stats.aggregate, leaderboards.tables.speed; print({names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
