"""ReCalKV's latents against the layer's input, its ranks against the authors' loop, its bytes and own prefill."""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from methods import recalkv
from methods.base import Budget, KVPolicy, Needs, PolicyError, PromptView
from methods.budget import BudgetTooSmall
from methods.recalkv import ReCalKV
from methods.registry import make_policy
from methods.shared_latents import Factors
from methods.stored import CodedKV

LAYERS, HEADS, DIM = 4, 2, 16
SEEN = Needs(window=64, hidden_states=True)


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(5, 260, (120,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def view(model: AttachedModel, ids: list[int]) -> PromptView:
    return Engine(model).prefill(ids, SEEN).view


def constants(model: AttachedModel, group: int = HEADS) -> dict[str, Tensor]:
    """Bases of some inputs, groups of `group` heads in the order 1, 0, and Fisher information that differs by layer."""
    found: dict[str, list[Tensor]] = {"key_bases": [], "value_bases": []}
    draw = torch.Generator().manual_seed(1)
    for module in model.attention:
        given = torch.randn(500, 64, generator=draw) * torch.logspace(0, -1, 64)
        keys = (given @ module.k_proj.weight.T).view(-1, HEADS, DIM)[:, [1, 0]]  # type: ignore[union-attr, operator]
        values = given @ module.v_proj.weight.T  # type: ignore[union-attr, operator]
        apart = keys.reshape(500, HEADS // group, -1).transpose(0, 1)
        found["key_bases"].append(torch.linalg.svd(apart, full_matrices=False).Vh.mT)
        found["value_bases"].append(torch.linalg.svd(values, full_matrices=False).Vh.mT)
    fisher = torch.rand(LAYERS, 2, HEADS, generator=draw) + 0.5
    none = {f"{kind}_bias": torch.zeros(LAYERS, HEADS * DIM) for kind in ("key", "value")}
    stacked = {name: torch.stack(own).half() for name, own in found.items()}
    return {**stacked, **none, "key_order": torch.tensor([[1, 0]] * LAYERS), "fisher": fisher}


@pytest.fixture(autouse=True, params=[HEADS, 1], ids=["one group", "a group a head"])
def made(model: AttachedModel, request: pytest.FixtureRequest) -> Iterator[dict[str, Tensor]]:
    own = constants(model, request.param)
    recalkv._factors.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReCalKV, "_loaded", lambda self: SimpleNamespace(tensors=own))
        yield own
    recalkv._factors.cache_clear()


def at_ranks(view: PromptView, made: dict[str, Tensor], share: float) -> list[CodedKV]:
    """Every layer at a share of its ranks."""
    factors, policy = Factors.of(made), ReCalKV(residual=1)
    ranks = (int(share * HEADS * DIM) // factors.groups, int(share * HEADS * DIM))
    found = [policy._encoded(layer, layer.kv, at, ranks, factors) for at, layer in enumerate(view.layers)]
    assert all(isinstance(kv, CodedKV) for kv in found)
    return found  # type: ignore[return-value]


def test_full_rank_is_exact_however_heads_are_grouped(view: PromptView, made: dict[str, Tensor]) -> None:
    other = {**made, "key_order": made["key_order"].flip(1)}
    for kvs in (at_ranks(view, made, 1.0), at_ranks(view, other, 1.0)):
        for layer, kv in zip(view.layers, kvs, strict=True):
            keys, values = kv.load()
            torch.testing.assert_close(keys, layer.kv.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(values, layer.kv.values, atol=1e-4, rtol=1e-4)


def test_latents_are_those_of_the_layers_input(view: PromptView, ids: list[int], made: dict[str, Tensor]) -> None:
    """They are U^T W x of each token's input, heads in the groups' order; keys are L z = U U^T W x, then RoPE."""
    groups, share = made["key_bases"].shape[1], 0.5
    for at, (layer, kv) in enumerate(zip(view.layers, at_ranks(view, made, share), strict=True)):
        assert layer.source is not None
        assert layer.source.ids is not None and layer.source.ids[0].tolist() == ids
        hidden = layer.source.hidden[0, :-1]
        module = layer.source.module
        heads = (hidden @ module.k_proj.weight.T).view(-1, HEADS, DIM)  # type: ignore[union-attr, operator]
        latents, rebuilt = [], torch.zeros_like(heads)
        for group, members in enumerate(made["key_order"][at].view(groups, -1).tolist()):
            basis = torch.linalg.qr(made["key_bases"][at, group].double()).Q.float()
            basis = basis[:, : int(share * len(basis))]
            own = torch.cat([heads[:, head] for head in members], dim=1)
            latents.append(own @ basis)
            for i, head in enumerate(members):
                rebuilt[:, head] = (own @ basis @ basis.T)[:, i * DIM : (i + 1) * DIM]
        ((_, codes),) = kv.parts
        found = codes.tensors()[0][0]
        torch.testing.assert_close(found.abs(), torch.cat(latents, dim=1).abs(), atol=1e-3, rtol=1e-3)
        assert layer.rotate is not None
        turned = layer.rotate(rebuilt.transpose(0, 1), torch.arange(len(hidden)).expand(HEADS, -1))
        torch.testing.assert_close(kv.load()[0][0, :, :-1], turned, atol=1e-3, rtol=1e-3)


def test_fewer_latents_leave_more_error(view: PromptView, made: dict[str, Tensor]) -> None:
    errors = []
    for share in (0.25, 0.5, 0.75, 1.0):
        pairs = zip(at_ranks(view, made, share), view.layers, strict=True)
        errors.append(sum(float((kv.load()[0] - layer.kv.keys).square().mean()) for kv, layer in pairs))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < errors[-2]


def authors_ranks(fisher: Sequence[float], full: int, total: int) -> list[int]:
    """rank_search.py:225-251 at ReCalKV ea548d5, before ranks are split and rounded; none reaches the full one."""
    wanted = [total * own / sum(fisher) for own in fisher]
    ranks = [min(full, math.floor(own)) for own in wanted]
    order = sorted(range(len(ranks)), key=lambda i: wanted[i] - ranks[i], reverse=True)
    for i in order[: total - sum(ranks)]:
        ranks[i] += 1
    return ranks


def test_ranks_follow_fisher_information_as_the_authors_do(made: dict[str, Tensor]) -> None:
    factors = Factors.of(made)
    weights = [float(own) for own in made["fisher"].mean(dim=2).flatten()]
    for total in (40, 77, 128):
        wanted = authors_ranks(weights, HEADS * DIM, total)
        assert max(wanted) < HEADS * DIM
        found = factors.allotted(total, "fisher")
        flat = [own for keys, values in found for own in (keys * factors.groups, values)]
        assert all(abs(a - b) <= 1 + factors.groups for a, b in zip(flat, wanted, strict=True))
        assert total - LAYERS * factors.groups < sum(flat) <= total
    assert factors.allotted(factors.full, "fisher") == [(HEADS * DIM // factors.groups, HEADS * DIM)] * LAYERS
    even = [own for keys, values in factors.allotted(130, "uniform") for own in (keys * factors.groups, values)]
    assert max(even) - min(even) <= factors.groups


@pytest.mark.parametrize(("preset", "budget"), [*product(("cache", "paper", "uniform"), (12, 30, 61, 100))])
def test_stored_bytes_are_those_of_the_budget(
    model: AttachedModel, ids: list[int], made: dict[str, Tensor], preset: str, budget: int
) -> None:
    policy = make_policy(f"recalkv@{preset}")
    (outcome,) = Engine(model).run(Prompt(ids, 100, (70, 80), Limits(4, frozenset())), [Cell(policy, Budget(budget))])
    assert outcome.status == "ok" and outcome.stored_bytes <= outcome.asked_bytes
    assert outcome.stored_bytes > outcome.asked_bytes - LAYERS * 119 * 4 * made["key_bases"].shape[1] - 1000
    assert outcome.kept_slots == (HEADS * 120,) * LAYERS


def test_a_budget_below_one_latent_is_skipped(view: PromptView) -> None:
    with pytest.raises(BudgetTooSmall, match="below one latent"):
        ReCalKV(residual=2).compress(view, 2)


def test_over_another_method_heads_keep_the_same_tokens(model: AttachedModel, ids: list[int], view: PromptView) -> None:
    for label in ("snapkv_shared", "streamingllm"):
        policy = make_policy("recalkv", {"over": label})
        prompt = Prompt(ids, 100, (70, 80), Limits(4, frozenset()))
        (outcome,) = Engine(model).run(prompt, [Cell(policy, Budget(30))])
        assert outcome.status == "ok" and outcome.stored_bytes <= outcome.asked_bytes, outcome
        assert min(outcome.kept_slots) > 1.5 * 30 * HEADS
    with pytest.raises(PolicyError, match="keeps other tokens in each head"):
        make_policy("recalkv", {"over": "snapkv"}).compress(view, 30)
    for label, told in (("fullkv", "does not evict once"), ("recalkv", "does not evict once")):
        with pytest.raises(PolicyError, match=told):
            make_policy("recalkv", {"over": label})


def test_the_papers_prefill_is_that_of_its_weights(
    tiny: LoadedModel, model: AttachedModel, view: PromptView, ids: list[int], made: dict[str, Tensor]
) -> None:
    """The same model with W replaced by U U^T W, run by transformers with a cache of its own."""
    policy = ReCalKV(prefill="own", residual=1)
    ranks = policy._ranks(Factors.of(made), 60, len(ids), 4)
    own, groups = copy.deepcopy(tiny.model), made["key_bases"].shape[1]
    own.set_attn_implementation("sdpa")  # whatever another test has made of the shared model
    for at, (layer, (key, value)) in enumerate(zip(own.model.layers, ranks, strict=True)):
        weight = layer.self_attn.k_proj.weight.data.view(HEADS, DIM, -1)
        for group, members in enumerate(made["key_order"][at].view(groups, -1).tolist()):
            basis = torch.linalg.qr(made["key_bases"][at, group].double()).Q.float()[:, :key]
            weight[members] = (basis @ basis.T @ weight[members].flatten(0, 1)).unflatten(0, (-1, DIM))
        basis = torch.linalg.qr(made["value_bases"][at].double()).Q.float()[:, :value]
        layer.self_attn.v_proj.weight.data = basis @ basis.T @ layer.self_attn.v_proj.weight.data
    with torch.inference_mode():
        cache = own(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
        left = policy.compress(view, 60)
        again = Engine(model).prefill(ids, Needs(window=1)).view
    exact = ReCalKV(residual=1).compress(view, 60)
    for at, kv in enumerate(left):
        keys, values = kv.load()
        torch.testing.assert_close(keys, cache.layers[at].keys, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(values, cache.layers[at].values, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(again.layers[at].kv.keys, view.layers[at].kv.keys)  # the model is as it was
    assert not torch.allclose(exact[-1].load()[0], left[-1].load()[0], atol=1e-2)


def test_a_model_of_another_shape_is_refused(view: PromptView, made: dict[str, Tensor]) -> None:
    less = {name: own[:3] for name, own in made.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReCalKV, "_loaded", lambda self: SimpleNamespace(tensors=less))
        policy: KVPolicy = ReCalKV(share=0.4)
        with pytest.raises(PolicyError, match="3 layers of 2 KV heads.*this model has 4 layers"):
            policy.check(view)
