"""One cell: the harness against `generate`, plain and inside a press. Same tokens, same kept positions, then time.

`first_token="prefill"` where a press is compared: kvpress takes the first token from the uncompressed prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.bench.sides import EXACT, cell

if TYPE_CHECKING:
    from tests.bench.sides import Ours, Text, Theirs

pytestmark = pytest.mark.bench
ROUNDS = 7


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_fullkv_beside_generate(
    race: Callable[..., Any], sides: tuple[Ours, Theirs], text: Callable[[int], Text], tokens: int, dtype: str
) -> None:
    ours, theirs = sides
    prompt, cells = text(tokens), [cell("fullkv")]
    _warm(ours, theirs, text(256))
    outcomes, generated = race(
        f"fullkv, {tokens} tokens, {dtype}: ours / generate",
        lambda: ours.run(prompt, cells),
        lambda: theirs.generate(prompt),
        goal=("<=", 1.03),
        rounds=ROUNDS,
    )
    if dtype == "float32":
        assert list(outcomes[0].token_ids) == generated


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_snapkv_beside_its_press(
    race: Callable[..., Any], sides: tuple[Ours, Theirs], text: Callable[[int], Text], tokens: int, dtype: str
) -> None:
    ours, theirs = sides
    prompt, budget = text(tokens), tokens // 4
    cells = [cell("snapkv@kvpress", budget)]
    _warm(ours, theirs, text(256))
    outcomes, generated = race(
        f"snapkv@kvpress, {tokens} tokens, {dtype}: ours / kvpress",
        lambda: ours.run(prompt, cells, first_token="prefill"),
        lambda: theirs.generate(prompt, "snapkv@kvpress", budget),
        goal=("<=", 1.0),
        rounds=ROUNDS,
    )
    if dtype == "float32":
        assert list(outcomes[0].token_ids) == generated


@pytest.mark.parametrize("dtype", ["float32"], indirect=True, scope="session")
@pytest.mark.parametrize(("tokens", "budget"), [(1024, 128), (1024, 256), (2048, 1280)])  # at 1280 the pyramid rises
@pytest.mark.parametrize("label", EXACT)
def test_the_same_tokens_as_kvpress(
    sides: tuple[Ours, Theirs], text: Callable[[int], Text], label: str, tokens: int, budget: int
) -> None:
    ours, theirs = sides
    prompt = text(tokens)
    theirs.model.set_attn_implementation("sdpa")
    full, kept = ours.compressed(prompt, label, budget)
    keys = theirs.compressed_keys(prompt, label, budget)
    for mine, their_keys, whole in zip(kept, keys, full, strict=True):
        assert torch.equal(mine.positions, _positions(their_keys, whole.keys))
    outcome = ours.run(prompt, [cell(label, budget)], first_token="prefill")[0]
    assert list(outcome.token_ids) == theirs.generate(prompt, label, budget)


def _positions(kept: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Which tokens' keys these are, ascending: [1, H, S]. Keys of two sides differ by rounding only."""
    distance = torch.cdist(kept, whole, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.min(dim=-1)
    assert nearest.values.max() < 1e-3
    return nearest.indices.sort(dim=-1).values


def _warm(ours: Ours, theirs: Theirs, prompt: Text) -> None:
    theirs.model.set_attn_implementation("sdpa")
    ours.run(prompt, [cell("snapkv@kvpress", 64)])
    theirs.generate(prompt, "snapkv@kvpress", 64)
