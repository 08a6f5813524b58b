"""Leverage is that of the definition, of keys without RoPE, and its kept tokens are those of a loop."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.base import KV, LayerView, PolicyError, PromptView
from methods.leverage import Leverage, upright
from methods.registry import make_policy
from methods.views import Form
from tests.methods.loops import DIM, HEADS, Array, naive_top, positions

TOKENS = 60


def turned(keys: Tensor, by: int | Tensor) -> Tensor:
    """Half-rotation RoPE of [..., D] by a number of positions, or each by its own [...]."""
    angle = (by.unsqueeze(-1) if isinstance(by, Tensor) else by) * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM).repeat(2)
    first, second = keys.chunk(2, dim=-1)
    return keys * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


def made(seed: int) -> tuple[LayerView, Array]:
    """A layer, and its keys before RoPE [H, T, D] in float64."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(DIM, DIM, generator=draw)
    bare = torch.randn(1, HEADS, TOKENS, DIM, generator=draw) @ mixed + 3 * torch.randn(DIM, generator=draw)
    keys = torch.stack([turned(bare[:, :, t], t) for t in range(TOKENS)], dim=2)
    kv = KV(keys, torch.randn(keys.shape, generator=draw), torch.arange(TOKENS).expand(1, HEADS, TOKENS))
    queries = torch.randn(1, 2 * HEADS, 8, DIM, generator=draw)
    return LayerView(0, kv, queries, Form(DIM**-0.5), rotate=turned), bare[0].double().numpy()


def naive(keys: Array, ridge: float) -> list[float]:
    """Leverage of each key, one by one: x (X'X + ridge)^-1 x'."""
    mean = sum(keys) / len(keys)
    centred = [key - mean for key in keys]
    gram: Array = ridge * np.eye(keys.shape[1])
    for x in centred:
        gram = gram + np.outer(x, x)
    return [float(x @ np.linalg.solve(gram, x)) for x in centred]


@pytest.mark.parametrize("budget", [1, 4, 11, 12, 13, 30, 59])
@pytest.mark.parametrize(("label", "sinks", "recent"), [("leverage", 8, 4), ("leverage@kvpress", 0, 0)])
def test_what_is_kept_is_what_the_loop_keeps(label: str, sinks: int, recent: int, budget: int) -> None:
    view, bare = made(1)
    rows = [[0.0] * sinks + naive(keys[sinks : TOKENS - recent], 0.01) + [0.0] * recent for keys in bare]
    gold = [naive_top(row, budget, recent, sinks) for row in rows]
    assert positions(make_policy(label).compress(PromptView([view]), budget)[0]) == gold


def test_leverage_is_in_0_to_1_and_sums_to_the_rank() -> None:
    view, bare = made(2)
    found = Leverage(sinks=0, recent=0, ridge=0.0).score(view)
    assert found.min() >= 0 and found.max() <= 1
    assert torch.allclose(found.sum(dim=-1), torch.tensor(float(DIM)), atol=1e-3)
    assert np.allclose(found[0], [naive(keys, 0.0) for keys in bare], atol=1e-4)


def test_keys_are_turned_to_one_position() -> None:
    view, bare = made(3)
    assert torch.allclose(upright(view)[0], turned(torch.tensor(bare).float(), TOKENS), atol=1e-4)
    later = [LayerView(0, view.kv.take(torch.arange(40).expand(1, HEADS, 40)), view.queries, view.form, rotate=turned)]
    assert torch.allclose(upright(later[0])[0], turned(torch.tensor(bare[:, :40]).float(), 40), atol=1e-4)


def test_a_sketch_is_drawn_from_the_seed_and_near_the_truth() -> None:
    view, _ = made(4)
    of = partial(Leverage, sinks=0, recent=0)
    sketched = of(sketch=6).score(view)
    assert torch.equal(sketched, of(sketch=6).score(view))
    assert not torch.allclose(sketched, of(sketch=6, seed=1).score(view))
    assert torch.allclose(sketched.sum(dim=-1), torch.tensor(6.0), atol=1e-2)  # 6 of 8 dimensions are left
    exact = of(sketch=8).score(view)
    assert torch.equal(exact, of(sketch=48).score(view)) and torch.all(sketched <= exact + 1e-3)


def test_a_model_without_rope_is_refused() -> None:
    view, _ = made(5)
    view.rotate = None
    with pytest.raises(PolicyError, match="rotary"):
        make_policy("leverage").compress(PromptView([view]), 20)
