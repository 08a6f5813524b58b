"""CompilerKV: kept positions against the published formulas in plain loops, and what its table files refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods.base import KV, LayerView, PolicyError, PromptView
from methods.compilerkv.manifest import Manifest, Shapes
from methods.compilerkv.paper import prompt_risk, prompt_utility
from methods.compilerkv.policy import CompilerKV
from methods.compilerkv.tables import Tables, load_tables, neutral, save_tables, transfer
from methods.registry import make_policy

LAYERS, HEADS, GROUP, DIM = 3, 2, 3, 8
SHAPES = Shapes(layers=LAYERS, query_heads=HEADS * GROUP, kv_heads=HEADS)


def make_prompt(tokens: int, *, window: int = 64) -> PromptView:
    draw = torch.Generator().manual_seed(tokens)
    layers = []
    for index in range(LAYERS):
        keys, values = (torch.randn(1, HEADS, tokens, DIM, generator=draw) for _ in range(2))
        queries = torch.randn(1, HEADS * GROUP, min(window, tokens), DIM, generator=draw)
        kv = KV(keys, values, torch.arange(tokens).expand(1, HEADS, tokens))
        layers.append(LayerView(index, kv, queries, DIM**-0.5))
    return PromptView(layers, -3 * torch.rand(1, min(window, tokens - 1), generator=draw))


def published(**parameters: Any) -> CompilerKV:
    return CompilerKV(form="published", **{"tables": "neutral", **parameters})


def make_tables(budgets: tuple[int, ...] = (16,), *, seed: int = 0) -> Tables:
    draw = torch.Generator().manual_seed(seed)
    manifest = Manifest(kind="compiled", shapes=SHAPES, budgets=budgets, source="random", corpus="none", seed=seed)
    head, gate = (len(budgets), LAYERS, HEADS * GROUP), (len(budgets), LAYERS, 20, 4)
    budget = torch.rand(len(budgets), LAYERS, HEADS, generator=torch.Generator().manual_seed(seed)) + 0.2
    return Tables(
        manifest,
        budget=budget / budget.mean(dim=(1, 2), keepdim=True),
        head=0.8 + 0.7 * torch.rand(head, generator=draw),
        gate=0.8 + 0.2 * torch.rand(gate, generator=draw),
        entropy_edges=torch.linspace(2.0, 4.4, 19),
        perplexity_edges=torch.tensor([3.9, 4.4, 4.7]),
        head_support=torch.randint(9, head, generator=draw),
        gate_support=torch.randint(9, gate, generator=draw),
        head_alone=0.8 + 0.7 * torch.rand(head, generator=draw),
        gate_alone=0.8 + 0.2 * torch.rand(gate, generator=draw),
        retrieval=torch.ones_like(budget),
        risk=torch.tensor([[0.0, 4.0, 0.2], [0.0, 1.0, 0.5]]).repeat(len(budgets), 1, 1),
    )


def naive_alpha(view: PromptView, window: int) -> list[float]:
    """T / |window| * sum over window queries of the attention averaged over layers and heads."""
    tokens, used = view.tokens, min(window, view.tokens)
    alpha = [0.0] * tokens
    for layer in view.layers:
        keys, queries = layer.kv.keys[0].double().numpy(), layer.queries[0].double().numpy()
        for q in range(HEADS * GROUP):
            for j in range(1, used + 1):
                seen = range(tokens - j + 1)
                powers = [math.exp(float(queries[q, -j] @ keys[q // GROUP, t]) * layer.scaling) for t in seen]
                total = sum(powers) * LAYERS * HEADS * GROUP
                for t in seen:
                    alpha[t] += tokens / used * powers[t] / total
    return alpha


def naive_risk(view: PromptView, alpha: list[float], window: int) -> tuple[float, float]:
    total = sum(alpha)
    entropy = -sum(a / total * math.log(a / total) for a in alpha)
    assert view.logprobs is not None
    return entropy, math.exp(-float(np.mean(view.logprobs[0].tolist()[-window:])))


def naive_kept(view: PromptView, tables: Tables | None, budget: int, *, window: int = 64) -> list[list[int]]:
    """Positions kept in each layer."""
    tokens, alpha = view.tokens, naive_alpha(view, window)
    entropy, perplexity = naive_risk(view, alpha, window)
    kept = []
    for index, layer in enumerate(view.layers):
        norms = [[math.sqrt(sum(x * x for x in v)) for v in head] for head in layer.kv.values[0].tolist()]
        weights, tau = [1.0] * HEADS * GROUP, 0.8
        if tables is not None:
            high = sum(entropy >= edge for edge in tables.entropy_edges.tolist())
            wide = sum(perplexity >= edge for edge in tables.perplexity_edges.tolist())
            weights, tau = tables.head[0, index].tolist(), tables.gate[0, index, high, wide].item()
        scores = []
        for t in range(tokens):
            rho = [norms[q // GROUP][t] / (sum(norms[q // GROUP]) / tokens) for q in range(HEADS * GROUP)]
            scores.append(max(w * alpha[t] * r for w, r in zip(weights, rho, strict=True)))
        candidates = [t for t in range(tokens) if scores[t] >= tau]
        best = sorted(candidates, key=lambda t: (-scores[t], t))[:budget]
        kept.append(sorted(best or [scores.index(max(scores))]))
    return kept


def kept_by(policy: CompilerKV, view: PromptView, budget: int) -> list[list[list[int]]]:
    return [kv.positions[0].tolist() for kv in policy.compress(view, budget)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "budget"), [(29, 5), (77, 1), (77, 28), (77, 76)])
def test_kept_positions_are_the_formulas(tokens: int, budget: int, compiled: bool, tmp_path: Path) -> None:
    tables = save_tables(make_tables((budget,)), tmp_path) if compiled else None
    view = make_prompt(tokens)
    expected = naive_kept(view, tables, budget)
    policy = published(tables=str(tmp_path) if compiled else "neutral")
    assert kept_by(policy, view, budget) == [[layer] * HEADS for layer in expected]
    full = [len(layer) == budget for layer in expected]
    assert all(full) if budget < 10 else not any(full) if budget == 76 else True


def test_the_threshold_is_that_of_the_risk_over_the_whole_window(tmp_path: Path) -> None:
    view, tables = make_prompt(77), make_tables((76,))
    entropy, perplexity = naive_risk(view, naive_alpha(view, 64), 64)
    near = torch.linspace(-9e-5, 9e-5, 19)  # of 64 queries and log-probabilities; 63 lie further off
    tables.entropy_edges.copy_(entropy * (1 + near))
    tables.perplexity_edges.copy_(perplexity * (1 + torch.tensor([-9e-5, 9e-5, 1e-2])))
    tables.head.fill_(1.0), tables.gate.fill_(1.0)
    tables.gate[:, :, 9:11, 1] = 0.8
    save_tables(tables, tmp_path)
    kept = kept_by(published(tables=str(tmp_path)), view, 76)
    assert kept == [[layer] * HEADS for layer in naive_kept(view, tables, 76)] == kept_by(published(), view, 76)


def test_tables_change_what_is_kept(tmp_path: Path) -> None:
    view = make_prompt(77)
    save_tables(make_tables((28,)), tmp_path)
    assert kept_by(published(tables=str(tmp_path)), view, 28) != kept_by(published(), view, 28)


def test_preset_paper_is_the_published_protocol() -> None:
    assert make_policy("compilerkv@paper", {"tables": "neutral"}) == published() == published(window=64)


def test_utility_has_mean_one_and_risk_is_in_nats() -> None:
    view = make_prompt(50, window=20)
    alpha = prompt_utility(view, 16)
    assert alpha.mean().item() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(alpha.numpy(), naive_alpha(view, 16), rtol=1e-4)
    assert prompt_risk(view, alpha, 16) == pytest.approx(naive_risk(view, alpha.tolist(), 16), rel=1e-4)
    assert prompt_risk(view, torch.ones(50), 16)[0] == pytest.approx(math.log(50), rel=1e-5)
    peaked = torch.zeros(50)
    peaked[3] = 50.0
    assert prompt_risk(view, peaked, 16)[0] == 0.0


def test_budgets_of_one_prompt_share_one_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    view, seen = make_prompt(40), []
    attention = LayerView.attention

    def counted(layer: LayerView, window: int) -> torch.Tensor:
        seen.append(layer.index)
        return attention(layer, window)

    monkeypatch.setattr(LayerView, "attention", counted)
    for budget in (4, 8, 16):
        published().compress(view, budget)
    assert seen == list(range(LAYERS))


def test_the_best_token_stays_when_none_passes_the_gate(tmp_path: Path) -> None:
    tables = make_tables((8,))
    tables.gate.fill_(50.0)
    tables = replace(tables, manifest=tables.manifest.model_copy(update={"gate_range": (0.8, 60.0)}))
    save_tables(tables, tmp_path)
    view = make_prompt(40)
    kept = kept_by(published(tables=str(tmp_path)), view, 8)
    assert kept == [[layer] * HEADS for layer in naive_kept(view, tables, 8)]
    assert {len(head) for layer in kept for head in layer} == {1}


def test_a_prompt_of_one_token_and_dead_values_do_not_break_it() -> None:
    view = make_prompt(1)
    assert kept_by(published(), view, 5) == [[[0]] * HEADS] * LAYERS
    view = make_prompt(30)
    for layer in view.layers:
        layer.kv.values.zero_()
    assert all(kv.live.tolist() == [[1] * HEADS] for kv in published().compress(view, 5))


def test_missing_log_probabilities_are_refused() -> None:
    view = make_prompt(20)
    view.logprobs = None
    with pytest.raises(PolicyError, match="log-probabilities"):
        published().compress(view, 5)


def test_tables_for_another_model_are_refused_before_the_first_prompt(tmp_path: Path) -> None:
    fitting, view = tmp_path / "fitting", make_prompt(20)
    save_tables(make_tables((64,)), fitting)
    published(tables=str(fitting)).check(view)
    assert published(tables=str(fitting)).provenance()["tables_sha256"] == load_tables(fitting).manifest.tensors_sha256
    view.layers.pop()
    with pytest.raises(PolicyError, match="layers"):
        published(tables=str(fitting)).check(view)


def test_lookup_takes_the_nearest_budget_and_the_right_cell() -> None:
    tables = make_tables((64, 128, 512))
    assert [tables.nearest_budget(n) for n in (1, 64, 96, 97, 320, 321, 9999)] == [64, 64, 64, 128, 128, 512, 512]
    edges = tables.entropy_edges.tolist()
    for entropy, high in ((0.0, 0), (edges[0], 1), (edges[4] - 1e-4, 4), (edges[4], 5), (99.0, 19)):
        for perplexity, wide in ((1.0, 0), (3.95, 1), (4.5, 2), (float("inf"), 3)):
            weights, thresholds = tables.lookup(130, entropy=entropy, perplexity=perplexity)
            assert torch.equal(weights, tables.head[1])
            assert torch.equal(thresholds, tables.gate[1, :, high, wide])


def test_records_say_which_tables_were_used(tmp_path: Path) -> None:
    digest = save_tables(make_tables((16, 64)), tmp_path / "compiled").manifest.tensors_sha256[:12]
    policy = published(tables=str(tmp_path / "compiled"))
    assert policy.notes(64, 100, LAYERS) == (f"tables {digest}",)
    assert policy.notes(50, 100, LAYERS) == (f"tables {digest}, compiled for budget 64, used at 50",)
    save_tables(neutral(SHAPES, (8,)), tmp_path / "neutral")
    for tables in ("neutral", str(tmp_path / "neutral")):
        (note,) = published(tables=tables).notes(50, 100, LAYERS)
        assert note.startswith("neutral tables:")
    view = make_prompt(40)
    assert kept_by(published(tables=str(tmp_path / "neutral")), view, 9) == kept_by(published(), view, 9)


def test_tables_come_back_as_saved_and_are_read_once(tmp_path: Path) -> None:
    saved = save_tables(make_tables(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "tables.safetensors"]
    loaded = load_tables(tmp_path)
    assert loaded.manifest == saved.manifest
    assert loaded.manifest.created
    for name, x in saved.tensors.items():
        assert torch.equal(x, loaded.tensors[name])
    assert load_tables(str(tmp_path)) is loaded
    changed = save_tables(make_tables(seed=1), tmp_path)
    assert torch.equal(load_tables(tmp_path).head, changed.head)


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def damage_tensors(folder: Path) -> None:
    data = bytearray((folder / "tables.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "tables.safetensors").write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tables at": lambda folder: (folder / "tables.safetensors").unlink(),
    "manifest.json: No such file": lambda folder: (folder / "manifest.json").unlink(),
    "simulated tables are refused": lambda folder: edit(folder, kind="simulated"),
    "sha256": damage_tensors,
    "Extra inputs are not permitted": lambda folder: edit(folder, surprise=1),
    "schema_version": lambda folder: edit(folder, schema_version=1),
    "Invalid JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "not ascending": lambda folder: edit(folder, budgets=[16, 16]),
    r"budget is .*\[1, 3, 2\], expected .*\[2, 3, 2\]": lambda folder: edit(folder, budgets=[16, 32]),
    "head(_alone)? goes from .* outside 1.4 to 1.5": lambda folder: edit(folder, head_range=[1.4, 1.5]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_unsound_files_are_refused_in_one_line(message: str, tmp_path: Path) -> None:
    save_tables(make_tables(), tmp_path)
    load_tables(tmp_path)
    DAMAGE[message](tmp_path)
    with pytest.raises(PolicyError, match=message) as caught:
        published(tables=str(tmp_path)).compress(make_prompt(20), 4)
    assert "\n" not in str(caught.value)
    assert "compile" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("head", math.nan, "1 values of head are not finite"),
        ("gate", math.inf, "1 values of gate are not finite"),
        ("budget", 0.0, "budget multiples are not above 0 with a mean of 1"),
        ("budget", 9.0, "budget multiples are not above 0 with a mean of 1"),
        ("head", 2.0, "head goes from .* to 2, outside 0.8 to 1.5"),
        ("gate", 0.5, "gate goes from 0.5"),
        ("entropy_edges", 9.0, "entropy_edges .* are not ascending"),
        ("gate_support", -1, "gate_support goes from -1"),
    ],
)
def test_unsound_values_are_neither_saved_nor_read(name: str, value: float, message: str, tmp_path: Path) -> None:
    tables = make_tables()
    tables.tensors[name].view(-1)[0] = value
    with pytest.raises(PolicyError, match=message):
        save_tables(tables, tmp_path)
    assert not list(tmp_path.iterdir())
    mislabelled = replace(tables, manifest=tables.manifest.model_copy(update={"kind": "neutral"}))
    with pytest.raises(PolicyError, match="compile the tables again"):
        save_tables(mislabelled, tmp_path)


def test_tables_of_another_model_are_refused_and_moved_by_depth(tmp_path: Path) -> None:
    tables = make_tables()
    other = Shapes(layers=5, query_heads=HEADS * GROUP, kv_heads=HEADS)
    with pytest.raises(PolicyError, match=r"tables are for 3 layers .* has 5 layers .*transfer"):
        tables.validate(other)
    save_tables(tables, tmp_path)
    with pytest.raises(PolicyError, match="2 layers"):
        published(tables=str(tmp_path)).compress(PromptView(make_prompt(20).layers[:2], torch.zeros(1, 9)), 4)
    moved = save_tables(transfer(tables, other), tmp_path)
    moved.validate(other)
    assert "transferred from 3 layers" in moved.manifest.source
    middle = (tables.gate[:, 0] + tables.gate[:, 1]) / 2
    torch.testing.assert_close(moved.gate[:, [0, 2, 4]], tables.gate)
    torch.testing.assert_close(moved.gate[:, 1], middle)
    assert torch.equal(moved.gate_support[:, 1], torch.minimum(tables.gate_support[:, 0], tables.gate_support[:, 1]))
    assert torch.equal(moved.entropy_edges, tables.entropy_edges)


def test_heads_are_moved_only_when_asked_for() -> None:
    tables, other = make_tables(), Shapes(layers=LAYERS, query_heads=11, kv_heads=1)
    with pytest.raises(PolicyError, match="heads=True"):
        transfer(tables, other)
    moved = transfer(tables, other, heads=True)
    moved.validate(other)
    torch.testing.assert_close(moved.head[..., ::2], tables.head)
    torch.testing.assert_close(moved.head[..., 1], (tables.head[..., 0] + tables.head[..., 1]) / 2)
    assert torch.equal(moved.gate, tables.gate)
    assert moved.budget.shape == (1, LAYERS, 1)
    torch.testing.assert_close(moved.budget.mean(dim=(1, 2)), torch.ones(1))


def test_parts_of_the_published_tables_can_be_taken_away() -> None:
    tables, risk = make_tables((16,)), {"entropy": 3.0, "perplexity": 4.5}
    edges = [tables.entropy_edges.tolist(), tables.perplexity_edges.tolist()]
    high, wide = (sum(value >= edge for edge in own) for value, own in zip((3.0, 4.5), edges, strict=True))
    neutral_head, neutral_gate = torch.full((LAYERS, HEADS * GROUP), 1.0), torch.full((LAYERS,), 0.8)
    expected = {
        "both": (tables.head[0], tables.gate[0, :, high, wide]),
        "independent": (tables.head_alone[0], tables.gate_alone[0, :, high, wide]),
        "head": (tables.head_alone[0], neutral_gate),
        "gate": (neutral_head, tables.gate_alone[0, :, high, wide]),
    }
    for learned, (weights, thresholds) in expected.items():
        found = tables.lookup(16, **risk, learned=learned)  # type: ignore[arg-type]
        assert torch.equal(found[0], weights) and torch.equal(found[1], thresholds)
    assert make_policy("compilerkv@independent", {"tables": "neutral"}) == published(learned="independent")
