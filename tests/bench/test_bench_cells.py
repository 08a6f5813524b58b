"""6 methods x 5 budgets on one prompt: 30 pipeline calls of kvpress against one `Engine.run` with 30 cells.

Both sides compress all but the last token and then feed that one: kvpress's pipeline with the question in the context,
and, forward for forward, what the harness does by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.bench.sides import EXACT, NEW_TOKENS, PEERS, cell

if TYPE_CHECKING:
    from tests.bench.sides import Ours, Text, Theirs

pytestmark = pytest.mark.bench
BUDGETS = (64, 128, 256, 384, 512)


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_thirty_cells(
    race: Callable[..., Any], sides: tuple[Ours, Theirs], text: Callable[[int], Text], tokens: int, dtype: str
) -> None:
    ours, theirs = sides
    prompt = text(tokens)
    grid = [(label, budget) for label in PEERS for budget in BUDGETS]
    cells = [cell(label, budget) for label, budget in grid]
    warm = text(256)
    ours.run(warm, cells[:1], query="agnostic")
    for label in PEERS:
        theirs.evaluate(warm, label, 64)
    outcomes, answers = race(
        f"30 cells, {tokens} tokens, {dtype}: kvpress / ours",
        lambda: ours.run(prompt, cells, query="agnostic"),
        lambda: [theirs.evaluate(prompt, label, budget) for label, budget in grid],
        goal=(">=", 15.0),
        rounds=3 if dtype != "float32" else 1,
    )
    assert {len(outcome.token_ids) for outcome in outcomes} == {NEW_TOKENS}
    if dtype == "float32":  # elsewhere products round differently in a batch of 30 rows
        decode = ours.loaded.tokenizer.decode
        for (label, budget), outcome, answer in zip(grid, outcomes, answers, strict=True):
            if label in EXACT:
                assert decode(outcome.token_ids, skip_special_tokens=True) == answer, (label, budget)
