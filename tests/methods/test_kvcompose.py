"""KVCompose's kept tokens are those of a loop written from the paper: by a second pass, or by the last queries."""

import copy
from collections.abc import Callable

import pytest

from harness.contract import make_view
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.models.load import LoadedModel
from methods.base import LayerView, PolicyError
from methods.kvcompose import AGAIN, KVCompose
from methods.registry import make_policy
from methods.repeat import repeated
from tests.engine.repeats import TEXT, encode, gold
from tests.methods.loops import (
    GROUP,
    HEADS,
    LAYERS,
    Gold,
    Rows,
    kept_by,
    make_layers,
    naive_top,
    positions,
    sizes,
    top,
    wins,
)

Slots = Callable[[list[Rows], int], list[list[int]]]


def worth(gold: Gold, window: int) -> Rows:
    """Most attention of the last queries, averaged over the group, plus the mean over KV heads."""
    tokens = gold.view.tokens
    own = []
    for head in range(HEADS):
        most = [
            [max(gold.attention[head, g, -w - 1, t] for w in range(window)) for g in range(GROUP)]
            for t in range(tokens)
        ]
        own.append([sum(float(x) for x in row) / GROUP for row in most])
    mean = [sum(row[t] for row in own) / HEADS for t in range(tokens)]
    return [[x + y for x, y in zip(row, mean, strict=True)] for row in own]


def repeated_worth(layer: LayerView, across: bool, lengths: bool) -> Rows:
    """The same of what a second pass paid to each token, times the length of its value where asked for."""
    paid, values = repeated(layer, AGAIN).received[0].tolist(), layer.kv.values[0].tolist()
    own = [[sum(group[t] for group in head) / len(head) for t in range(layer.tokens)] for head in paid]
    if lengths:
        norms = [[sum(x * x for x in value) ** 0.5 for value in head] for head in values]
        own = [[x * norm for x, norm in zip(*rows, strict=True)] for rows in zip(own, norms, strict=True)]
    mean = [sum(row[t] for row in own) / len(own) if across else 0.0 for t in range(layer.tokens)]
    return [[x + y for x, y in zip(row, mean, strict=True)] for row in own]


def naive(rows: list[Rows], budget: int, structured: bool, least: int) -> list[list[list[int]]]:
    """Positions kept, [L][H], of worths [L][H][T]."""
    ranked = [[sorted(row, reverse=True) for row in layer] for layer in rows]
    if structured:
        places = range(len(ranked[0][0]))
        ranked = [[[sum(row[i] for row in layer) / len(layer) for i in places]] for layer in ranked]
        ranked[0] = [[max(layer[0][i] for layer in ranked) for i in places]]
    flat = [row for layer in ranked for row in layer]
    order = sorted((i >= min(least, budget), -x, at) for at, row in enumerate(flat) for i, x in enumerate(row))
    owners = [at for *_, at in order[: budget * len(flat)]]
    heads = [(row, i if structured else i * HEADS + h) for i, layer in enumerate(rows) for h, row in enumerate(layer)]
    found = [naive_top(row, owners.count(at)) for row, at in heads]
    return [found[at : at + HEADS] for at in range(0, len(found), HEADS)]


@pytest.mark.parametrize("budget", [1, 4, 20, 33, 76])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("across", "lengths", "least"), [(True, False, 0), (True, True, 3), (False, False, 25)])
def test_what_the_second_pass_keeps_is_what_the_loop_keeps(
    budget: int, structured: bool, across: bool, lengths: bool, least: int
) -> None:
    policy = KVCompose(structured=structured, across=across, lengths=lengths, least=least)
    view = make_view(77, policy.needs)
    expected = naive([repeated_worth(x, across, lengths) for x in view.layers], budget, structured, least)
    assert [positions(kv) for kv in policy.compress(view, budget)] == expected
    assert sum(len(head) for layer in expected for head in layer) == budget * len(view.layers) * HEADS


def test_the_pass_is_the_prompt_again_and_nothing_else(tiny: LoadedModel) -> None:
    """From the plain model's attention weights, every token once more after all of them, to the slots kept."""
    plain = copy.deepcopy(tiny.model)
    plain.set_attn_implementation("eager")
    ids, policy = encode(tiny, TEXT), make_policy("kvcompose")
    view = Engine(AttachedModel(copy.deepcopy(tiny.model))).prefill(ids, policy.needs).view
    rows = []
    for paid in gold(tiny, plain, ids, AGAIN):
        own = paid.view(HEADS, -1, len(ids)).mean(dim=1)
        rows.append((own + own.mean(dim=0)).tolist())
    assert [positions(kv) for kv in policy.compress(view, 20)] == naive(rows, 20, structured=True, least=0)


def test_a_prompt_that_was_not_repeated_is_refused() -> None:
    with pytest.raises(PolicyError, match="not repeated; declare it in needs"):
        make_policy("kvcompose").compress(make_view(40, make_policy("snapkv").needs), 10)


def composite_slots(window: int) -> Slots:
    def slots(rows: list[Rows], budget: int) -> list[list[int]]:
        if budget <= window:
            return [[budget] * HEADS] * LAYERS
        ranked = [[sorted(row[: len(row) - window], reverse=True) for row in layer] for layer in rows]
        places = range(len(ranked[0][0]))
        means = [[sum(row[i] for row in layer) / HEADS for i in places] for layer in ranked]
        means[0] = [max(layer[i] for layer in means) for i in places]
        return [[window + n] * HEADS for n in wins(means, (budget - window) * LAYERS)]

    return slots


def own_slots(window: int) -> Slots:
    def slots(rows: list[Rows], budget: int) -> list[list[int]]:
        if budget <= window:
            return [[budget] * HEADS] * LAYERS
        flat = [row[: len(row) - window] for layer in rows for row in layer]
        found = [window + n for n in wins(flat, (budget - window) * LAYERS * HEADS)]
        return [found[at : at + HEADS] for at in range(0, len(found), HEADS)]

    return slots


@pytest.mark.parametrize("budget", [1, 8, 9, 20, 32, 40, 60, 76])
@pytest.mark.parametrize("window", [8, 32])
def test_what_is_kept_is_what_the_loop_keeps(window: int, budget: int) -> None:
    layers = make_layers(77)
    for label, slots in (("kvcompose", composite_slots(window)), ("kvcompose@unstructured", own_slots(window))):
        loop = top(lambda own: worth(own, window), lambda _: window, slots=slots)
        assert kept_by(label, layers, budget, recent=window) == loop(layers, budget), label


def test_heads_of_a_layer_hold_as_many_and_the_first_layer_most() -> None:
    layers = make_layers(77)
    counts = [[len(head) for head in layer] for layer in kept_by("kvcompose", layers, 40, recent=8)]
    assert all(len(set(layer)) == 1 for layer in counts) and counts[0][0] == max(max(counts)) > counts[1][0]
    ragged = [[len(head) for head in layer] for layer in kept_by("kvcompose@unstructured", layers, 40, recent=8)]
    assert any(len(set(layer)) > 1 for layer in ragged) and sum(map(sum, ragged)) == 40 * HEADS * LAYERS


def test_a_budget_of_the_window_is_noted() -> None:
    policy = make_policy("kvcompose@window")
    assert make_policy("kvcompose").notes(3, sizes(77, 3)) == ()
    assert policy.notes(33, sizes(77, 3)) == () and "evenly" in policy.notes(32, sizes(77, 3))[0]
    assert kept_by("kvcompose@window", make_layers(77), 3) == [[naive_top([0.0] * 77, 3, 3)] * HEADS] * LAYERS
