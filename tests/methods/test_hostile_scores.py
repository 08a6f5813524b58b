"""Methods that rank by what is no number: the contract refuses each, however it ranks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.contract import check_method
from harness.contract import tried as tried_by_contract
from methods.base import KV, Budget, EvictionPolicy, KVPolicy, LayerView, PromptView, best
from methods.codes import MinMax
from methods.registry import METHODS, method
from methods.stored import encode
from tests.hostile import tried

pytestmark = pytest.mark.hostile


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    yield
    METHODS.pop("spoilt", None)
    tried_by_contract.cache_clear()


def by_topk(scores: Tensor, slots: int) -> Tensor:
    return scores.topk(slots, dim=-1).indices.sort(dim=-1).values


RANKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "topk": by_topk,
    "best": lambda scores, slots: best(scores, slots).sort(dim=-1).values,
    "sort": lambda scores, slots: scores.sort(dim=-1, descending=True).indices[..., :slots].sort(dim=-1).values,
    "argsort": lambda scores, slots: scores.argsort(dim=-1)[..., -slots:].sort(dim=-1).values,
    "compared": lambda scores, slots: by_topk((scores > 0.5).float(), slots),
}
SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda scores: scores * math.nan,
    "one": lambda scores: scores.index_fill(2, torch.tensor([0]), math.nan),
    "zero by zero": lambda scores: scores * 0 / 0.0,
    "too large": lambda scores: (scores + 1) * 1e38 * 1e38 * 0,
}


@pytest.mark.parametrize("how", RANKS)
@pytest.mark.parametrize("spoilt", SPOILS)
def test_a_method_that_ranks_by_itself_is_refused(how: str, spoilt: str) -> None:
    @method("spoilt", paper="control, no paper")
    @dataclass(frozen=True)
    class Spoilt(KVPolicy):
        """Ranks what is no number."""

        def compress(self, view: PromptView, budget: int) -> list[KV]:
            slots = min(budget, view.tokens)
            scores = [SPOILS[spoilt](layer.kv.keys.float().norm(dim=-1)) for layer in view.layers]
            return [x.kv.take(RANKS[how](own, slots)) for x, own in zip(view.layers, scores, strict=True)]

    line = tried("methods that rank NaN", lambda: check_method("spoilt"))
    assert "NaN" in line or "positions" in line


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["first", "last", "all", "long prompts", "half precision"])
def test_scores_that_are_no_numbers_are_refused(number: float, where: str) -> None:
    @method("spoilt", paper="control, no paper")
    @dataclass(frozen=True)
    class Spoilt(EvictionPolicy):
        """Scores what is no number."""

        def score(self, view: LayerView) -> Tensor:
            scores = view.kv.keys.float().norm(dim=-1)
            if where == "half precision":
                return scores + (view.kv.keys.dtype == torch.float16 and number)
            at = {"first": slice(1), "last": slice(-1, None), "long prompts": slice(80, 81)}.get(where, slice(None))
            scores[..., at] = number
            return scores

    line = tried("methods of NaN scores", lambda: check_method("spoilt"))
    assert "NaN or infinite" in line


NO_BUDGETS: list[Any] = [True, 0, -1, -(10**5000), 2.5, "8", None, [8], math.nan, b"8", "x"]


@pytest.mark.parametrize("field", ["tokens", "fraction"])
def test_budgets_of_another_type_are_one_line(field: str) -> None:
    values = NO_BUDGETS if field == "tokens" else [*NO_BUDGETS, math.inf, -0.1, 1.1, 1e308, 2]
    for value in values:
        tried("budgets in Python", lambda value=value: Budget(**{field: value}))  # type: ignore[misc]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e30])
def test_numbers_that_have_no_codes_are_one_line(number: float) -> None:
    for dtype in (torch.float32, torch.float16):
        for bits in (8, 4, 2):
            keys = torch.ones(1, 2, 100, 32, dtype=dtype)
            keys[0, 1, 5, 3] = number
            kv = KV(keys, torch.ones_like(keys), torch.arange(100).expand(1, 2, 100))
            tried("codes", lambda kv=kv, bits=bits: encode(kv, MinMax(bits, 32, residual=8)))  # type: ignore[misc]
