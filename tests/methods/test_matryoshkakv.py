"""MatryoshkaKV against loops written from its formulas, on random bases of the contract's random prompts."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor

from harness.contract import HEADS, LAYERS
from harness.contract import make_view as any_view
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from methods.artefact import COMPILED, Constants, ConstantsManifest, load_constants
from methods.base import KV, Budget, Needs, PolicyError, PromptView
from methods.budget import BudgetTooSmall
from methods.matryoshkakv import LEVELS, MatryoshkaKV, orthonormal
from methods.registry import make_policy
from methods.stored import CodedKV

TOKENS, ITEMS = 90, 2 * LAYERS * HEADS
FLOAT, DIM = 4, 8


def make_view(tokens: int, needs: Needs, dim: int = DIM) -> PromptView:
    return any_view(tokens, needs, dim=dim)


def constants(*, kinds: tuple[str, ...] = ("trained", "pca")) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    order = torch.arange(ITEMS).repeat(LEVELS - 1)[torch.randperm(ITEMS * (LEVELS - 1), generator=draw)]
    found = {}
    for kind in kinds:
        for name in ("key", "value"):
            square = torch.randn(LAYERS, HEADS, DIM, DIM, generator=draw)
            found[f"{kind}_{name}s"] = torch.linalg.qr(square).Q.half()
            found[f"{kind}_{name}_mean"] = torch.randn(LAYERS, HEADS, DIM, generator=draw)
    return {**found, "order": order.to(torch.int16)}


def give(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor]) -> None:
    empty = {"method": "", "model": "", "model_revision": "", "corpus": "", "prompts": (), "seed": 0}
    made = Constants(ConstantsManifest.model_validate(empty), tensors)
    monkeypatch.setattr(MatryoshkaKV, "_loaded", lambda self: made)


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, constants())


def rebuilt(x: Tensor, kind: str, name: str, layer: int, head: int, rank: int) -> Tensor:
    """Numbers x [D] from their first `rank` latents, one product at a time."""
    columns = orthonormal(constants()[f"{kind}_{name}s"])[layer, head]
    mean, out = constants()[f"{kind}_{name}_mean"][layer, head], torch.zeros(DIM)
    for column in range(rank):
        latent = sum((x[i] - mean[i]) * columns[i, column] for i in range(DIM))
        out += latent * columns[:, column]
    return out + mean


def fewest(asked: int, live: list[list[int]], residual: int, positions: bool, turns: bool = False) -> list[int]:
    """Levels of all items after the fewest falls that fit, by counting every head's bytes anew each time."""
    levels, order = [LEVELS] * ITEMS, constants()["order"].tolist()
    if turns:
        order = [item for _ in range(LEVELS - 1) for item in range(ITEMS)]
    for fallen in [None, *order]:
        if fallen is not None:
            levels[fallen] -= 1
        held = 0
        for layer in range(LAYERS):
            for head in range(HEADS):
                count, item = live[layer][head], layer * HEADS + head
                coded = max(0, count - residual)
                numbers = (levels[item] + levels[ITEMS // 2 + item]) * DIM // LEVELS
                held += coded * numbers * FLOAT + (count - coded) * 2 * DIM * FLOAT + count * (4 if positions else 0)
        if held <= asked:
            return levels
    raise AssertionError("nothing fits")


def bytes_of(kv: KV, *, positions: bool) -> int:
    assert isinstance(kv, CodedKV)
    return kv.nbytes - (0 if positions else 4 * int(kv.live.sum()))


@pytest.mark.parametrize(("label", "residual"), [("matryoshkakv", 1), ("matryoshkakv@pca", 5)])
@pytest.mark.parametrize("budget", [20, 45, 80])
def test_slots_are_rebuilt_from_their_first_latents_at_the_fewest_falls_that_fit(
    label: str, residual: int, budget: int
) -> None:
    view = make_view(TOKENS, Needs())
    kept = make_policy(label, {"residual": residual}).compress(view, budget)
    asked, residual = budget * LAYERS * HEADS * (2 * DIM * FLOAT + 4), min(residual, budget // 8)
    levels = fewest(asked, [[TOKENS] * HEADS] * LAYERS, residual, positions=False, turns=label.endswith("pca"))
    assert sum(bytes_of(kv, positions=False) for kv in kept) <= asked
    kind = "pca" if label.endswith("pca") else "trained"
    for layer, (own, kv) in enumerate(zip(view.layers, kept, strict=True)):
        for part, name in enumerate(("key", "value")):
            true, found = (own.kv.keys, own.kv.values)[part], kv.load()[part]
            assert torch.equal(true[:, :, TOKENS - residual :], found[:, :, TOKENS - residual :])
            for head in range(HEADS):
                rank = levels[part * LAYERS * HEADS + layer * HEADS + head] * DIM // LEVELS
                for slot in (0, 40, TOKENS - residual - 1):
                    expected = rebuilt(true[0, head, slot], kind, name, layer, head, rank)
                    torch.testing.assert_close(found[0, head, slot], expected, rtol=1e-4, atol=1e-4)


def test_of_a_whole_prompt_nothing_is_lost_and_full_ranks_are_exact_to_rounding() -> None:
    view = make_view(12, Needs())
    for layer, kv in zip(view.layers, make_policy("matryoshkakv").compress(view, 12), strict=True):
        assert torch.equal(kv.load()[0], layer.kv.keys) and torch.equal(kv.load()[1], layer.kv.values)
    for level in (LEVELS, LEVELS - 1):
        policy = MatryoshkaKV()
        coding = policy._coding(policy._fitting(view), 1, 0, (level, LEVELS), torch.device("cpu"))
        keys, values = view.layers[1].kv.keys[:, 0], view.layers[1].kv.values[:, 0]
        codes, out = coding.encode(keys, values, view.layers[1].kv.positions[:, 0]), (keys.clone(), values.clone())
        codes.decode(*out, view.layers[1].kv.positions[:, 0])
        torch.testing.assert_close(out[1], values, rtol=1e-5, atol=1e-5)
        assert (out[0] - keys).abs().max() < 1e-5 if level == LEVELS else (out[0] - keys).abs().max() > 0.1


def test_what_the_key_mean_adds_to_logits_is_the_same_for_all_slots() -> None:
    columns = orthonormal(constants()["pca_keys"])[0, 0][:, :3]
    mean, query = constants()["pca_key_mean"][0, 0], torch.randn(5, DIM)
    keys = make_view(TOKENS, Needs()).layers[0].kv.keys[0, 0]
    latents = (keys - mean) @ columns
    apart = query @ (latents @ columns.T + mean).T - (query @ columns) @ latents.T  # [5, T]
    torch.testing.assert_close(apart, apart[:, :1].expand(5, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("over", ["snapkv", "adakv"])
def test_over_a_method_its_slots_are_cut_until_their_bytes_fit(over: str) -> None:
    policy = make_policy("matryoshkakv", {"over": over, "residual": 1})
    view = make_view(TOKENS, policy.needs)
    budget = 40
    kept = [kv for kv in policy.compress(view, budget) if isinstance(kv, CodedKV)]
    plain = 2 * DIM * FLOAT + 4
    slots = 1 + int((budget - 1) * plain / (DIM * FLOAT + 4))
    chosen = make_policy(over).compress(view, slots)
    live = [kv.live[0].tolist() for kv in chosen]
    assert [kv.live[0].tolist() for kv in kept] == live and sum(map(sum, live)) > budget * LAYERS * HEADS
    asked = budget * LAYERS * HEADS * plain
    levels = fewest(asked, live, 1, positions=True)
    numbers = sum(own.counts[h] * (c.nbytes // c.slots // len(hs)) for own in kept for hs, c in own.parts for h in hs)
    counted = sum(
        (live[i // HEADS % LAYERS][i % HEADS] - 1) * level * DIM // LEVELS * FLOAT for i, level in enumerate(levels)
    )
    assert numbers == counted and asked - sum(kv.nbytes for kv in kept) in range(0, 90 * FLOAT)


def test_less_than_an_eighth_of_every_head_is_skipped() -> None:
    view = make_view(TOKENS, Needs())
    with pytest.raises(BudgetTooSmall, match="budget 5 is below an eighth of the numbers of 90 tokens"):
        make_policy("matryoshkakv").compress(view, 5)
    make_policy("matryoshkakv").compress(view, 12)
    with pytest.raises(BudgetTooSmall):
        make_policy("matryoshkakv").compress(view, 11)


@pytest.mark.parametrize(("budget", "plain"), [(80, 10), (45, 5), (16, 2), (12, 1)])
def test_a_small_budget_has_fewer_plain_tokens(budget: int, plain: int) -> None:
    """An eighth of it at most."""
    kept = make_policy("matryoshkakv").compress(make_view(TOKENS, Needs()), budget)
    assert all(isinstance(kv, CodedKV) and set(kv.counts) == {TOKENS - plain} for kv in kept)


def test_other_models_and_odd_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("matryoshkakv")
    with pytest.raises(PolicyError, match=r"4 layers of 2 KV heads.*keys of 16.*compile its own"):
        policy.check(make_view(8, Needs(), dim=16))
    for changes, said in (
        ({"over": "fullkv"}, "does not evict once"),
        ({"over": "matryoshkakv@pca"}, "does not evict once"),
        ({"over": "streamingllm@paper"}, "does not evict once"),
        ({"share": 0.1}, "share=0.1 is too small"),
        ({"residual": 0}, "residual=0 is too small"),
    ):
        with pytest.raises(PolicyError, match=said):
            make_policy("matryoshkakv", changes)
    give(monkeypatch, constants(kinds=("pca",)))
    with pytest.raises(PolicyError, match="no trained bases"):
        policy.check(make_view(8, Needs()))


def test_rounded_bases_are_made_orthogonal_again() -> None:
    for columns in (constants()["pca_keys"], constants()["trained_values"]):
        own = orthonormal(columns)
        assert (own - columns.float()).abs().max() < 2e-3
        torch.testing.assert_close(own.mT @ own, torch.eye(DIM).expand_as(own), rtol=0, atol=1e-6)


def test_the_bytes_of_a_method_are_those_that_it_reads() -> None:
    order = ITEMS * (LEVELS - 1) * 2
    assert make_policy("matryoshkakv").method_bytes == LAYERS * HEADS * 2 * (DIM * DIM * 2 + DIM * FLOAT) + order


def test_decoded_tokens_are_cut_too(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    own = {
        f"trained_{name}s": torch.linalg.qr(torch.randn(4, 2, 16, 16, generator=draw)).Q for name in ("key", "value")
    }
    own |= {f"trained_{name}_mean": torch.zeros(4, 2, 16) for name in ("key", "value")}
    give(monkeypatch, {**own, "order": torch.arange(16).repeat(7)})
    ids = torch.randint(5, 260, (60,), generator=draw).tolist()
    cell = Cell(make_policy("matryoshkakv"), Budget(fraction=0.5))
    found, plain = Engine(AttachedModel(copy.deepcopy(tiny.model))).run(
        Prompt(ids, 40, [70, 80, 90], Limits(12, frozenset())), [cell, Cell(make_policy("fullkv"), None)]
    )
    assert (found.status, found.over_budget) == ("ok", False) and found.kv_bytes <= found.asked_bytes
    grown, whole = (own.kv_bytes_end - own.kv_bytes for own in (found, plain))
    assert 0.4 * whole < grown < 0.65 * whole  # all but the last token


def test_the_packaged_bases_are_orthogonal_and_lose_less_than_pca_on_held_out_text() -> None:
    found = load_constants(COMPILED / "matryoshkakv" / "smollm2-135m")
    assert found.manifest.method == "matryoshkakv" and sum(x.nbytes for x in found.tensors.values()) < 4_000_000
    assert torch.equal(found.tensors["order"].long().bincount(), torch.full((2 * 30 * 3,), LEVELS - 1))
    for kind, name in product(("trained", "pca"), ("keys", "values")):
        own = orthonormal(found.tensors[f"{kind}_{name}"])
        torch.testing.assert_close(own.mT @ own, torch.eye(64).expand_as(own), rtol=0, atol=1e-5)
    report = found.manifest.report
    for share in ("0.25", "0.5", "0.75"):
        assert report["trained"][share][0] < min(report["pca"][share][0], report["pca"][f"{share} alike"][0])
    assert max(report[kind]["full"][0] for kind in ("trained", "pca")) < 0.01
