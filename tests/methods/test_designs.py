"""Foldover designs by their properties, and effects recovered from losses whose true effects are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.base import PolicyError
from methods.compilerkv.designs import (
    foldover,
    foldover_levels,
    foldovers,
    multipliers,
    ridge,
    split_half,
)

SIZES = {
    "factors": st.integers(1, 70),
    "pairs": st.integers(1, 40) | st.sampled_from([32, 64]),
    "seed": st.integers(0, 9),
}


def planted(prompts: int, factors: int, pairs: int, *, noise: float, signal: float = 0.05) -> tuple[Tensor, ...]:
    """True gains [F], designs [P, R, F] and losses [P, R] with levels, noise and an interaction of two factors."""
    draw = torch.Generator().manual_seed(prompts)
    gains = signal * torch.randn(factors, generator=draw, dtype=torch.float64)
    designs = foldovers(prompts, factors, pairs, seed=1)
    level = 3 * torch.rand(prompts, 1, generator=draw)
    losses = level - designs.double() @ gains + 0.5 * designs[..., 0] * designs[..., 1]
    return gains, designs, losses + noise * torch.randn(losses.shape, generator=draw)


@given(**SIZES)
@settings(max_examples=60, deadline=None)
def test_a_foldover_is_mirrored_balanced_seeded_and_orthogonal_where_it_can_be(
    factors: int, pairs: int, seed: int
) -> None:
    rows = foldover(factors, pairs, seed)
    assert rows.shape == (2 * pairs, factors)
    assert bool((rows.abs() == 1).all())
    assert torch.equal(rows[:pairs], -rows[pairs:])
    assert bool((rows.sum(dim=0) == 0).all())
    assert torch.equal(rows, foldover(factors, pairs, seed))
    if pairs.bit_count() == 1 and factors <= pairs:
        assert torch.equal(rows.T @ rows, 2 * pairs * torch.eye(factors))


@pytest.mark.parametrize(("factors", "pairs"), [(90, 16), (90, 48), (90, 100), (270, 64)])
def test_columns_correlate_no_more_than_random_ones_when_they_cannot_be_orthogonal(factors: int, pairs: int) -> None:
    rows = foldover(factors, pairs, seed=3)
    square = (rows.T @ rows / (2 * pairs)).square()
    off = (square.sum() - factors) / (factors * (factors - 1))
    assert off <= 1.05 / pairs
    assert square.fill_diagonal_(0).max() < 1  # no two factors are the same


def test_other_seeds_give_other_designs_and_prompts_have_their_own() -> None:
    assert not torch.equal(foldover(20, 8, 0), foldover(20, 8, 1))
    designs = foldovers(4, 30, 8, seed=0)
    assert designs.shape == (4, 16, 30)
    assert torch.equal(designs[:, :8], -designs[:, 8:])
    assert not torch.equal(designs[0], designs[1])
    together = designs.flatten(0, 1)  # 4 * 8 pairs are a power of two above 30
    assert torch.equal(together.T @ together, 64 * torch.eye(30))


@given(levels=st.integers(2, 29), **SIZES)
@settings(max_examples=60, deadline=None)
def test_levels_are_mirrored_and_taken_equally_often(levels: int, factors: int, pairs: int, seed: int) -> None:
    rows = foldover_levels(factors, pairs, levels, seed)
    assert rows.shape == (2 * pairs, factors)
    assert torch.equal(rows[:pairs], levels - 1 - rows[pairs:])
    for column in rows.T:
        counts = torch.bincount(column, minlength=levels)
        assert counts.shape[0] == levels
        assert int(counts.max() - counts.min()) <= 2
        assert pairs % levels or int(counts.max()) == int(counts.min())


def test_ridge_recovers_planted_effects_and_cross_validation_shrinks_noise_alone() -> None:
    gains, designs, losses = planted(32, 90, 16, noise=0.3)
    for penalty in ("cv", 0.1):
        effects = ridge(designs, losses, penalty=penalty)  # type: ignore[arg-type]
        assert torch.corrcoef(torch.stack([effects.values, gains]))[0, 1] > 0.9
        assert effects.penalty > 0
    gains, designs, losses = planted(4, 10, 8, noise=0.0)
    assert torch.allclose(ridge(designs, losses, penalty=0.0).values, gains, atol=1e-6)
    strong, weak = (ridge(*planted(24, 90, 8, **own)[1:]) for own in ({"noise": 0.02}, {"noise": 1.0, "signal": 0.0}))
    assert strong.penalty < 0.1 and weak.penalty > 10
    assert weak.values.abs().max() < 0.05


def test_ridge_by_hand() -> None:
    designs = torch.tensor([[[1.0], [-1.0]]]).repeat(2, 1, 1)
    losses = torch.tensor([[1.0, 3.0], [5.0, 6.0]])  # gains of 1 and 0.5
    assert ridge(designs, losses, penalty=0.5).values.tolist() == pytest.approx([1.5 / (2 + 0.5 * 2)])


def test_split_half_tells_signal_from_noise() -> None:
    _, designs, losses = planted(32, 60, 8, noise=0.1)
    signal = split_half(designs, losses, seed=0, splits=40)
    assert signal.mean > 0.9
    assert signal.corrected == pytest.approx(2 * signal.mean / (1 + signal.mean))
    assert signal.low <= signal.mean <= signal.high
    noise = [torch.randn(losses.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert abs(sum(split_half(designs, own, seed=0, splits=20).mean for own in noise)) / 6 < 0.1
    assert split_half(designs, losses, seed=0, splits=40) == signal


@given(
    values=st.lists(st.floats(-5, 5), min_size=1, max_size=90),
    strength=st.floats(0, 3),
    low=st.floats(0.05, 1),
    high=st.floats(1, 6),
)
@settings(max_examples=50, deadline=None)
def test_multipliers_are_bounded_ordered_and_of_mean_one(
    values: list[float], strength: float, low: float, high: float
) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    shares = multipliers(x, strength=strength, low=low, high=high)
    assert shares.mean().item() == pytest.approx(1, abs=1e-9)
    assert low - 1e-12 <= shares.min().item() and shares.max().item() <= high + 1e-12
    assert bool((shares[x.argsort()].diff() >= -1e-12).all())


def test_multipliers_are_geometric_and_neutral_when_nothing_is_known() -> None:
    rows = foldover(40, 8, seed=0)
    shares = multipliers(rows, strength=0.5, low=0.01, high=10.0)
    assert shares.shape == rows.shape and shares[rows > 0].min() > 1 > shares[rows < 0].max()
    assert torch.equal(multipliers(torch.full((7,), 0.1), strength=2.0), torch.ones(7, dtype=torch.float64))
    ratio = multipliers(torch.tensor([1.0, -1.0]), strength=0.5, low=0.01, high=10.0)
    assert (ratio[0] / ratio[1]).item() == pytest.approx(torch.e, rel=1e-9)


BAD = {
    "nan": (lambda d, x: ridge(d, x.index_fill(1, torch.tensor([0]), torch.nan)), "4 of 64 losses are not finite"),
    "one": (lambda d, x: ridge(d[:1], x[:1]), "at least 2 prompts"),
    "mirror": (lambda d, x: ridge(d.abs(), x), "not the mirror image"),
    "penalty": (lambda d, x: ridge(d, x, penalty=-1.0), "penalty -1"),
    "halves": (lambda d, x: split_half(d[:3], x[:3], seed=0), "at least 4 prompts"),
    "shares": (lambda d, x: multipliers(d[0, 0], strength=1.0, low=2.0), "0 < low <= 1 <= high"),
    "effects": (lambda d, x: multipliers(d[0, 0] / 0, strength=1.0), "values are not finite"),
    "empty": (lambda d, x: foldover(0, 4, 0), "give at least 1"),
    "levels": (lambda d, x: foldover_levels(3, 4, 1, 0), "give at least 1, 1 and 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    call, message = BAD[name]
    _, designs, losses = planted(4, 5, 8, noise=0.1)
    with pytest.raises(PolicyError, match=f"^.*{message}.*$"):
        call(designs, losses)  # type: ignore[no-untyped-call]
