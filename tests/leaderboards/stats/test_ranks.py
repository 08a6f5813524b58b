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
from leaderboards.text import rank_text
from tests.pretend import cell, only, record, row


def ranks(table: Table, what: str = "rank") -> dict[str, tuple[float, float]]:
    rows = table.rows[table.rows.budget != "full"]
    return dict(zip(rows.method, zip(rows[f"{what}_low"], rows[f"{what}_high"], strict=True), strict=True))


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


Cells = Mapping[tuple[str, str, str], Mapping[str, Sequence[float | None]]]
"""Measure, budget and method to task to the value of each sample."""


def naive_better(cells: Cells, *, resamples: int) -> set[tuple[str, str, str, str]]:
    """(measure, budget, better, worse), one draw, one pair, one task and one sample at a time.

    Every sample is its own cluster.
    """
    sizes = {task: len(of) for task, of in next(iter(cells.values())).items()}
    draws = {}
    for task, n in sizes.items():
        generator = np.random.default_rng([0, zlib.crc32(task.encode()), n, 1])
        order = sorted(range(n), key=str)  # as the samples' ids are
        draws[task] = [[order[i] for i in generator.integers(n, size=n)] for _ in range(resamples)]
    tested: dict[tuple[str, str, str, str], tuple[float, list[float]]] = {}
    for (a, own), (b, other) in itertools.product(cells.items(), cells.items()):
        if a == b or a[:2] != b[:2] or any(x is None for of in own.values() for x in of):
            continue
        sign = 100 if a[0] == "score" else -1
        pairs = {t: enumerate(zip(own[t], other[t], strict=True)) for t in sizes}
        differences = {t: {i: sign * (x - y) for i, (x, y) in of if y is not None} for t, of in pairs.items()}
        if min(len(d) for d in differences.values()) >= 20:
            tested[*a, b[2]] = naive_pair(differences, draws)
    better: set[tuple[str, str, str, str]] = set()
    while left := [pair for pair in tested if pair not in better]:
        top = sorted(max(tested[pair][1][r] for pair in left) for r in range(resamples))
        limit = top[math.ceil(0.95 * (resamples - 1))]
        found = {pair for pair in left if tested[pair][0] > limit + 1e-5}
        if not found:
            break
        better |= found
    return better


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.sampled_from([0.0, 0.15, 0.3]), st.booleans())
def test_rank_intervals_are_what_plain_loops_find(seed: int, methods: int, step: float, lacking: bool) -> None:
    generator, cells = np.random.default_rng(seed), dict[tuple[str, str, str], dict[str, list[float | None]]]()
    for i, budget in itertools.product(range(methods), ("64", "128")):
        for measure, (task, n) in itertools.product(("score", "nll"), (("niah", 21), ("vt", 24))):
            own = np.clip(generator.normal(0.3 + step * i, 0.3, n), 0, 1).round(2).tolist()
            cells.setdefault((measure, budget, f"m{i}"), {})[task] = own
    records = [
        r.model_copy(update={"nll": nll})
        for (measure, budget, m), tasks in cells.items()
        if measure == "score"
        for task, of in tasks.items()
        for r, nll in zip(cell(m, budget, of, task=task), cells["nll", budget, m][task], strict=True)
    ]
    if lacking:
        cells["score", "64", "m0"]["vt"][3] = cells["nll", "64", "m0"]["vt"][3] = None
        here = ("m0", "64", "vt", "3")
        records = [r for r in records if (r.method, r.budget, r.task, r.sample_id) != here]
        records.append(record("m0", "64", "3", None, task="vt"))
    better, table = naive_better(cells, resamples=100), only(records, resamples=100)
    for measure, budget, m in cells:
        found, what = row(table, m, budget), "rank" if measure == "score" else "rank_nll"
        worse = sum(b[:3] == (measure, budget, m) for b in better)
        low = 1 + sum((*b[:2], b[3]) == (measure, budget, m) for b in better)
        assert (found[f"{what}_low"], found[f"{what}_high"]) == (low, methods - worse)


SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE, SCORE, SCORE), min_size=20, max_size=30), st.integers(0, 2**31))
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


def test_lacking_overspending_and_few_prove_nothing() -> None:
    many = [1.0, 0.75] * 10
    for n, places in ((20, {"a": (1, 1), "b": (2, 2)}), (19, {})):
        table = only(cell("a", "64", many[:n]) + cell("b", "64", [0.0] * n))
        assert {m: ends for m, ends in ranks(table).items() if ends[0] == ends[0]} == places
    lacking = cell("a", "64", [*many, None]) + cell("b", "64", [0.5] * 21) + cell("c", "64", [0.0] * 21)
    assert ranks(only(lacking)) == {"a": (1, 3), "b": (1, 2), "c": (2, 3)}
    fat = cell("a", "64", many, over_budget=True) + cell("b", "64", [0.5] * 20) + cell("c", "64", [0.0] * 20)
    found = ranks(only(fat))
    assert math.isnan(found["a"][0])
    assert (found["b"], found["c"]) == ((1, 1), (2, 2))
    table = only(cell("a", "64", many) + cell("fullkv", "full", many) + cell("void", "64", [None] * 20))
    assert table.rows[["rank_low", "rank_high"]].isna().all(axis=None)
    assert [rank_text(*ends) for ends in ((1.0, 3.0), (2.0, 2.0), (math.nan, math.nan))] == ["1-3", "2", "-"]


def test_more_budgets_ask_more_of_each_difference() -> None:
    """A difference that one budget tells is not told among six, at each of which four methods are equal."""
    generator = np.random.default_rng(5)
    noise = stats.zscore(generator.normal(size=40)) / 10  # a standard error of .016
    told = [*cell("a", "64", (0.5 + noise).tolist()), *cell("b", "64", [0.46] * 40)]
    more = [
        r
        for budget, m in itertools.product(("96", "128", "192", "256", "512", "1024"), "abcd")
        for r in cell(m, budget, generator.uniform(0.2, 0.8, 40).tolist())
    ]
    for records, places in ((told, (1, 1)), (told + more, (1, 2))):
        found = row(only(records), "a", "64")
        assert (found["rank_low"], found["rank_high"]) == places


def test_lower_nll_ranks_first_where_there_is_one() -> None:
    records = [r for m, n in (("a", 1.0), ("b", 2.0)) for r in cell(m, "64", [0.5] * 20, nll=n)]
    table = only(records + cell("c", "64", [0.5] * 20))
    assert ranks(table) == dict.fromkeys("abc", (1, 3))
    found = ranks(table, "rank_nll")
    assert (found["a"], found["b"]) == ((1, 1), (2, 2))
    assert math.isnan(found["c"][0])


def test_questions_of_one_context_are_one_draw() -> None:
    """Forty questions over nineteen contexts are too few; over twenty they are enough."""
    for groups, expected in ((19, math.nan), (20, 1), (40, 1)):
        records = cell("a", "64", [1.0] * 40) + cell("b", "64", [0.0] * 40)
        grouped = [r.model_copy(update={"meta": {"group": int(r.sample_id) % groups}}) for r in records]
        assert ranks(only(grouped))["a"] == pytest.approx((expected, expected), nan_ok=True)


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
    found = rank_columns(grid)[0]["a", "64"]
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
