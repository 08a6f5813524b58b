"""Estimates and intervals against scipy, textbook widths, simulation and a naive loop over clusters."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from leaderboards.stats.bootstrap import Bootstrap


def test_bootstrap_agrees_with_scipy() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(1.0, 1.0, 60)
    b = a - generator.normal(0.5, 0.5, 60)  # correlated: an unpaired interval is about three times as wide
    ours = Bootstrap(["t"] * 60, resamples=20_000).estimate(a - b)
    options = {"method": "percentile", "n_resamples": 20_000, "rng": np.random.default_rng(4)}
    theirs = stats.bootstrap((a, b), lambda x, y, axis=-1: (x - y).mean(axis=axis), paired=True, **options)
    assert ours.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert [ours.low, ours.high] == pytest.approx(theirs.confidence_interval, abs=0.02)
    assert ours.high - ours.low == pytest.approx(np.std(a - b) / math.sqrt(60) * 2 * 1.96, rel=0.05)


def test_stratified_spread_has_the_textbook_width() -> None:
    generator = np.random.default_rng(5)
    small, large = generator.normal(0, 10, 40), generator.normal(50, 1, 400)
    estimate = Bootstrap(["s"] * 40 + ["l"] * 400, resamples=8000).estimate(np.concatenate([small, large]))
    error = math.sqrt(np.var(small) / 40 + np.var(large) / 400) / 2
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def naive(values: list[float], groups: list[str], *, task: str, resamples: int) -> list[float]:
    """Means of redrawn clusters, one draw and one cluster at a time; clusters in the order of their first sample."""
    members = [[v for v, own in zip(values, groups, strict=True) if own == group] for group in dict.fromkeys(groups)]
    generator = np.random.default_rng([0, zlib.crc32(task.encode()), len(members)])
    means = []
    for times in generator.multinomial(len(members), [1 / len(members)] * len(members), size=resamples):
        drawn = [v for cluster, n in zip(members, times, strict=True) for _ in range(n) for v in cluster]
        means.append(sum(drawn) / len(drawn))
    return means


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=34), st.integers(0, 2**31))
def test_clusters_are_redrawn_as_a_naive_loop_does(more: list[str], seed: int) -> None:
    groups = [*"hgfedc", *more]
    values = np.random.default_rng(seed).integers(100, size=len(groups)).astype(float)
    ours = Bootstrap(["t"] * len(groups), groups=groups, resamples=200).estimate(values)
    ends = np.quantile(naive(values.tolist(), groups, task="t", resamples=200), [0.025, 0.975])
    assert (ours.mean, ours.n) == (pytest.approx(values.mean()), len(groups))
    assert [ours.low, ours.high] == pytest.approx(ends.tolist(), abs=1e-6)


def test_clusters_of_one_change_no_number_and_a_group_belongs_to_its_task() -> None:
    generator = np.random.default_rng(8)
    values = generator.normal(50, 20, 60)
    values[[3, 40]] = np.nan
    tasks = ["a"] * 20 + ["b"] * 40
    alone = Bootstrap(tasks).estimate(values)
    assert alone == Bootstrap(tasks, groups=[str(-i) for i in range(60)]).estimate(values)
    assert alone == Bootstrap(tasks, groups=[None if i % 2 else f"{i}" for i in range(60)]).estimate(values)
    assert alone == Bootstrap(tasks, groups=[str(i % 40) for i in range(60)]).estimate(values)


def test_the_rules_of_few_count_clusters() -> None:
    values = np.array([0.0, 100.0] * 10)
    tasks = ["t"] * 20

    def clustered(size: int) -> Bootstrap:
        return Bootstrap(tasks, groups=[str(i // size) for i in range(20)])

    assert math.isnan(clustered(4).estimate(values).low)  # five clusters
    assert not math.isnan(clustered(3).estimate(values).low)  # seven
    assert math.isnan(clustered(20).estimate(values).low)
    assert math.isnan(Bootstrap([*tasks, "lonely"]).estimate(np.append(values, 1.0)).low)  # a task of one cluster
    assert clustered(3).few(values)
    assert not clustered(2).few(values)
    values[:2] = np.nan
    assert clustered(2).few(values)


def test_weighted_means_of_task_means() -> None:
    bootstrap = Bootstrap(["a"] * 10 + ["b"] * 30 + ["c"] * 10)
    values = np.array([0.0] * 10 + [60.0] * 30 + [90.0] * 10)
    estimate = bootstrap.estimate(values, weights={"a": 1, "b": 2, "c": 3})
    assert estimate.mean == estimate.low == estimate.high == pytest.approx((0 + 2 * 60 + 3 * 90) / 6)
    assert bootstrap.estimate(values, weights={"a": 1, "b": 2}).mean == pytest.approx(40)
    assert bootstrap.estimate(values, weights={"a": 1, "b": 2}).n == 40
    values[:10] = np.nan  # a weight without values counts for nothing
    assert bootstrap.estimate(values, weights={"a": 1, "b": 2}).mean == 60
    assert math.isnan(bootstrap.estimate(values, weights={"a": 1}).mean)
