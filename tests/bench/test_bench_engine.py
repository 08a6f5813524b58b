"""Runs and their parts: cells beside kvpress, one cell beside `generate`, a decode step of many rows, column sums.

`first_token="prefill"` where a press is compared: kvpress takes the first token from the uncompressed prompt.
"""

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
from methods.views import Form
from tests.bench.sides import EXACT, NEW_TOKENS, PEERS, cell

if TYPE_CHECKING:
    from tests.bench.sides import Ours, Text, Theirs

    MakeText = Callable[[int], Text]

pytestmark = pytest.mark.bench
BUDGETS = (64, 128, 256, 384, 512)
ROUNDS = 15


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_thirty_cells(
    race: Callable[..., Any], sides: tuple[Ours, Theirs], text: MakeText, tokens: int, dtype: str
) -> None:
    """6 methods x 5 budgets on one prompt: 30 pipeline calls of kvpress against one `Engine.run` with 30 cells.

    Both sides compress all but the last token and then feed that one: kvpress's pipeline with the question in the
    context, and, forward for forward, what the harness does by default.
    """
    ours, theirs = sides
    prompt, warm = text(tokens), text(256)
    grid = [(label, budget) for label in PEERS for budget in BUDGETS]
    cells = [cell(label, budget) for label, budget in grid]
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


@pytest.mark.parametrize("tokens", [1024, 2048])
@pytest.mark.parametrize(("label", "rival", "goal"), [("fullkv", "generate", 1.03), ("snapkv@kvpress", "kvpress", 1.0)])
def test_one_cell_beside_generate(
    race: Callable[..., Any],
    sides: tuple[Ours, Theirs],
    text: MakeText,
    tokens: int,
    dtype: str,
    label: str,
    rival: str,
    goal: float,
) -> None:
    """Plain, and inside a press."""
    ours, theirs = sides
    prompt, press = text(tokens), () if label == "fullkv" else (label, tokens // 4)
    cells = [cell("fullkv") if label == "fullkv" else cell(label, tokens // 4)]
    theirs.model.set_attn_implementation("sdpa")
    ours.run(text(256), [cell("snapkv@kvpress", 64)])
    theirs.generate(text(256), "snapkv@kvpress", 64)
    outcomes, generated = race(
        f"{label}, {tokens} tokens, {dtype}: ours / {rival}",
        lambda: ours.run(prompt, cells, first_token="prefill" if press else "compressed"),
        lambda: theirs.generate(prompt, *press),
        goal=("<=", goal),
        rounds=7,
    )
    if dtype == "float32":
        assert list(outcomes[0].token_ids) == generated


@pytest.mark.parametrize("dtype", ["float32"], indirect=True, scope="session")
@pytest.mark.parametrize(("tokens", "budget"), [(1024, 128), (1024, 256), (2048, 1280)])  # at 1280 the pyramid rises
@pytest.mark.parametrize("label", EXACT)
def test_the_same_tokens_as_kvpress(
    sides: tuple[Ours, Theirs], text: MakeText, label: str, tokens: int, budget: int
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
    nearest = torch.cdist(kept, whole, compute_mode="donot_use_mm_for_euclid_dist").min(dim=-1)
    assert nearest.values.max() < 1e-3
    return nearest.indices.sort(dim=-1).values


def test_decode_step_of_26_rows(
    race: Callable[..., Any], sides: tuple[Ours, Theirs], text: MakeText, dtype: str
) -> None:
    """5 methods at 5 budgets and the full cache."""
    model = sides[0].model
    whole = Engine(model).prefill(text(1024).ids, Needs()).view

    def session(slots: list[int]) -> Decoding:
        layers = []
        for layer in whole.layers:
            heads = layer.kv.positions.shape[:2]
            rows = [layer.kv.take(torch.arange(size).expand(*heads, size)) for size in slots]
            layers.append(GrowingRows(rows, position=1024, room=ROUNDS + 2))
        return Decoding(model, layers, len(slots))

    with torch.inference_mode():
        many, one = session([1024, *(budget for budget in BUDGETS for _ in range(5))]), session([1024])
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
    note: Callable[..., None], sides: tuple[Ours, Theirs], text: MakeText, dtype: str
) -> None:
    """2048 tokens, budget 256: without whole-prompt attention beside SnapKV, with it beside H2O."""
    ids, engine = text(2048).ids, Engine(sides[0].model)
    labels = ("compilerkv", "compilerkv@window", "snapkv", "h2o")
    policies = {
        label: make_policy(label, {"tables": "smollm2-135m"} if "compiler" in label else {}) for label in labels
    }
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

    _, lse = causal_attention(queries, keys, keys, Form(1 / 8))

    def fused() -> torch.Tensor:
        return column_sums(queries, keys, lse, Form(1 / 8))

    fused()
    sums, expected = race("column sums, 2048 tokens: fused / whole", fused, whole, goal=None, rounds=ROUNDS)
    torch.testing.assert_close(sums.reshape(1, 9, -1), expected, atol=1e-3, rtol=1e-4)
