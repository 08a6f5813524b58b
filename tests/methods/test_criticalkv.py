"""CriticalKV against loops over its formula, around every method that scores attention; what it refuses."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from harness.contract import make_view
from methods.base import Needs, PolicyError
from methods.criticalkv import output_norms
from methods.registry import make_policy
from tests.methods.loops import DIM, GROUP, HEADS, LAYERS, Gold, kept_by, make_layers, naive_pooled, sizes

WIDTH, EPSILON = HEADS * GROUP * DIM, 1e-4


def layers_with_output(tokens: int) -> tuple[Gold, ...]:
    found = []
    for gold in make_layers(tokens):
        draw = torch.Generator().manual_seed(gold.view.index)
        module = torch.nn.Module()
        module.o_proj = torch.nn.Linear(WIDTH, 11, bias=False)
        weights = torch.randn(11, WIDTH, generator=draw)
        module.o_proj.weight = torch.nn.Parameter(weights, requires_grad=False)
        values = gold.view.kv.values * torch.rand(1, HEADS, tokens, 1, generator=draw) ** 3  # of unlike worth
        kv = replace(gold.view.kv, values=values)
        found.append(replace(gold, view=replace(gold.view, kv=kv, module=module, _memo={})))
    return tuple(found)


def naive_norms(gold: Gold) -> list[list[float]]:
    """Mean over the query heads of a KV head of the L1 norm of W_o v: [H][T]."""
    assert gold.view.module is not None
    weights: Any = gold.view.module.o_proj.weight.double().numpy()  # type: ignore[union-attr, operator]
    rows = []
    for head, values in enumerate(gold.view.kv.values[0].double().numpy()):
        slices = [weights[:, q * DIM : (q + 1) * DIM] for q in range(head * GROUP, (head + 1) * GROUP)]
        rows.append([sum(sum(abs(float(row @ v)) for row in own) for own in slices) / GROUP for v in values])
    return rows


def two_stages(scores: list[float], norms: list[float], count: int, first: int, window: int) -> list[int]:
    """criticalkv_press.py:91-105 at kvpress 8bb29b9, for one head; the window is worth more than all else."""
    tokens = len(scores)
    raised = [math.inf if t >= tokens - window else score for t, score in enumerate(scores)]
    sure = sorted(range(tokens), key=lambda t: (-raised[t], t))[: max(first, window)]
    rest = sorted(set(range(tokens)) - set(sure), key=lambda t: (-(scores[t] + EPSILON) * norms[t], t))
    return sorted([*sure, *rest][:count])


@pytest.mark.parametrize(("tokens", "budget"), [(42, 20), (77, 9), (77, 33), (77, 76)])
@pytest.mark.parametrize(("window", "kernel", "kind"), [(4, 7, "max"), (8, 5, "avg")])
def test_criticalkv_keeps_what_the_loop_keeps(tokens: int, budget: int, window: int, kernel: int, kind: str) -> None:
    layers = layers_with_output(tokens)
    policy = make_policy("criticalkv")
    inner = make_policy("snapkv", {"recent": window, "kernel": kernel, "pool": kind})
    object.__setattr__(policy, "inner", inner)
    for gold in layers:
        rows, norms = naive_pooled(gold, window, kernel, kind), naive_norms(gold)
        np.testing.assert_allclose(output_norms(gold.view)[0].numpy(), np.array(norms), rtol=1e-5)
        [act, *_] = policy.per_layer(budget, sizes(tokens, LAYERS)) or []
        kept = act(gold.view).positions[0].tolist()
        both = zip(rows, norms, strict=True)
        assert kept == [two_stages(*own, budget, int(budget * 0.5), window) for own in both]


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.5, False)])
def test_a_whole_first_stage_is_the_method_alone(share: float, same: bool) -> None:
    layers = layers_with_output(77)
    assert (kept_by("criticalkv", layers, 50, share=share) == kept_by("snapkv", layers, 50)) == same


WRAPPED = ["expected_attention", "h2o", "tova", "pyramidkv", "headkv", "snapkv@compiled", "compilerkv", "kvzip"]


@pytest.mark.parametrize("over", WRAPPED)
def test_any_method_that_scores_attention_is_wrapped(over: str) -> None:
    policy, inner = make_policy("criticalkv", {"over": over}), make_policy(over)
    view = make_view(90, policy.needs)
    kept, own = policy.compress(view, 40), inner.compress(view, 40)
    assert [kv.live.tolist() for kv in kept] == [kv.live.tolist() for kv in own]
    assert any(not torch.equal(a.positions, b.positions) for a, b in zip(kept, own, strict=True))
    assert policy.needs == inner.needs | Needs(module=True)


def test_what_kvzip_keeps_of_the_chat_template_stays_and_heads_hold_as_many_as_it_gives_them() -> None:
    policy, inner = make_policy("criticalkv@kvzip"), make_policy("kvzip")
    view = make_view(60, policy.needs)
    for layer, kv, own in zip(view.layers, policy.compress(view, 20), inner.compress(view, 20), strict=True):
        scores = layer.repeated[inner.asked].received[0].amax(dim=1).double()  # type: ignore[attr-defined, union-attr]
        norms = output_norms(layer)[0].double()
        for head, (row, given) in enumerate(zip(kv.positions[0].tolist(), own.live[0].tolist(), strict=True)):
            raised = [math.inf if t < 4 or t == 59 else float(scores[head, t]) for t in range(60)]
            kept = two_stages(raised, norms[head].tolist(), given, max(given // 2, 4), 0)
            assert [t for t in row if t >= 0] == kept


@pytest.mark.parametrize(
    ("over", "why"),
    [
        *[("fullkv", "no scores"), ("quant", "no scores"), ("compilerkv@paper", "no scores"), ("finch", "turns")],
        *[("h2o@paper", "evicts"), ("compilerkv@streaming", "evicts"), ("streamingllm@reassign", "turns")],
    ],
)
def test_what_has_no_scores_is_refused(over: str, why: str) -> None:
    with pytest.raises(PolicyError, match=f"criticalkv.over='{over}' .*{why}"):
        make_policy("criticalkv", {"over": over})


def test_scores_below_zero_and_models_without_an_output_projection_are_refused() -> None:
    layers = layers_with_output(42)
    with pytest.raises(PolicyError, match="over='knorm': 84 scores of layer 0 are below 0"):
        kept_by("criticalkv", layers, 20, over="knorm")
    with pytest.raises(PolicyError, match="not observed"):
        kept_by("criticalkv", make_layers(42), 34)
    assert layers[0].view.module is not None
    layers[0].view.module.o_proj = torch.nn.Linear(8, 8)
    with pytest.raises(PolicyError, match="criticalkv needs `o_proj` of 48 inputs, which Module has not"):
        kept_by("criticalkv", layers, 34)
