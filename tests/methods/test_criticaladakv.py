"""CriticalAdaKV: as many slots a head as Ada-KV, chosen by the two stages of CriticalKV."""

import pytest

from methods.registry import make_policy
from tests.methods.loops import LAYERS, kept_by, naive_pooled, sizes
from tests.methods.test_criticalkv import layers_with_output, naive_norms, two_stages


@pytest.mark.parametrize(("tokens", "budget"), [(77, 20), (77, 40), (77, 70)])
@pytest.mark.parametrize("floor", [False, True])
def test_criticaladakv_keeps_as_many_as_adakv_and_chooses_in_two_stages(tokens: int, budget: int, floor: bool) -> None:
    layers = layers_with_output(tokens)
    changed = {"recent": 4, "safeguard": 0.5, "floor": floor}
    policy = make_policy("criticaladakv")
    object.__setattr__(policy, "inner", make_policy("adakv", changed))
    plain = kept_by("adakv", layers, budget, **changed)
    unlike = 0
    for index, gold in enumerate(layers):
        rows, norms = naive_pooled(gold, 4, 7, "max"), naive_norms(gold)
        [act, *_] = policy.per_layer(budget, sizes(tokens, LAYERS)) or []
        kept = [[t for t in head if t >= 0] for head in act(gold.view).positions[0].tolist()]
        for head, own in enumerate(plain[index]):
            first = max(len(own) // 2, budget // 2 if floor else 0)
            assert kept[head] == two_stages(rows[head], norms[head], len(own), first, 4)
            unlike += kept[head] != own
    assert unlike > 0
