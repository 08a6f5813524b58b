"""Averages, paired intervals and marks against hand-computed values, scipy and simulation."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from harness.errors import HarnessError
from harness.records import Record, RunManifest
from harness.spec import MethodSpec, ModelSpec, RunSpec, TaskSpec
from leaderboards.aggregate import Bootstrap, Table, aggregate

ROOT = Path(__file__).parents[1]


def record(method: str, budget: str, sample: str, score: float | None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "run_id": "run1",
        "model": "tiny",
        "dtype": "float32",
        "task": "niah",
        "sample_id": sample,
        "method": method,
        "budget": budget,
        "query": "aware",
        "first_token": "compressed",
        "seed": 42,
        "status": "ok" if score is not None else "failed",
        "metrics": {} if score is None else {"score": score},
        "kv_bytes": 100,
        "asked_bytes": 100,
        "full_bytes": 400,
    }
    return Record(**{**values, **changes})


def cell(method: str, budget: str, scores: Sequence[float | None], **changes: Any) -> list[Record]:
    return [record(method, budget, str(i), score, **changes) for i, score in enumerate(scores)]


def only(records: Sequence[Record], **options: Any) -> Table:
    tables = aggregate(records, **options)
    assert len(tables) == 1
    return tables[0]


def row(table: Table, method: str, budget: str) -> Mapping[str, Any]:
    rows = table.rows[(table.rows.method == method) & (table.rows.budget == budget)]
    assert len(rows) == 1
    return dict(rows.iloc[0])


def marks(table: Table) -> dict[str, str]:
    return dict(zip(table.rows.method, table.rows["mark"], strict=True))


def test_mean_is_the_unweighted_mean_of_task_means() -> None:
    records = cell("snapkv", "128", [1.0, 0.0, 0.5, 0.5]) + cell("snapkv", "128", [1.0], task="ruler/vt")
    found = row(only(records), "snapkv", "128")
    assert found["score_points_mean"] == pytest.approx((50 + 100) / 2)
    assert found["score_points_n"] == found["n_ok"] == 5
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
    assert snapkv["score_points_vs_fullkv_mean"] == pytest.approx((-50 - 100) / 2)
    assert snapkv["score_points_vs_fullkv_n"] == 2
    assert h2o["score_points_vs_snapkv_mean"] == pytest.approx((50 + 100 + 0) / 3)
    assert h2o["nll_nats_vs_snapkv_mean"] == pytest.approx(1.0)
    assert h2o["nll_nats_vs_snapkv_n"] == 3
    assert h2o["nll_nats_vs_fullkv_mean"] == pytest.approx(1.5)
    assert math.isnan(snapkv["score_points_vs_snapkv_mean"])
    assert math.isnan(full["score_points_vs_fullkv_mean"])
    assert full["score_points_mean"] == 100
    assert full["n_failed"] == 1


def test_snapkv_is_the_baseline_at_the_same_budget_only() -> None:
    records = [*cell("snapkv", "64", [1.0] * 8), *cell("h2o", "64", [0.0] * 8), *cell("h2o", "128", [0.0] * 8)]
    table = only(records)
    assert row(table, "h2o", "64")["score_points_vs_snapkv_mean"] == -100
    assert math.isnan(row(table, "h2o", "128")["score_points_vs_snapkv_mean"])
    assert row(table, "h2o", "128")["score_points_vs_fullkv_n"] == 0


def test_baseline_may_be_the_only_preset() -> None:
    h2o, paper, kvcf = (cell(m, "64", [s] * 8) for m, s in (("h2o", 0.0), ("snapkv@paper", 1.0), ("snapkv@kvcf", 0.5)))
    assert only(h2o + paper).baselines == {"fullkv": None, "snapkv": "snapkv@paper"}
    assert row(only(h2o + paper), "h2o", "64")["score_points_vs_snapkv_mean"] == -100
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
    assert found["kv_bytes_mean"] == 75
    assert found["full_bytes_mean"] == 300
    assert found["asked_bytes_mean"] == 75
    assert found["kv_percent_of_full"] == pytest.approx(25)
    assert [found[f"n_{s}"] for s in ("ok", "skipped", "failed", "oom", "over_budget")] == [2, 1, 1, 1, 1]
    assert found["flags"] == "incomplete skipped failed oom over_budget few"
    assert found["n_expected"] == 4


def test_a_failure_is_no_zero_and_makes_the_cell_incomplete() -> None:
    table = only(cell("a", "64", [1.0, 1.0, None]) + cell("b", "64", [1.0, 1.0, 0.0]))
    a, b = row(table, "a", "64"), row(table, "b", "64")
    assert a["score_points_mean"] == 100
    assert a["n_ok"] == 2
    assert a["n_expected"] == 3
    assert "incomplete" in a["flags"]
    assert "incomplete" not in b["flags"]


def test_a_sample_skipped_by_all_is_not_missing_but_counted() -> None:
    records = [*cell("fullkv", "full", [1.0] * 3)]
    for method in ("a", "b"):
        records += [*cell(method, "64", [1.0, 1.0]), record(method, "64", "2", None, status="skipped")]
    table = only(records)
    assert row(table, "a", "64")["flags"] == "skipped few"
    assert row(table, "a", "64")["n_expected"] == 2
    assert row(table, "fullkv", "full")["n_expected"] == 3


def test_a_cell_without_any_score_is_empty() -> None:
    found = row(only(cell("a", "64", [None, None]) + cell("b", "64", [1.0, 1.0])), "a", "64")
    assert math.isnan(found["score_points_mean"])
    assert math.isnan(found["kv_percent_of_full"])
    assert found["mark"] == ""
    assert found["flags"] == "incomplete failed"


def test_nll_counts_only_where_it_was_measured() -> None:
    records = [record("a", "64", "0", 1.0, nll=2.0), record("a", "64", "1", 1.0, nll=None)]
    records += [record("a", "64", "0", 1.0, task="trec", nll=None)]
    found = row(only(records), "a", "64")
    assert found["nll_nats_mean"] == 2.0
    assert found["nll_nats_n"] == 1
    assert found["score_points_n"] == 3


@pytest.mark.parametrize(
    "change",
    [{"model": "big"}, {"dtype": "bfloat16"}, {"query": "agnostic"}, {"first_token": "prefill"}, {"seed": 1}],
)
def test_axes_are_never_mixed(change: dict[str, Any]) -> None:
    tables = aggregate(cell("a", "64", [1.0] * 8) + cell("a", "64", [0.0] * 8, run_id="run2", **change))
    assert sorted(t.rows.score_points_mean[0] for t in tables) == [0, 100]
    assert [t.axes for t in tables] == sorted(t.axes for t in tables)


def manifest(**changes: Any) -> RunManifest:
    values: dict[str, Any] = {
        "model": ModelSpec(name="tiny", revision="r0", dtype="float32", device="cpu"),
        "tasks": (TaskSpec(name="niah", protocol="official"),),
        "methods": (MethodSpec(label="a", name="a"),),
        "budgets": ("64",),
        "lengths": (1024,),
        "limit": None,
        "seed": 42,
        "max_tokens": 2048,
        "max_new_tokens": None,
        "first_token": "compressed",
        "query": "aware",
        "nll_tokens": 64,
    }
    spec = RunSpec(**{**values, **changes})
    return RunManifest(
        run_id=spec.run_id, status="finished", command=(), spec=spec, started="2025-01-01", samples=8, cells=1
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks": (TaskSpec(name="niah", protocol="classical"),)}, "niah protocol classical"),
        ({"max_tokens": 512}, "max_tokens 512"),
        ({"nll_tokens": 8}, "nll_tokens 8"),
        ({"model": ModelSpec(name="tiny", revision="r1", dtype="float32", device="cpu")}, "tiny revision r1"),
    ],
)
def test_settings_of_the_runs_are_axes_where_they_differ(change: dict[str, Any], says: str) -> None:
    runs = [manifest(), manifest(**change)]
    records = [r for m, s in zip(runs, (1.0, 0.0), strict=True) for r in cell("a", "64", [s] * 8, run_id=m.run_id)]
    tables = aggregate(records, manifests=runs)
    assert len(tables) == 2
    assert any(says in t.axes.settings for t in tables)


def test_runs_that_add_methods_budgets_or_tasks_share_a_table() -> None:
    runs = [
        manifest(),
        manifest(methods=(MethodSpec(label="b", name="b"),)),
        manifest(tasks=(TaskSpec(name="ruler/vt", protocol="own"),)),
    ]
    records = [r for m, name in zip(runs, "abc", strict=True) for r in cell(name, "64", [1.0] * 8, run_id=m.run_id)]
    assert len(aggregate(records, manifests=runs)) == 1


def test_one_sample_id_with_two_prompts_is_refused() -> None:
    records = cell("a", "64", [1.0], prompt_sha256="x") + cell("b", "64", [1.0], prompt_sha256="y", run_id="run2")
    with pytest.raises(HarnessError, match="not the same prompt in runs run1 and run2"):
        aggregate(records)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(HarnessError, match="no records"):
        aggregate([])
    with pytest.raises(HarnessError, match="has no score"):
        aggregate([record("a", "64", "0", 1.0, metrics={"f1": 1.0})])
    with pytest.raises(ValidationError, match="finite"):
        record("a", "64", "0", float("nan"))


def test_a_cell_of_two_runs_is_used_once_and_ok_goes_first() -> None:
    table = only(cell("a", "64", [None, 1.0]) + cell("a", "64", [0.5, 0.0], run_id="run2"))
    found = row(table, "a", "64")
    assert found["n_ok"] == 2
    assert found["score_points_mean"] == 75  # 0.5 of run2, 1.0 of run1
    assert table.duplicates == 2
    assert table.run_ids == ("run1", "run2")


def test_constant_difference_has_an_interval_of_no_width() -> None:
    records = cell("snapkv", "64", [0.25] * 8) + cell("h2o", "64", [0.75] * 8)
    found = row(only(records), "h2o", "64")
    assert found["score_points_vs_snapkv_low"] == found["score_points_vs_snapkv_high"] == 50


def test_no_interval_with_too_few_samples() -> None:
    for scores in ([0.0, 1.0, 0.0, 1.0, 0.0], [0.5]):
        found = row(only(cell("a", "64", scores)), "a", "64")
        assert math.isnan(found["score_points_low"])
        assert math.isnan(found["score_points_high"])
    lonely = cell("a", "64", [0.0, 1.0] * 8) + cell("a", "64", [1.0], task="trec")
    assert math.isnan(row(only(lonely), "a", "64")["score_points_low"])
    assert row(only(cell("a", "64", [0.0, 1.0] * 3)), "a", "64")["score_points_high"] > 50


def test_bootstrap_agrees_with_scipy() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(1.0, 1.0, 60)
    b = a - generator.normal(0.5, 0.5, 60)  # correlated: an unpaired interval is about three times as wide
    ours = Bootstrap(["t"] * 60, resamples=20_000).estimate(a - b)
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis=-1: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert ours.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)
    assert ours.high - ours.low == pytest.approx(np.std(a - b) / math.sqrt(60) * 2 * 1.96, rel=0.05)


def test_strata_are_redrawn_apart() -> None:
    """Two tasks with different means and no spread within: a bootstrap over the pool would have a wide interval."""
    estimate = Bootstrap(["a"] * 10 + ["b"] * 30).estimate(np.array([0.0] * 10 + [100.0] * 30))
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (50.0, 50.0, 50.0, 40)


def test_stratified_spread_has_the_textbook_width() -> None:
    generator = np.random.default_rng(5)
    small, large = generator.normal(0, 10, 40), generator.normal(50, 1, 400)
    estimate = Bootstrap(["s"] * 40 + ["l"] * 400, resamples=8000).estimate(np.concatenate([small, large]))
    error = math.sqrt(np.var(small) / 40 + np.var(large) / 400) / 2
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_interval_covers_the_truth() -> None:
    """Nominal 95 %; 2 x 30 samples of a skewed distribution give slightly less. 400 repeats: standard error 1.1 %."""
    generator = np.random.default_rng(6)
    names = ["a"] * 30 + ["b"] * 30
    bootstrap = Bootstrap(names, resamples=1000)
    estimates = [bootstrap.estimate(generator.exponential(1.0, 60)) for _ in range(400)]
    covered = np.mean([e.low <= 1.0 <= e.high for e in estimates])
    assert 0.90 <= covered <= 0.98


def test_mark_separates_only_what_the_interval_separates() -> None:
    spread = [0.0, 1.0] * 20
    close = [*spread[:-1], 0.0]
    table = only(cell("a", "64", spread) + cell("b", "64", close) + cell("c", "64", [0.0] * 40))
    assert marks(table) == {"a": "=", "b": "=", "c": ""}
    table = only(cell("a", "64", [0.9] * 40) + cell("b", "64", [0.8] * 40))
    assert marks(table) == {"a": "*", "b": ""}
    assert marks(only(cell("a", "64", [0.9] * 40))) == {"a": ""}


def test_noise_declares_no_winner_often() -> None:
    """Two equal methods: `*` should appear in about 5 % of worlds, of 200."""
    generator = np.random.default_rng(7)
    wins = 0
    for _ in range(200):
        scores = generator.integers(0, 2, (2, 40)).astype(float).tolist()
        table = only(cell("a", "64", scores[0]) + cell("b", "64", scores[1]), resamples=400)
        wins += "*" in set(table.rows["mark"])
    assert wins <= 0.12 * 200


def test_few_pairs_and_incomplete_or_overspending_cells_never_win() -> None:
    assert marks(only(cell("a", "64", [1.0] * 5) + cell("b", "64", [0.0] * 5))) == {"a": "=", "b": "="}
    nine = cell("a", "64", [1.0] * 9) + cell("b", "64", [0.0] * 9)  # an interval, but of too few samples
    assert marks(only(nine)) == {"a": "=", "b": "="}
    table = only(cell("a", "64", [1.0] * 39 + [None]) + cell("b", "64", [0.5] * 40) + cell("c", "64", [0.1] * 40))
    assert marks(table) == {"a": "=", "b": "=", "c": ""}
    table = only(
        cell("a", "64", [1.0] * 40, over_budget=True) + cell("b", "64", [0.5] * 40) + cell("c", "64", [0.1] * 40)
    )
    assert marks(table) == {"a": "", "b": "*", "c": ""}


def test_rows_are_sorted_by_budget_then_score() -> None:
    records = [r for m, b, s in _cells() for r in cell(m, b, [s] * 6)]
    table = only(records)
    assert list(zip(table.rows.budget, table.rows.method, strict=True)) == [
        ("full", "fullkv"), ("64", "b"), ("64", "a"), ("128", "a"), ("1024", "b"), ("0.1", "a"), ("0.25", "a")
    ]  # fmt: skip
    assert table.rows.attrs == {"seed": 0, "resamples": 2000, "level": 0.95}


def _cells() -> list[tuple[str, str, float]]:
    small = [("a", "64", 0.1), ("b", "64", 0.2), ("a", "0.25", 0.0), ("a", "0.1", 0.0)]
    return [("a", "128", 0.3), *small, ("b", "1024", 1.0), ("fullkv", "full", 0.0)]


def test_notes_and_errors_are_counted() -> None:
    records = [
        *cell("pyramidkv", "128", [1.0, 1.0], notes=("flat pyramid",)),
        *cell("pyramidkv", "64", [1.0, 1.0], notes=("flat pyramid",)),
        record("h2o", "64", "1", None, error="second"),
        record("h2o", "64", "0", None, error="first"),
    ]
    found = [(n.method, n.budgets, n.what, n.count, n.error) for n in only(records).notes]
    assert found == [("h2o", ("64",), "failed", 2, "first"), ("pyramidkv", ("64", "128"), "flat pyramid", 4, "")]


@settings(max_examples=25, deadline=None)
@given(
    shuffle=st.integers(0, 2**31),
    scores=st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0])), min_size=24, max_size=24),
)
def test_order_of_records_does_not_matter_and_bounds_hold(shuffle: int, scores: list[float | None]) -> None:
    names = itertools.product(("fullkv", "snapkv"), ("niah", "trec"), range(6))
    records = [
        record(m, "full" if m == "fullkv" else "64", str(i), s, task=t, nll=s)
        for (m, t, i), s in zip(names, scores, strict=True)
    ]
    mixed = list(records)
    Random(shuffle).shuffle(mixed)
    one, two = only(records), only(mixed)
    pd.testing.assert_frame_equal(one.rows, two.rows)
    pd.testing.assert_frame_equal(one.tasks, two.tasks)
    assert one.notes == two.notes
    for found in one.rows.to_dict("records"):
        low, mean, high = (found[f"score_points_{part}"] for part in ("low", "mean", "high"))
        assert math.isnan(low) or 0 <= low <= mean + 1e-9 <= high + 2e-9 <= 100 + 3e-9


def test_no_torch_and_no_ray() -> None:
    code = "import sys, leaderboards.aggregate; print({'torch', 'ray', 'transformers', 'methods'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
