"""TurboQuant: levels, rotation and codes against the paper's table and loops, and 3 bits in 3 bits."""

from math import exp, lgamma, pi

import pytest
import torch
from torch import Tensor

from methods.base import KV, LayerView, PolicyError, PromptView
from methods.bits import packed, per_unit, unpacked
from methods.registry import make_policy
from methods.rotation import gaussian, haar
from methods.turboquant import Levels, TurboQuant, codebook
from methods.views import Form

CPU = torch.device("cpu")


def units(count: int, dim: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(1, count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def through(coding: Levels, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    codes = coding.encode(keys, values, torch.arange(keys.shape[1]).expand(len(keys), -1))
    out = torch.empty_like(keys), torch.empty_like(values)
    codes.decode(*out, torch.empty(0))
    return out


@pytest.mark.parametrize(("bits", "told", "digits"), [(1, 0.36, 2), (2, 0.117, 3), (3, 0.03, 2), (4, 0.009, 3)])
def test_the_squared_error_of_unit_vectors_is_the_papers(bits: int, told: float, digits: int) -> None:
    """Theorem 1: "0.36, 0.117, 0.03, 0.009" for 1 to 4 bits, below sqrt(3) pi / 2 / 4^b for more."""
    x = units(500, 1024)
    for found in through(Levels(bits, bits), x, x):
        error = float((found - x).square().sum(dim=-1).mean())
        assert abs(error - told) < 0.6 * 10**-digits
        assert error < 3**0.5 * pi / 2 / 4**bits


@pytest.mark.parametrize(("bits", "told"), [(2, 0.56), (3, 0.18), (4, 0.047)])
def test_inner_products_with_signs_are_unbiased_with_the_papers_variance(bits: int, told: float) -> None:
    """Theorem 2: 0.56, 0.18 and 0.047 by D for 2 to 4 bits; without signs, products are too small by the error."""
    dim, x, y = 128, units(500, 128), units(500, 128, seed=1)
    y = torch.nn.functional.normalize(x + y, dim=-1)  # products far from 0
    off, less = [], []
    for seed in range(12):
        signed, plain = (through(Levels(bits, 1, signs=own, seed=seed), x, x)[0] for own in (True, False))
        off.append(((signed - x) * y).sum(dim=-1))
        less.append(((plain - x) * y).sum(dim=-1))
    found = torch.stack(off)
    assert abs(float(found.square().mean()) * dim - told) < 0.15 * told
    assert abs(float(found.mean())) < 0.1 * abs(float(torch.stack(less).mean()))


@pytest.mark.parametrize("dim", [8, 64, 128])
def test_two_levels_are_the_mean_magnitude_of_a_coordinate(dim: int) -> None:
    mean = exp(lgamma(dim / 2) - lgamma((dim + 1) / 2)) / pi**0.5
    assert codebook(dim, 1) == pytest.approx((-mean, mean), rel=1e-4)
    assert mean == pytest.approx((2 / pi / dim) ** 0.5, rel=0.4 / dim)


@pytest.mark.parametrize(("dim", "bits"), [(16, 2), (64, 3), (128, 4)])
def test_each_level_is_the_mean_of_what_is_nearest_to_it(dim: int, bits: int) -> None:
    """The density of the paper's Lemma 1, summed over a fine grid of its own."""
    levels = codebook(dim, bits)
    assert len(levels) == 2**bits and list(levels) == sorted(levels)
    grid = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    density = (1 - grid**2) ** ((dim - 3) / 2)
    nearest = (grid.unsqueeze(1) - torch.tensor(levels, dtype=torch.float64)).abs().argmin(dim=1)
    for number, level in enumerate(levels):
        own = nearest == number
        assert float((grid * density)[own].sum() / density[own].sum()) == pytest.approx(level, abs=2e-5)


def test_codes_are_those_of_a_loop() -> None:
    dim, bits = 16, 3
    x, rotation, levels = units(5, dim)[0] * 3, haar(dim, CPU, 7), codebook(dim, bits)
    codes, norms, *_ = Levels(bits, bits, seed=7).held(x[None], x[None], ())
    found = unpacked(codes, bits)[0].tolist()
    for token, own in enumerate(x.tolist()):
        norm = sum(number**2 for number in own) ** 0.5
        assert float(norms[0, token, 0]) == pytest.approx(norm, rel=1e-3)
        for column in range(dim):
            place = sum(own[d] / norm * float(rotation[d, column]) for d in range(dim))
            assert found[token][column] == min(range(8), key=lambda at: abs(levels[at] - place))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_without_a_gap(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    held = packed(codes, bits)
    assert held.shape == (3, 5, 64 * bits // 8) and held.dtype == torch.uint8
    assert torch.equal(unpacked(held, bits), codes)
    one = per_unit(bits)
    assert torch.equal(unpacked(packed(codes[..., :one], bits), bits), codes[..., :one])


def test_three_bits_by_hand() -> None:
    """The two lower bits of four codes a byte, then the third bits of eight: 8 codes in 3 bytes."""
    codes = torch.tensor([7, 0, 5, 2, 1, 6, 3, 4], dtype=torch.uint8)
    assert packed(codes, 3).tolist() == [0b11_01_01_11, 0b00_10_10_00, 0b1_0_1_0_0_1_0_1]


def test_the_rotation_is_orthogonal_and_drawn_by_its_seed() -> None:
    for dim in (8, 64):
        made = haar(dim, CPU, 3)
        torch.testing.assert_close(made @ made.T, torch.eye(dim), atol=1e-5, rtol=0)
        assert not torch.equal(made, haar(dim, CPU, 4)) and torch.equal(made, haar.__wrapped__(dim, CPU, 3))
        assert torch.equal(gaussian(dim, CPU, 3), gaussian.__wrapped__(dim, CPU, 3))


def test_a_corrected_norm_is_the_vectors_own() -> None:
    x = units(50, 64) * torch.arange(1, 51).view(1, 50, 1)
    norms = [through(Levels(2, 2, corrected=own), x, x)[1].norm(dim=-1) / x.norm(dim=-1) for own in (False, True)]
    assert float(norms[0].mean()) < 0.97
    torch.testing.assert_close(norms[1], torch.ones(1, 50), atol=1e-3, rtol=0)


def test_a_vector_of_zeros_stays_one() -> None:
    zeros = torch.zeros(1, 3, 16)
    assert all(torch.equal(own, zeros) for own in through(Levels(3, 2, signs=True), zeros, zeros))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"key_bits": 0}, "TurboQuant.key_bits=0 is too small"),
        ({"value_bits": 9}, "TurboQuant.value_bits=9 is too large"),
        ({"key_bits": 1, "signs": True}, "TurboQuant.key_bits=1 is too small; give at least 2"),
        ({"seed": -1}, "TurboQuant.seed=-1 is too small"),
        ({"over": "fullkv"}, "turboquant.over='fullkv' evicts nothing"),
        ({"over": "quant"}, "turboquant.over='quant' makes codes itself"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_policy("turboquant", params)


def test_heads_that_fill_no_bytes_are_refused() -> None:
    kv = KV(torch.ones(1, 1, 9, 12), torch.ones(1, 1, 9, 16), torch.arange(9).expand(1, 1, 9))
    view = PromptView([LayerView(0, kv, torch.zeros(1, 2, 1, 12), Form(1.0))])
    with pytest.raises(PolicyError, match="keys of 12 and values of 16 numbers are no multiples of 8"):
        TurboQuant().check(view)
