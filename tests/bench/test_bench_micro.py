"""Parts of a run on their own: one decode step of many rows beside one row, streamed column sums beside whole ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.kernels import causal_attention, column_sums
from harness.engine.row_cache import GrowingRows
from methods.base import Needs
from methods.registry import make_policy

if TYPE_CHECKING:
    from tests.bench.sides import Ours, Text, Theirs

pytestmark = pytest.mark.bench
ROUNDS = 15
TABLES = {"tables": "smollm2-135m"}


def test_decode_step_of_26_rows(
    race: Callable[..., Any], sides: tuple[Ours, Theirs], text: Callable[[int], Text], dtype: str
) -> None:
    """5 methods at 5 budgets and the full cache."""
    model = sides[0].model
    whole = Engine(model).prefill(text(1024).ids, Needs()).view
    sizes = [1024, *(budget for budget in (64, 128, 256, 384, 512) for _ in range(5))]

    def session(slots: list[int]) -> Decoding:
        layers = []
        for layer in whole.layers:
            heads = layer.kv.positions.shape[:2]
            rows = [layer.kv.take(torch.arange(size).expand(*heads, size)) for size in slots]
            layers.append(GrowingRows(rows, position=1024, room=ROUNDS + 2))
        return Decoding(model, layers, len(slots))

    with torch.inference_mode():
        many, one = session(sizes), session([1024])
        for warm in (many, one):
            warm.step([1] * warm.rows)
        logits, alone = race(
            f"decode step, {dtype}: 26 rows / 1 row",
            lambda: many.step([1] * 26),
            lambda: one.step([1]),
            goal=None,
            rounds=ROUNDS,
        )
    torch.testing.assert_close(logits[:1], alone, atol=1e-3 if dtype == "float32" else 0.5, rtol=0)


def test_selection_of_the_compiled_form(
    note: Callable[..., None], sides: tuple[Ours, Theirs], text: Callable[[int], Text], dtype: str
) -> None:
    """2048 tokens, budget 256: without whole-prompt attention beside SnapKV, with it beside H2O."""
    ids, engine = text(2048).ids, Engine(sides[0].model)
    labels = ("compilerkv", "compilerkv@window", "snapkv", "h2o")
    policies = {label: make_policy(label, TABLES if "compiler" in label else {}) for label in labels}
    seconds: dict[str, list[float]] = {}
    for round_ in range(ROUNDS + 1):
        for label, policy in policies.items():
            start = time.perf_counter()
            view = engine.prefill(ids, policy.needs).view
            middle = time.perf_counter()
            with torch.inference_mode():
                kept = policy.compress(view, 256)
            end = time.perf_counter()
            assert sum(int(kv.live.sum()) for kv in kept) == 256 * 30 * 3
            if round_:  # the first one warms up
                seconds.setdefault(f"{label} selects", []).append(end - middle)
                seconds.setdefault(f"{label} prefills", []).append(middle - start)
                seconds.setdefault(label, []).append(end - start)
    for name, over, goal in (
        ("compilerkv@window selects", "snapkv selects", 1.2),
        ("compilerkv@window selects", "compilerkv@window prefills", 0.02),
        ("snapkv selects", "snapkv prefills", 0.02),
        ("compilerkv", "h2o", 1.0),
    ):
        ratios = [a / b for a, b in zip(seconds[name], seconds[over], strict=True)]
        note(f"2048 tokens, {dtype}: {name} / {over}", ratios, ("<=", goal))


def test_column_sums(race: Callable[..., Any]) -> None:
    """One layer in the packaged model's shape, 2048 tokens."""
    draw = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, heads, 2048, 64, generator=draw) for heads in (9, 3))
    future = torch.ones(2048, 2048, dtype=torch.bool).triu_(1)

    def whole() -> torch.Tensor:
        logits = queries @ keys.repeat_interleave(3, dim=1).transpose(2, 3) / 8
        return logits.masked_fill_(future, float("-inf")).softmax(dim=-1).sum(dim=2)

    _, lse = causal_attention(queries, keys, keys, scaling=1 / 8, window=None)

    def fused() -> torch.Tensor:
        return column_sums(queries, keys, lse, scaling=1 / 8)

    fused()
    sums, expected = race("column sums, 2048 tokens: fused / whole", fused, whole, goal=None, rounds=ROUNDS)
    torch.testing.assert_close(sums.reshape(1, 9, -1), expected, atol=1e-3, rtol=1e-4)
