"""CompilerKV: kept positions against the published formulas in plain loops, and the slots that tables give to heads."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.claims.properties import golden_prompt, golden_tables
from harness.contract import GROUP, HEADS, LAYERS
from methods.base import LayerView, Needs, PolicyError, PromptView
from methods.compilerkv.paper import compress, prompt_risk, prompt_utility, worth
from methods.compilerkv.policy import CompilerKV
from methods.compilerkv.tables import Tables, neutral, save_tables
from methods.registry import make_policy
from tests.methods.compiled import SHAPES, kept, live, make_tables, prompt, saved
from tests.methods.loops import sizes


def published(**parameters: Any) -> CompilerKV:
    return CompilerKV(form="published", **{"tables": "neutral", **parameters})


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "budget"), [(29, 5), (77, 1), (77, 28), (77, 76)])
def test_kept_positions_are_the_formulas(tokens: int, budget: int, compiled: bool, tmp_path: Path) -> None:
    tables = save_tables(make_tables(budget), tmp_path) if compiled else None
    view = prompt(tokens)
    expected = naive_kept(view, tables, budget)
    policy = published(tables=str(tmp_path) if compiled else "neutral")
    assert kept(policy, view, budget) == [[layer] * HEADS for layer in expected]
    full = [len(layer) == budget for layer in expected]
    assert all(full) if budget < 10 else not any(full) if budget == 76 else True


def test_the_golden_numbers_of_the_authors_second_repository() -> None:
    """By hand, as in its tests at 59047a9.

    Values of lengths 1, 1, 1 and 1, 2, 3; queries that see (.5, .5, 0) and (0, .5, .5) in both heads.
    alpha = 3 / 2 (.5, 1, .5); rho = (1, 1, 1) and (.5, 1, 1.5); s = max(u_1, 1.5 u_2).
    """
    view, tables = golden_prompt((0.0, 1.0, 1.0)), golden_tables((1.0, 1.5), 0.9, 3)
    seen = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(view.layers[0].attention(2)[0], seen.expand(2, 1, 2, 3))
    alpha = prompt_utility(view, 2)
    assert alpha.tolist() == [0.75, 1.5, 0.75]
    assert worth(view.layers[0], alpha, [1.0, 1.5]).tolist() == [0.75, 2.25, 1.6875]
    (kv,) = compress(view, 3, tables, window=2, learned="both")
    assert kv.positions[0].tolist() == [[1, 2], [1, 2]]


def test_a_budget_that_was_not_compiled_takes_the_nearest_and_says_so(tmp_path: Path) -> None:
    """The authors' second repository refuses it."""
    saved(tmp_path)  # of 16 and 64
    policy, shapes = published(tables=str(tmp_path)), prompt(77).sizes
    assert [note.partition(", ")[2] for note in policy.notes(60, shapes)] == ["compiled for budget 64, used at 60"]
    assert not policy.notes(64, shapes)[0].partition(", ")[2]
    assert kept(policy, prompt(77), 60)


def test_the_threshold_is_that_of_the_risk_over_the_whole_window(tmp_path: Path) -> None:
    view, tables = prompt(77), make_tables(76)
    entropy, perplexity = naive_risk(view, naive_alpha(view, 64), 64)
    near = torch.linspace(-9e-5, 9e-5, 19)  # of 64 queries and log-probabilities; 63 lie further off
    tables.entropy_edges.copy_(entropy * (1 + near))
    tables.perplexity_edges.copy_(perplexity * (1 + torch.tensor([-9e-5, 9e-5, 1e-2])))
    tables.head.fill_(1.0), tables.gate.fill_(1.0)
    tables.gate[:, :, 9:11, 1] = 0.8
    save_tables(tables, tmp_path)
    found = kept(published(tables=str(tmp_path)), view, 76)
    assert found == [[layer] * HEADS for layer in naive_kept(view, tables, 76)] == kept(published(), view, 76)


def test_utility_has_mean_one_and_risk_is_in_nats() -> None:
    view = prompt(50, 20)
    alpha = prompt_utility(view, 16)
    assert alpha.mean().item() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(alpha.numpy(), naive_alpha(view, 16), rtol=1e-4)
    assert prompt_risk(view, alpha, 16) == pytest.approx(naive_risk(view, alpha.tolist(), 16), rel=1e-4)
    assert prompt_risk(view, torch.ones(50), 16)[0] == pytest.approx(math.log(50), rel=1e-5)
    peaked = torch.zeros(50)
    peaked[3] = 50.0
    assert prompt_risk(view, peaked, 16)[0] == 0.0


def test_budgets_of_one_prompt_share_one_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    view, seen = prompt(40), []
    attention = LayerView.attention

    def counted(layer: LayerView, window: int) -> torch.Tensor:
        seen.append(layer.index)
        return attention(layer, window)

    monkeypatch.setattr(LayerView, "attention", counted)
    for budget in (4, 8, 16):
        published().compress(view, budget)
    assert seen == list(range(LAYERS))


def test_the_best_token_stays_when_none_passes_the_gate(tmp_path: Path) -> None:
    tables = make_tables(8)
    tables.gate.fill_(50.0)
    tables = replace(tables, manifest=tables.manifest.model_copy(update={"gate_range": (0.8, 60.0)}))
    save_tables(tables, tmp_path)
    view = prompt(40)
    found = kept(published(tables=str(tmp_path)), view, 8)
    assert found == [[layer] * HEADS for layer in naive_kept(view, tables, 8)]
    assert {len(head) for layer in found for head in layer} == {1}


def test_a_prompt_of_one_token_and_dead_values_do_not_break_it() -> None:
    view = prompt(1)
    assert kept(published(), view, 5) == [[[0]] * HEADS] * LAYERS
    view = prompt(30)
    for layer in view.layers:
        layer.kv.values.zero_()
    assert all(kv.live.tolist() == [[1] * HEADS] for kv in published().compress(view, 5))


def test_what_the_published_form_cannot_do_without_is_refused(tmp_path: Path) -> None:
    view, policy = prompt(20), published(tables=str(tmp_path))
    tables = saved(tmp_path)
    policy.check(view)
    assert policy.provenance() == {"tables_sha256": tables.manifest.tensors_sha256}
    view.logprobs = None
    with pytest.raises(PolicyError, match="log-probabilities"):
        policy.compress(view, 5)
    view.layers.pop()
    for refused in (policy.check, lambda seen: policy.compress(seen, 5)):
        with pytest.raises(PolicyError, match="has 3 layers"):
            refused(view)


def test_records_say_which_tables_were_used(tmp_path: Path) -> None:
    digest = saved(tmp_path / "compiled").manifest.tensors_sha256[:12]
    policy = published(tables=str(tmp_path / "compiled"))
    assert policy.notes(64, sizes(100, LAYERS)) == (f"tables {digest}",)
    assert policy.notes(50, sizes(100, LAYERS)) == (f"tables {digest}, compiled for budget 64, used at 50",)
    save_tables(neutral(SHAPES, (8,)), tmp_path / "neutral")
    for tables, said in (
        ("neutral", "no tables for this model: neutral"),
        (str(tmp_path / "neutral"), "neutral tables:"),
    ):
        (note,) = published(tables=tables).notes(50, sizes(100, LAYERS))
        assert note.startswith(said)
    view = prompt(40)
    assert kept(published(tables=str(tmp_path / "neutral")), view, 9) == kept(published(), view, 9)


def test_presets_of_the_published_form() -> None:
    assert make_policy("compilerkv@paper", {"tables": "neutral"}) == published() == published(window=64)
    assert make_policy("compilerkv@independent", {"tables": "neutral"}) == published(learned="independent")


def test_the_compiled_form_gives_every_head_its_share(tmp_path: Path) -> None:
    tables, view = saved(tmp_path), prompt(60)
    policy, window, uniform, shuffled = (
        make_policy(f"compilerkv{preset}", {"tables": str(tmp_path)})
        for preset in ("", "@window", "@uniform", "@shuffled")
    )
    assert (policy.needs, window.needs) == (Needs(window=4, column_sums=True), Needs(window=4))
    found, other = live(policy, view, 16), live(shuffled, view, 16)
    assert sum(map(sum, found)) == 16 * LAYERS * HEADS
    np.testing.assert_allclose(found, 4 + 12 * tables.budget[0].numpy(), atol=1)
    assert live(uniform, view, 16) == [[16] * HEADS] * LAYERS
    assert other != found
    np.testing.assert_allclose(np.sort(other, axis=None), np.sort(found, axis=None), atol=1)
    for layer in view.layers:
        layer.column_sums = None
    assert live(window, view, 16) == found


def test_tables_belong_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "own")
    monkeypatch.setattr("methods.compilerkv.policy.COMPILED", tmp_path)
    assert CompilerKV().for_model("r1") == CompilerKV(tables="own")
    assert CompilerKV().for_model("r2") == CompilerKV(tables="neutral")
    assert CompilerKV(tables="own").for_model("r1").provenance().keys() == {"tables_sha256"}
    with pytest.raises(PolicyError, match=r"tables own are of some \(r1\), this model is r2; compile"):
        CompilerKV(tables="own").for_model("r2")
    (note,) = CompilerKV(tables="neutral").notes(16, sizes(99, LAYERS))
    assert note.startswith("no tables for this model")
    assert CompilerKV(tables="own").notes(16, sizes(99, LAYERS)) == ()
    assert live(CompilerKV(tables="neutral"), prompt(60), 20) == [[20] * HEADS] * LAYERS


def test_the_prompts_that_tables_were_fitted_on_are_known(tmp_path: Path) -> None:
    saved(tmp_path, prompts=("a" * 64, "b" * 64))
    assert CompilerKV(tables=str(tmp_path)).fitted_on() == {"a" * 64, "b" * 64}
    assert CompilerKV(tables="neutral").fitted_on() == frozenset()
