"""Rank intervals and task intervals against plain loops, Tukey's table, `leaderboards.stats.subject` and simulation."""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean, pstdev, variance

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.records.record import Record
from leaderboards.stats.aggregate import Table
from leaderboards.stats.grid import Grid
from leaderboards.stats.ranks import rank_columns, step_down
from leaderboards.stats.subject import compare
from leaderboards.tables.sections import rank_text
from tests.pretend import cell, only, record, row

Scores = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Method to task to the score of each sample."""


def ranks(table: Table, what: str = "rank") -> dict[str, tuple[float, float]]:
    rows = table.rows[table.rows.budget != "full"]
    return dict(zip(rows.method, zip(rows[f"{what}_low"], rows[f"{what}_high"], strict=True), strict=True))


def records_of(scores: Scores) -> list[Record]:
    return [
        r for method, tasks in scores.items() for task, of in tasks.items() for r in cell(method, "64", of, task=task)
    ]


@pytest.mark.parametrize(("methods", "tabled"), [(2, 2.772), (3, 3.314), (4, 3.633), (5, 3.858), (10, 4.474)])
def test_first_step_has_the_critical_value_of_tukeys_table(methods: int, tabled: float) -> None:
    """Upper 5 % points of the studentized range of independent normal means, infinite degrees of freedom."""
    normal = np.random.default_rng(1).normal(size=(100_000, methods))
    pairs = [(i, j) for i in range(methods) for j in range(methods) if i != j]
    draws = np.stack([(normal[:, i] - normal[:, j]) / math.sqrt(2) for i, j in pairs], axis=1)
    statistics = np.full(len(pairs), -9.0)
    for factor, expected in ((0.985, False), (1.015, True)):
        statistics[0] = factor * tabled / math.sqrt(2)
        assert step_down(statistics, draws).tolist() == [expected] + [False] * (len(pairs) - 1)


def test_a_step_down_frees_level_for_the_rest() -> None:
    """The second statistic is below the limit of both, 8, and above its own, 4."""
    draws = np.array([[float(i % 10), float(i % 5)] for i in range(10)])
    assert step_down(np.array([9.5, 4.5]), draws, level=0.85).tolist() == [True, True]
    assert step_down(np.array([7.5, 4.5]), draws, level=0.85).tolist() == [False, False]


def naive_pair(
    differences: dict[str, dict[int, float]], draws: dict[str, list[list[int]]]
) -> tuple[float, list[float]]:
    """(statistic, the same redrawn) of one pair. differences: of each task, by sample."""
    means = {t: fmean(d.values()) for t, d in differences.items()}
    mean, parts = fmean(means.values()), dict[str, list[float]]()
    for t, d in differences.items():
        drawn = [[d[i] for i in of if i in d] for of in draws[t]]
        widen = math.sqrt(len(d) / (len(d) - 1))
        parts[t] = [widen * (fmean(of) - means[t]) if of else 0.0 for of in drawn]
    deviations = [fmean(of) for of in zip(*parts.values(), strict=True)]
    error = pstdev(deviations)
    if error < 1e-8:
        return (math.copysign(math.inf, mean) if abs(mean) > 1e-8 else 0.0), [0.0] * len(deviations)
    spread = {t: variance(of) for t, of in parts.items()}
    freedom = sum(spread.values()) ** 2 / sum(v**2 / (len(differences[t]) - 1) for t, v in spread.items())
    return float(stats.norm.isf(stats.t.sf(mean / error, freedom))), [x / error for x in deviations]


def naive_ranks(scores: Scores, *, resamples: int) -> dict[str, tuple[int, int]]:
    """One draw, one pair, one task and one sample at a time. Every sample is its own cluster."""
    methods, tasks = list(scores), sorted(next(iter(scores.values())))
    draws = {}
    for task in tasks:
        n = len(scores[methods[0]][task])
        generator = np.random.default_rng([0, zlib.crc32(task.encode()), n, 1])
        order = sorted(range(n), key=str)  # as the samples' ids are
        draws[task] = [[order[i] for i in generator.integers(n, size=n)] for _ in range(resamples)]
    tested: dict[tuple[str, str], tuple[float, list[float]]] = {}
    whole = [m for m in methods if all(x is not None for of in scores[m].values() for x in of)]
    for a, b in itertools.product(whole, methods):
        pairs = {t: enumerate(zip(scores[a][t], scores[b][t], strict=True)) for t in tasks}
        differences = {t: {i: 100 * (x - y) for i, (x, y) in of if y is not None} for t, of in pairs.items()}
        if a != b and min(len(d) for d in differences.values()) >= 10:
            tested[a, b] = naive_pair(differences, draws)
    better: set[tuple[str, str]] = set()
    while left := [pair for pair in tested if pair not in better]:
        top = sorted(max(tested[pair][1][r] for pair in left) for r in range(resamples))
        limit = top[math.ceil(0.95 * (resamples - 1))]
        found = {pair for pair in left if tested[pair][0] > limit + 1e-9}
        if not found:
            break
        better |= found
    return {
        m: (1 + sum((o, m) in better for o in methods), len(methods) - sum((m, o) in better for o in methods))
        for m in methods
    }


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5), st.sampled_from([0.0, 0.15, 0.3]), st.booleans())
def test_rank_intervals_are_what_plain_loops_find(seed: int, methods: int, step: float, lacking: bool) -> None:
    generator = np.random.default_rng(seed)
    scores: dict[str, dict[str, list[float | None]]] = {f"m{i}": {} for i in range(methods)}
    for (i, tasks), (task, n) in itertools.product(enumerate(scores.values()), (("niah", 12), ("vt", 15))):
        tasks[task] = np.clip(generator.normal(0.3 + step * i, 0.3, n), 0, 1).round(2).tolist()
    if lacking:
        scores["m0"]["vt"][3] = None
    assert ranks(only(records_of(scores), resamples=100)) == naive_ranks(scores, resamples=100)


SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE, SCORE, SCORE), min_size=12, max_size=24), st.integers(0, 2**31))
def test_order_changes_nothing_equals_tie_and_the_point_rank_is_inside(rows: list[tuple[float]], order: int) -> None:
    a, b, c, lacks = np.array(rows).T
    columns = {"a": a, "b": b, "c": c, "lacks": np.array([math.nan, *lacks[1:]]), "twin": b}
    records = [r for m, of in columns.items() for r in cell(m, "64", [None if x != x else x for x in of.tolist()])]
    table = only(records, resamples=200)
    Random(order).shuffle(records)
    pd.testing.assert_frame_equal(table.rows, only(records, resamples=200).rows)
    found = ranks(table)
    assert found["b"] == found["twin"]
    for method, own in columns.items():
        gaps = [np.nansum(own - of).round(9) for of in columns.values()]
        best, last = 1 + sum(gap < 0 for gap in gaps), len(gaps) - sum(gap > 0 for gap in gaps)
        low, high = found[method]
        assert 1 <= low <= best <= last <= high <= len(columns)


def test_equal_methods_are_seldom_told_apart_on_many_small_tasks() -> None:
    """Six equal methods that are right or wrong, fourteen tasks of five samples."""
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(60):
        records = []
        for task in range(14):
            base, right = generator.random(5), generator.uniform(0.02, 0.98)
            for i in range(6):
                own = np.where(generator.random(5) < 0.5, base, generator.random(5)) < right
                records += cell(f"m{i}", "64", own.astype(float).tolist(), task=f"t{task}")
        columns = rank_columns(Grid(records, seed=0, resamples=400))
        wrong += any((c["rank_low"], c["rank_high"]) != (1, 6) for c in columns.values())
    assert wrong <= 0.15 * 60


def test_small_tasks_need_enough_samples_in_all() -> None:
    tasks = [f"t{i}" for i in range(4)]
    records = records_of({"a": dict.fromkeys(tasks, [1.0, 0.75] * 3), "b": dict.fromkeys(tasks, [0.0, 0.25] * 3)})
    assert ranks(only(records)) == {"a": (1, 1), "b": (2, 2)}
    records += cell("a", "64", [1.0] * 4, task="tiny") + cell("b", "64", [0.0] * 4, task="tiny")
    assert ranks(only(records)) == {"a": (1, 2), "b": (1, 2)}


def test_lacking_overspending_and_few_prove_nothing() -> None:
    ten = [1.0, 0.75] * 5
    for n, places in ((10, {"a": (1, 1), "b": (2, 2)}), (9, {"a": (1, 2), "b": (1, 2)})):
        assert ranks(only(cell("a", "64", ten[:n]) + cell("b", "64", [0.0] * n))) == places
    lacking = cell("a", "64", [*ten, None]) + cell("b", "64", [0.5] * 11) + cell("c", "64", [0.0] * 11)
    assert ranks(only(lacking)) == {"a": (1, 3), "b": (1, 2), "c": (2, 3)}
    fat = cell("a", "64", ten, over_budget=True) + cell("b", "64", [0.5] * 10) + cell("c", "64", [0.0] * 10)
    found = ranks(only(fat))
    assert math.isnan(found["a"][0])
    assert (found["b"], found["c"]) == ((1, 1), (2, 2))
    table = only(cell("a", "64", ten) + cell("fullkv", "full", ten) + cell("void", "64", [None] * 10))
    assert table.rows[["rank_low", "rank_high"]].isna().all(axis=None)
    assert [rank_text(*ends) for ends in ((1.0, 3.0), (2.0, 2.0), (math.nan, math.nan))] == ["1-3", "2", "-"]


def test_lower_nll_ranks_first_where_there_is_one() -> None:
    records = [r for m, n in (("a", 1.0), ("b", 2.0)) for r in cell(m, "64", [0.5] * 12, nll=n)]
    table = only(records + cell("c", "64", [0.5] * 12))
    assert ranks(table) == dict.fromkeys("abc", (1, 3))
    found = ranks(table, "rank_nll")
    assert (found["a"], found["b"]) == ((1, 1), (2, 2))
    assert math.isnan(found["c"][0])


def test_questions_of_one_context_are_one_draw() -> None:
    """Forty questions over eight contexts are too few clusters; each alone, they are enough."""
    for groups, expected in ((8, (1, 2)), (40, (1, 1))):
        records = cell("a", "64", [1.0] * 40) + cell("b", "64", [0.0] * 40)
        grouped = [r.model_copy(update={"meta": {"group": int(r.sample_id) % groups}}) for r in records]
        assert ranks(only(grouped))["a"] == expected


def test_best_other_is_complete_affordable_and_of_another_name() -> None:
    records = cell("a@x", "64", [0.5] * 10) + cell("a@y", "64", [0.75] * 10) + cell("b", "64", [0.25] * 10)
    records += cell("fat", "64", [1.0] * 10, over_budget=True) + cell("short", "64", [1.0] * 9 + [None])
    table = only(records + cell("c", "128", [1.0] * 10) + cell("fullkv", "full", [1.0] * 10))
    best = dict(zip(table.rows.method, table.rows.best_other, strict=True))
    assert best == {"a@x": "b", "a@y": "b", "b": "a@y", "fat": "a@y", "short": "a@y", "c": "", "fullkv": ""}
    rows = table.rows.set_index("method")
    assert rows.score_points_vs_best_mean["b"] == -50
    assert (rows.score_points_vs_best_n["short"], rows.score_points_vs_best_n["c"]) == (9, 0)
    assert (rows.score_points_vs_best_high["a@x"], rows.best_other_nll["a@x"]) == (25, "")


def spread_tasks(groups: int) -> list[Record]:
    """Eight tasks whose means differ, each of 24 samples in contexts of a common part."""
    generator = np.random.default_rng(2)
    records = []
    for t in range(8):
        parts = generator.normal(0.2 + 0.08 * t, 0.1, groups)
        for i in range(24):
            score = float(np.clip(parts[i % groups] + generator.normal(0, 0.02), 0, 1))
            for method, own in (("a", score), ("zero", 0.0)):
                records.append(record(method, "64", str(i), own, task=f"ruler/t{t}", meta={"group": i % groups}))
    return records


@pytest.mark.parametrize("groups", [24, 8])
def test_interval_over_tasks_is_that_of_the_rivals_and_of_the_textbook(groups: int) -> None:
    grid = Grid(spread_tasks(groups), seed=0, resamples=8000)
    found = rank_columns(grid)["a", "64"]
    gain = compare(grid, "a").set_index(["measure", "family"]).loc[("score", "ruler")]
    assert [found["score_task_low"], found["score_task_high"]] == pytest.approx([gain.low, gain.high], abs=0.6)
    values = grid.values(("a", "64"), "score").reshape(8, 24)
    order = np.array([int(s) % groups for _, s in grid.samples[:24]])
    clusters = np.stack([values[:, order == g].mean(axis=1) for g in range(groups)], axis=1)
    error = math.sqrt(values.mean(axis=1).var() / 8 + clusters.var(axis=1).mean() / groups / 8)
    assert found["score_task_high"] - found["score_task_low"] == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_two_tasks_say_nothing_of_others() -> None:
    two = cell("a", "64", [0.0, 1.0] * 6) + cell("a", "64", [0.0, 1.0] * 6, task="vt")
    assert math.isnan(row(only(two), "a", "64")["score_task_low"])
    three = row(only(two + cell("a", "64", [0.0, 1.0] * 6, task="lcc")), "a", "64")
    assert 0 < three["score_task_low"] < 50 < three["score_task_high"] < 100
    lonely = row(only(two + cell("a", "64", [1.0], task="lcc")), "a", "64")
    assert math.isnan(lonely["score_task_low"])
