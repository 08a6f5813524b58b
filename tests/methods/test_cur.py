"""CUR's kept tokens are those of a loop written from the formula."""

import pytest
import torch

from methods.base import PolicyError
from methods.registry import make_policy
from tests.methods.loops import DIM, Array, Gold, kept_by, make_layers, top


def parts(rows: Array, local: int) -> list[float]:
    """Squared length of each row [T, D] as a part of its stretch's."""
    own = [sum(float(x) ** 2 for x in row) for row in rows]
    start = [t - t % local for t in range(len(own))]
    return [own[t] / sum(own[at : at + local]) for t, at in enumerate(start)]


def scores(gold: Gold, of: str, local: int, columns: int) -> list[list[float]]:
    draw = torch.Generator().manual_seed(gold.view.index)
    by = torch.randn(DIM, columns, generator=draw).double().numpy() if columns else torch.eye(DIM).double().numpy()
    rows = []
    for keys, values in zip(gold.keys, gold.view.kv.values[0].double().numpy(), strict=True):
        both = zip(parts(keys @ by, local), parts(values @ by, local), strict=True)
        rows.append([{"product": k * v, "mean": k + v, "key": k, "value": v}[of] for k, v in both])
    return rows


@pytest.mark.parametrize("budget", [1, 4, 20, 76])
@pytest.mark.parametrize("tokens", [29, 64, 77])
@pytest.mark.parametrize(
    ("label", "changed", "given"),
    [
        ("cur", {}, ("product", 16, 0)),
        ("cur@kvpress", {"of": "mean"}, ("mean", 16, 0)),
        ("cur", {"of": "key", "local": 7}, ("key", 7, 0)),
        ("cur", {"of": "value", "local": 0}, ("value", 1000, 0)),
        ("cur@projected", {}, ("product", 16, 20)),
    ],
)
def test_what_is_kept_is_what_the_loop_keeps(
    label: str, changed: dict[str, object], given: tuple[str, int, int], tokens: int, budget: int
) -> None:
    if budget < tokens:
        layers = make_layers(tokens)
        loop = top(lambda gold: scores(gold, *given), sinks=4)
        assert kept_by(label, layers, budget, **changed) == loop(layers, budget)


def test_a_bad_value_is_refused() -> None:
    with pytest.raises(PolicyError, match="local=-1 is too small"):
        make_policy("cur", {"local": -1})
