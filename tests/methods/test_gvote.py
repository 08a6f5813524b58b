"""GVote against plain loops: the fewest keys of the last query, and what queries drawn like the prompt's name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.base import KV, PolicyError, PromptView
from methods.gvote import GVote, nucleus
from methods.registry import make_policy
from methods.views import GrownView
from tests.methods.loops import DIM, GROUP, HEADS, Array, Gold, kept_by, make_layers, positions

SEED = 1_000_003  # of the draws of a layer: its index more than this times the parameter


def rotate(x: Tensor, by: int) -> Tensor:
    """RoPE in pairs of halves, as tests of methods have it."""
    angle = by / 10 ** torch.arange(DIM // 2)
    first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turned(tokens: int) -> tuple[Gold, ...]:
    """Layers whose queries and keys turn with their positions."""
    return tuple(replace(gold, view=replace(gold.view, rotate=rotate, _memo={})) for gold in make_layers(tokens))


def fewest(weights: Array, part: float) -> list[int]:
    """The keys of most weight, as few as reach that part of it."""
    order = sorted(range(len(weights)), key=lambda t: (-weights[t], t))
    total, kept = 0.0, list[int]()
    for t in order:
        if total >= part:
            break
        total += float(weights[t])
        kept.append(t)
    return kept


def naive(gold: Gold, part: float, samples: int, seed: int = 0) -> list[list[int]]:
    """What each KV head keeps of a layer, in float64."""
    view, tokens = gold.view, gold.attention.shape[-1]
    observed = view.queries.shape[2]
    draw = torch.Generator().manual_seed(seed * SEED + view.index)
    weights = torch.randn(samples, observed, generator=draw).double().numpy()
    rows = []
    for head in range(HEADS):
        kept: set[int] = set()
        for member in range(GROUP):
            own = fewest(gold.attention[head, member, -1], part)
            kept |= set(own)
            queries = view.queries[0, head * GROUP + member].double()
            ends = torch.stack([rotate(q, observed - i) for i, q in enumerate(queries)]).numpy()
            mean = ends.mean(axis=0)
            for s in range(samples):
                query = mean + sum(w * (q - mean) for w, q in zip(weights[s], ends, strict=True)) / observed**0.5
                ahead = rotate(torch.tensor(query), s).numpy()
                products = [float(ahead @ key) for key in gold.keys[head]]
                kept |= set(sorted(range(tokens), key=lambda t: (-products[t], t))[: len(own)])
        rows.append(sorted(kept))
    return rows


@pytest.mark.parametrize("tokens", [2, 29, 60])
@pytest.mark.parametrize(("label", "own"), [("", {}), ("@p90", {"samples": 3}), ("@p99", {"seed": 7})])
def test_what_is_kept_is_what_the_loop_keeps(label: str, own: dict[str, Any], tokens: int) -> None:
    layers, part = turned(tokens), {"": 0.95, "@p90": 0.9, "@p99": 0.99}[label]
    samples, seed = own.get("samples", 8), own.get("seed", 0)
    assert kept_by(f"gvote{label}", layers, tokens, **own) == [naive(gold, part, samples, seed) for gold in layers]


@pytest.mark.parametrize("part", [0.5, 0.95])
def test_without_samples_it_keeps_the_nucleus_of_the_last_query(part: float) -> None:
    layers = make_layers(60)  # nothing turns: no query is drawn
    expected = [
        [sorted(set().union(*(fewest(row[-1], part) for row in head))) for head in gold.attention] for gold in layers
    ]
    assert kept_by("gvote", layers, 60, samples=0, p_nuc=part) == expected
    assert make_policy("gvote", {"samples": 0}).needs.window == 1


def test_all_of_the_attention_keeps_all_tokens() -> None:
    assert kept_by("gvote", turned(60), 60, p_nuc=1) == [[list(range(60))] * HEADS] * 3


def test_a_seed_gives_the_same_again_and_another_one_other_slots() -> None:
    layers = turned(60)
    first = kept_by("gvote", layers, 60, p_nuc=0.5)
    assert kept_by("gvote", layers, 60, p_nuc=0.5) == first == kept_by("gvote", layers, 1, p_nuc=0.5)
    assert kept_by("gvote", layers, 60, p_nuc=0.5, seed=1) != first


def test_more_of_the_attention_keeps_more_of_the_prompt() -> None:
    layers = turned(60)
    counts = [sum(len(h) for heads in kept_by(f"gvote@{p}", layers, 60) for h in heads) for p in ("p90", "p95", "p99")]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert make_policy("gvote") == make_policy("gvote@p95")


def test_drawn_queries_have_the_mean_and_covariance_of_the_prompts() -> None:
    view = replace(turned(60)[0].view, rotate=lambda x, by: x)  # at no position
    drawn = GVote(samples=20_000)._drawn(view)[0]
    queries = view.queries[0]
    torch.testing.assert_close(drawn.mean(dim=1), queries.mean(dim=1), atol=0.06, rtol=0)
    both, prompt = (torch.cat([x[0], x[-1]], dim=1) for x in (drawn, queries))  # of two heads together
    torch.testing.assert_close(both.T.cov(correction=0), prompt.T.cov(correction=0), atol=0.25, rtol=0)


def test_the_fewest_weights_of_a_part_with_a_sink_are_of_what_goes_to_keys() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.0, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert nucleus(weights, 0.5).tolist() == [1, 2] and nucleus(weights, 0.9).tolist() == [3, 4]


def test_slots_that_are_gone_are_not_named_again() -> None:
    view = turned(60)[0].view
    dead = torch.zeros(1, HEADS, 60, dtype=torch.bool)
    dead[:, 0, 5:20], dead[:, 1, 0] = True, True
    kv = KV(view.kv.keys, view.kv.values, view.kv.positions.masked_fill(dead, -1))
    grown = GrownView(0, kv, view.queries, view.form, rotate=rotate, end=60)
    for part in (0.9, 1.0):
        kept = positions(make_policy("gvote", {"p_nuc": part}).compress(PromptView([grown]), 60)[0])
        assert kept[0] and not {*kept[0]} & {*range(5, 20)} and 0 not in kept[1]


def test_a_model_without_rotary_embeddings_is_refused() -> None:
    with pytest.raises(PolicyError, match="rotary embeddings, which this model has not"):
        kept_by("gvote", make_layers(29), 29)


@pytest.mark.parametrize(("name", "value"), [("p_nuc", 0), ("p_nuc", 1.5), ("samples", -1), ("window", 0)])
def test_a_parameter_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(PolicyError, match=f"GVote.{name}={value} is too"):
        make_policy("gvote", {name: value})
