"""FP8: every code against a table of the format made from its bits, scales, and what later tokens do."""

import math

import pytest
import torch
from torch import Tensor

from methods.fp8 import Floats, Format, Fp8
from methods.registry import make_policy

EXPONENTS = {"e4m3": (4, 3), "e5m2": (5, 2)}


def table(kind: Format) -> dict[int, float]:
    """Every finite number of a format by its byte, from the OCP specification: sign, exponent, mantissa."""
    exponent, mantissa = EXPONENTS[kind]
    bias, found = 2 ** (exponent - 1) - 1, {}
    for byte in range(256):
        sign, e, m = byte >> 7, byte >> mantissa & 2**exponent - 1, byte & 2**mantissa - 1
        special = (e, m) == (15, 7) if kind == "e4m3" else e == 31
        if not special:
            whole = m / 2**mantissa + (e > 0)
            found[byte] = (-1) ** sign * whole * 2.0 ** (max(e, 1) - bias)
    return found


def nearest(kind: Format, number: float) -> float:
    """The number of the format that is nearest; of two the one with an even mantissa."""
    known = table(kind)
    return known[min(known, key=lambda byte: (abs(known[byte] - number), byte & 1))]


def drawn(tokens: int = 6, seed: int = 0) -> Tensor:
    made = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    return made * torch.tensor([1e-3, 0.1, 1, 3, 10, 40, 0, 700.0])


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_unscaled_codes_are_the_nearest_of_the_table(kind: Format) -> None:
    """Too large ones are the largest there is, as engines do."""
    x, out = drawn(), torch.empty(2, 6, 8)
    codes = Floats(kind, scale=False).encode(x, x, torch.zeros(2, 6))
    codes.decode(out, torch.empty_like(x), torch.empty(0))
    assert [own.shape for own in codes.tensors()] == [(2, 6, 8)] * 2 and codes.nbytes == 2 * 6 * 16
    for found, number in zip(out.flatten().tolist(), x.flatten().tolist(), strict=True):
        assert found == nearest(kind, number)
    assert float(out.abs().max()) == (448 if kind == "e4m3" else max(map(abs, out.flatten().tolist())))


def test_a_scale_is_a_heads_own_largest_number_by_the_formats() -> None:
    keys, values = drawn(), drawn(seed=1)
    codes = Floats("e4m3", scale=True).encode(keys, values, torch.zeros(2, 6))
    out = torch.empty_like(keys), torch.empty_like(values)
    codes.decode(*out, torch.empty(0))
    for found, x in zip(out, (keys, values), strict=True):
        for head in range(2):
            scale = float(x[head].abs().max() / 448)
            for one, number in zip(found[head].flatten().tolist(), x[head].flatten().tolist(), strict=True):
                assert math.isclose(one, nearest("e4m3", float(torch.tensor(number) / scale)) * scale, rel_tol=1e-6)


def test_later_tokens_keep_the_scale_and_are_cut_off_at_its_end() -> None:
    first, more = drawn(), drawn(3, seed=2) * 5
    coding = Floats("e4m3", scale=True)
    codes = coding.encode(first, first, torch.zeros(2, 6))
    both = codes.then(codes.later(more, more, torch.zeros(2, 3)))
    assert both.slots == 9 and both.nbytes == 2 * (9 * 16 + 2 * 4)
    out = torch.empty(2, 9, 8)
    both.decode(out, torch.empty_like(out), torch.empty(0))
    for head in range(2):
        most = float(first[head].abs().max())
        assert float(out[head].abs().max()) <= most * (1 + 1e-6)
        large = more[head].abs() > most
        assert large.any() and torch.allclose(out[head, 6:][large].abs(), torch.tensor(most))


def test_presets() -> None:
    assert make_policy("fp8") == make_policy("fp8@e4m3") == Fp8()
    assert make_policy("fp8@e5m2") == Fp8(format="e5m2", scaled=False)
