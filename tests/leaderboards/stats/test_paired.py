"""Sign flips and their correction, by hand and against scipy."""

import itertools

import numpy as np
import pytest
from scipy.stats import permutation_test

from leaderboards.stats.paired import flip_p, holm


def test_sign_flips_are_those_of_scipy() -> None:
    for seed in range(5):
        parts = np.round(np.random.default_rng(seed).normal(0.4, 1, 9), 1)
        found = flip_p(parts)
        for p, side in zip(found, ("greater", "less"), strict=False):
            exact = permutation_test((parts,), np.sum, permutation_type="samples", alternative=side, vectorized=True)
            assert p == pytest.approx(exact.pvalue)
        assert found[2] == 2.0 ** -np.count_nonzero(parts)
    assert flip_p(np.zeros(3)) == (1, 1, 1)
    assert flip_p(np.array([1.0, 2.0, 0.0])) == (0.25, 1, 0.25)


def test_drawn_sign_flips_are_near_the_exact_ones() -> None:
    parts = np.random.default_rng(3).normal(0.3, 1, 18)
    sums = np.array(list(itertools.product([1, -1], repeat=18))) @ parts
    high, low, least = flip_p(parts)
    exact = [np.mean(sums >= parts.sum() - 1e-9), np.mean(sums <= parts.sum() + 1e-9)]
    assert [high, low] == pytest.approx(exact, abs=0.006)
    assert 0 < least < 2e-5 < min(high, low)
    many, none, least = flip_p(np.append(np.ones(63), 1.5))
    assert (many, none) == (pytest.approx(np.exp(-(64.5**2) / 2 / 65.25)), 1) and least == many
    assert holm(np.full(5000, many), np.full(5000, least), 0.05)[0].max() < 1e-9  # draws alone could tell none of them


def test_parts_of_one_size_are_binomial_however_many_they_are() -> None:
    for n, up in ((5, 5), (12, 9), (12, 0), (16, 8)):
        parts = np.where(np.arange(n) < up, 0.3, -0.3)
        near = parts * (1 + 1e-6 * np.arange(n))  # of other sizes, so every pattern of signs is looked at
        assert flip_p(parts)[2] == 2.0**-n
        exact = [np.mean(np.array(list(itertools.product([1, -1], repeat=n))) @ parts >= parts.sum() - 1e-9)]
        assert flip_p(parts)[0] == pytest.approx(exact[0])
        assert flip_p(-parts)[1] == pytest.approx(exact[0])
        assert flip_p(near)[2] == 2.0**-n
    assert flip_p(np.ones(200)) == pytest.approx((2.0**-200, 1, 2.0**-200))


def test_correction_by_hand() -> None:
    corrected, counted = holm(np.array([0.01, 0.04, 0.03]), np.zeros(3), 0.05)
    assert (corrected.tolist(), counted) == (pytest.approx([0.03, 0.06, 0.06]), 3)
    corrected, counted = holm(np.array([0.5, 0.01, 1.0]), np.array([0.5, 0.01, 0.25]), 0.05)
    assert (corrected.tolist(), counted) == ([1, 0.01, 1], 1)
    assert holm(np.array([]), np.array([]), 0.05)[1] == 0
