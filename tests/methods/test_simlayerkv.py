"""SimLayerKV's whole and lazy layers are those of a loop, at the slots that the budget pays for."""

import pytest

from methods.base import PolicyError
from methods.registry import make_policy
from methods.simlayerkv import SimLayerKV, slots_of_layers
from tests.methods.loops import GROUP, HEADS, LAYERS, Gold, kept_by, make_layers, sizes


def loop(layers: tuple[Gold, ...], budget: int, *, sinks: int, recent: int, window: int, share: float) -> list[int]:
    """Slots of each layer: whole layers one by one, the least lazy first, as long as the others can be paid."""
    tokens = layers[0].view.tokens
    lazy = max(1, min(sinks + recent, int(budget * share)))
    first = min(sinks, lazy)
    kept = [*range(first), *range(tokens - (lazy - first), tokens)]
    mass = []
    for gold in layers:
        rows = [gold.attention[h, g, -w - 1] for h in range(HEADS) for g in range(GROUP) for w in range(window)]
        mass.append(sum(float(row[t]) for row in rows for t in kept) / len(rows))
    order = sorted(range(len(layers)), key=lambda i: mass[i])
    whole = 0
    while whole < LAYERS and (whole + 1) * tokens + (LAYERS - whole - 1) * lazy <= budget * LAYERS:
        whole += 1
    left = budget * LAYERS - whole * tokens
    slots = [0] * LAYERS
    for i in order[:whole]:
        slots[i] = tokens
    for place, i in enumerate(order[whole:]):
        slots[i] = left // (LAYERS - whole) + (place < left % (LAYERS - whole))
    return slots


@pytest.mark.parametrize("budget", [1, 2, 7, 20, 31, 40, 50, 65, 76])
@pytest.mark.parametrize(("sinks", "recent", "window", "share"), [(4, 1024, 1, 0.5), (4, 10, 3, 0.5), (0, 5, 1, 0.1)])
def test_what_is_kept_is_what_the_loop_keeps(budget: int, sinks: int, recent: int, window: int, share: float) -> None:
    layers = make_layers(77)
    given = {"sinks": sinks, "recent": recent, "window": window, "share": share}
    slots = loop(layers, budget, sinks=sinks, recent=recent, window=window, share=share)
    assert sum(slots) == LAYERS * budget
    gold = []
    for own in slots:
        first = min(sinks, own)
        gold.append([[*range(first), *range(77 - (own - first), 77)]] * HEADS)
    assert kept_by("simlayerkv", layers, budget, **given) == gold


def test_a_budget_that_pays_for_no_whole_layer_is_noted() -> None:
    policy = make_policy("simlayerkv", {"share": 0.5})
    assert policy.notes(44, sizes(77, 3)) == () == policy.notes(77, sizes(77, 3))  # 77 + 2 * 22 <= 3 * 44
    assert policy.notes(38, sizes(77, 3)) == ("every layer is lazy: this budget pays for no whole one",)
    assert [len(own[0]) for own in kept_by("simlayerkv", make_layers(77), 38, share=0.5)] == [38] * 3
    assert sorted(len(own[0]) for own in kept_by("simlayerkv", make_layers(77), 44, share=0.5)) == [27, 28, 77]


def test_a_lazy_layer_holds_the_authors_window_where_the_budget_is_large() -> None:
    assert [SimLayerKV().lazy_slots(own) for own in (1, 64, 1142, 1143, 9000)] == [1, 57, 1027, 1028, 1028]


def test_layers_that_hold_less_leave_their_slots_to_others() -> None:
    assert slots_of_layers([0.9, 0.1, 0.5], [50, 20, 50], 10, 90) == [20, 20, 50]
    assert slots_of_layers([0.9, 0.1, 0.5], [15, 20, 50], 10, 60) == [15, 20, 25]
    assert slots_of_layers([0.9, 0.1], [50, 50], 10, 100) == [50, 50]


def test_a_bad_share_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"share=1.5 is too large"):
        make_policy("simlayerkv", {"share": 1.5})
