"""KVCompose's kept tokens are those of a loop written from the paper."""

from collections.abc import Callable

import pytest

from methods.registry import make_policy
from tests.methods.loops import GROUP, HEADS, LAYERS, Gold, Rows, kept_by, make_layers, naive_top, sizes, top, wins

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
        loop = top(lambda gold: worth(gold, window), lambda _: window, slots=slots)
        assert kept_by(label, layers, budget, recent=window) == loop(layers, budget), label


def test_heads_of_a_layer_hold_as_many_and_the_first_layer_most() -> None:
    layers = make_layers(77)
    counts = [[len(head) for head in layer] for layer in kept_by("kvcompose", layers, 40, recent=8)]
    assert all(len(set(layer)) == 1 for layer in counts) and counts[0][0] == max(max(counts)) > counts[1][0]
    ragged = [[len(head) for head in layer] for layer in kept_by("kvcompose@unstructured", layers, 40, recent=8)]
    assert any(len(set(layer)) > 1 for layer in ragged) and sum(map(sum, ragged)) == 40 * HEADS * LAYERS


def test_a_budget_of_the_window_is_noted() -> None:
    policy = make_policy("kvcompose")
    assert policy.notes(33, sizes(77, 3)) == () and "evenly" in policy.notes(32, sizes(77, 3))[0]
    assert kept_by("kvcompose", make_layers(77), 3) == [[naive_top([0.0] * 77, 3, 3)] * HEADS] * LAYERS
