"""What KVzip keeps, by plain loops over what a second pass paid to each token."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.contract import GROUP, HEADS, LAYERS, make_view
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from methods.base import Budget, PromptView
from methods.kvzip import KVzip
from methods.registry import make_policy
from methods.repeat import Repeat, repeated
from tests.engine.repeats import CLOSED, HEAD, TEXT, encode, gold
from tests.methods.loops import positions

PRESETS = ["kvzip", "kvzip@paper", "kvzip@kvpress", "kvzip@plus", "kvzip@layer", "kvzip@uniform"]


def naive(scores: list[list[list[float]]], budget: int, start: int, end: int, share: str) -> list[list[list[int]]]:
    """Positions kept, [L][H]. scores: [L][H][T]. The first `start` and those from `end` on are kept, the last first."""
    tokens = len(scores[0][0])
    last = list(range(tokens - 1, end - 1, -1))[:budget]
    fixed = last + list(range(min(start, budget - len(last))))
    kept = [[set(fixed) for _ in layer] for layer in scores]
    heads = [(i, h) for i, layer in enumerate(scores) for h in range(len(layer))]
    groups = {"model": [heads], "layer": [[at for at in heads if at[0] == i] for i in range(len(scores))]}
    for group in groups.get(share, [[at] for at in heads]):
        ranked = sorted((-scores[i][h][t], i, h, t) for i, h in group for t in range(start, end))
        for _, i, h, t in ranked[: len(group) * (budget - len(fixed))]:
            kept[i][h].add(t)
    return [[sorted(own) for own in layer] for layer in kept]


def scores_of(view: PromptView, asked: Repeat) -> list[list[list[float]]]:
    return [[rows.max(dim=0).values.tolist() for rows in repeated(x, asked).received[0]] for x in view.layers]


@pytest.mark.parametrize("tokens", [9, 40, 90])
@pytest.mark.parametrize("label", PRESETS)
def test_what_is_kept_is_what_the_loop_keeps(label: str, tokens: int) -> None:
    policy: Any = make_policy(label)
    view = make_view(tokens, policy.needs)
    scores, start = scores_of(view, policy.asked), 3 if policy.sinks is None else 4
    for budget in (1, 2, 5, 8, tokens - 5, tokens - 1):
        expected = naive(scores, budget, start, tokens - 1, policy.share)
        assert [positions(kv) for kv in policy.compress(view, budget)] == expected
        sizes = [sum(map(len, layer)) for layer in expected]
        assert sum(sizes) == LAYERS * HEADS * budget
    if tokens == 90 and policy.share == "model":
        middle = naive(scores, 20, start, tokens - 1, "model")
        assert len({len(head) for layer in middle for head in layer}) > 2


@pytest.mark.parametrize("query", ["aware", "agnostic"])
@pytest.mark.parametrize("label", ["kvzip", "kvzip@plus"])
def test_the_engine_keeps_what_transformers_attention_tells(tiny: LoadedModel, label: str, query: Any) -> None:
    """From the plain model's attention weights to the slots kept; what closes the message is kept, as what opens it."""
    plain = copy.deepcopy(tiny.model)
    plain.set_attn_implementation("eager")
    policy = replace(make_policy(label), chunk=40)  # type: ignore[type-var]
    assert isinstance(policy, KVzip)
    opened = encode(tiny, HEAD + TEXT)
    ids = [*opened, *encode(tiny, f"{CLOSED}So")]
    prompt = Prompt(ids, len(opened), (), Limits(2, frozenset()))
    head = ids if query == "aware" else opened
    paid = [x.view(2, 2, -1).amax(dim=1).tolist() for x in gold(tiny, plain, head, policy.asked)]
    expected = naive(paid, 20, 2 if policy.sinks is None else 4, len(opened), "model")
    engine = Engine(AttachedModel(copy.deepcopy(tiny.model), tiny.wording), query=query)
    cell = Cell(policy, Budget(tokens=20))
    runs, _ = engine.compress_cells(head, [cell])
    left = runs[cell].compressed
    assert left is not None and [positions(kv) for kv in left.kvs] == expected
    (outcome,) = engine.run(prompt, [cell])
    assert outcome.status == "ok" and outcome.kept_slots == tuple(sum(map(len, layer)) for layer in expected)


def test_a_chunk_is_scored_by_itself(tiny: LoadedModel) -> None:
    """A shorter chunk is weighed against fewer others, so that its tokens get more."""
    engine = Engine(AttachedModel(copy.deepcopy(tiny.model), tiny.wording))
    totals = []
    for chunk in (2000, 20):
        policy = KVzip(chunk=chunk)
        view = engine.prefill(encode(tiny, HEAD + TEXT), policy.needs).view
        totals.append(float(torch.cat([policy.score(layer) for layer in view.layers]).sum()))
    assert totals[0] < totals[1]


def test_scores_are_of_the_query_that_pays_most() -> None:
    policy = make_policy("kvzip")
    view = make_view(12, policy.needs)
    assert isinstance(policy, KVzip)
    found: Tensor = policy.score(view.layers[0])
    received = repeated(view.layers[0], policy.asked).received
    assert found.shape == (1, HEADS, 12) and received.shape[2] == GROUP
    assert torch.equal(found, received.max(dim=2).values)
