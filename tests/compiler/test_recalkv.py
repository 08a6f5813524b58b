"""ReCalKV's calibration against loops from its formulas, and a compilation of the tiny model."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from harness.compiler.asked import CalibrationSpec
from harness.compiler.recalkv import basis, cka, compile_constants, grouped, lost, whitener
from harness.compiler.stage import Workbench
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from methods.artefact import COMPILED, load_constants
from methods.base import Needs, PolicyError
from methods.recalkv import ReCalKV
from methods.registry import make_policy
from methods.shared_latents import Factors, orthonormal

HEADS, DIM, WIDTH = 3, 4, 20


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, seed: int = 0) -> Tensor:
    """Rows whose channels are correlated and of different size, as those of a layer are."""
    mixed = drawn(WIDTH, WIDTH, seed=9) * torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    return drawn(tokens, WIDTH, seed=seed) @ mixed


def turned(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(drawn(size, size, seed=seed)).Q


def hsic(x: Tensor, y: Tensor) -> float:
    """svd_linear.py:309-317 at ReCalKV ea548d5, from Gram matrices over the E rows."""
    count = len(x)
    centring = torch.eye(count, dtype=x.dtype) - 1 / count
    return float(torch.trace(x @ x.T @ centring @ y @ y.T @ centring)) / (count - 1) ** 2


def test_cka_is_that_of_gram_matrices() -> None:
    heads = drawn(HEADS, DIM, WIDTH)
    found = cka(heads)
    for a in range(HEADS):
        for b in range(HEADS):
            x, y = heads[a].T, heads[b].T
            wanted = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
            assert float(found[a, b]) == pytest.approx(wanted, rel=1e-9)


def test_a_head_is_like_itself_however_it_is_turned() -> None:
    heads = drawn(HEADS, DIM, WIDTH)
    also = torch.cat([heads, turned(DIM, 3) @ heads[:1] * 2.5])
    found = cka(also)
    torch.testing.assert_close(found.diagonal(), torch.ones(HEADS + 1, dtype=torch.float64))
    assert float(found[0, HEADS]) == pytest.approx(1)
    torch.testing.assert_close(found[HEADS], found[0])
    assert float(found[:HEADS, :HEADS].fill_diagonal_(0).max()) < 0.9


def slowly_grouped(similarity: Tensor, size: int) -> list[list[int]]:
    """svd_linear.py:391-450 at ReCalKV ea548d5, case by case."""
    heads = len(similarity)
    groups: list[list[int]] = [[] for _ in range(heads // size)]
    where = [-1] * heads
    edges = sorted(combinations(range(heads), 2), key=lambda pair: float(similarity[pair]), reverse=True)
    for a, b in edges:
        if where[a] < 0 and where[b] < 0:
            at = min(i for i in range(len(groups)) if len(groups[i]) < size)
            groups[at] += [a, b]
            where[a] = where[b] = at
        for mine, other in ((a, b), (b, a)):
            if where[mine] >= 0 > where[other] and len(groups[where[mine]]) < size:
                groups[where[mine]].append(other)
                where[other] = where[mine]
    remaining = [head for head in range(heads) if where[head] < 0]
    for group in groups:
        while len(group) < size and remaining:
            group.append(remaining.pop())
    for group in groups:
        while len(group) > size:
            extra = group.pop()
            next(own for own in groups if len(own) < size).append(extra)
    return groups


@pytest.mark.parametrize(("heads", "size"), [(8, 4), (8, 2), (9, 3), (6, 3), (32, 4), (3, 3), (5, 1)])
def test_groups_are_the_authors(heads: int, size: int) -> None:
    for seed in range(20):
        similarity = drawn(heads, heads, seed=seed).abs()
        found = grouped(similarity, size)
        assert found == slowly_grouped(similarity, size)
        assert sorted(head for group in found for head in group) == list(range(heads))
        assert {len(group) for group in found} == {size}


def test_the_most_alike_heads_share_a_group() -> None:
    similarity = torch.eye(8)
    for rank, (a, b) in enumerate(((0, 5), (5, 7), (2, 7), (1, 3), (3, 4), (4, 6))):
        similarity[a, b] = similarity[b, a] = 0.9 - rank / 10
    assert sorted(map(sorted, grouped(similarity, 4))) == [[0, 2, 5, 7], [1, 3, 4, 6]]


def ovc(weight: Tensor, left: Tensor, right: Tensor, given: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """svd_linear.py:110-124 at ReCalKV ea548d5: L by least squares on the outputs, then R = L^+ W."""
    for _ in range(rounds):
        left = torch.linalg.lstsq(given @ right.T, given @ weight.T).solution.T
        right = torch.linalg.pinv(left) @ weight
    return left, right


def error(weight: Tensor, made: Tensor, given: Tensor) -> float:
    """Relative square error of the outputs."""
    wanted = given @ weight.T
    return float((given @ made.T - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_value_calibration_ends_where_the_basis_begins(rank: int) -> None:
    """From the plain SVD the alternation falls to what the basis has; from the whitened one it does not move."""
    weight, given, held_out = drawn(HEADS * DIM, WIDTH), inputs(4000), inputs(4000, seed=1)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    plain = (u[:, :rank] * root, root[:, None] * vt[:rank])
    own = basis(weight @ whitener(given.T @ given))[:, :rank]
    best = error(weight, own @ own.T @ weight, held_out)
    found = [error(weight, torch.mm(*ovc(weight, *plain, given, rounds)), held_out) for rounds in (0, 1, 3, 30)]
    assert found[0] > 1.02 * found[1] and found[1] >= found[3] * 0.999  # from SVD to OVC
    assert all(best <= one * 1.001 for one in found) and found[3] == pytest.approx(best, rel=2e-2)
    factor = whitener(given.T @ given)
    u, s, vt = torch.linalg.svd(weight @ factor, full_matrices=False)
    root = s[:rank].sqrt()
    whitened = (u[:, :rank] * root, root[:, None] * vt[:rank] @ torch.linalg.inv(factor))
    for rounds in (0, 1, 5):
        left, right = ovc(weight, *whitened, given, rounds)
        torch.testing.assert_close(left @ right, own @ own.T @ weight, atol=1e-6, rtol=1e-6)


def test_the_basis_is_nested_and_leaves_the_least_error() -> None:
    weight, given = drawn(2, DIM, WIDTH), inputs(500)
    moment = given.T @ given
    own = basis(weight @ whitener(moment))
    torch.testing.assert_close(own.transpose(1, 2) @ own, torch.eye(DIM, dtype=torch.float64).expand(2, -1, -1))
    told = lost(own, weight, moment)
    for share, one in zip((1, 2, 3), told.tolist(), strict=True):
        wanted = [given @ part.T for part in weight]
        apart = [x - x @ u[:, :share] @ u[:, :share].T for x, u in zip(wanted, own, strict=True)]
        naive = sum(float(x.square().sum()) for x in apart) / sum(float(x.square().sum()) for x in wanted)
        assert one == pytest.approx(naive, rel=1e-6)
        for seed in range(5):  # and no other basis does better
            other = torch.stack([turned(DIM, seed), turned(DIM, seed + 50)])
            assert float(lost(other, weight, moment)[share - 1]) >= one


@pytest.fixture(scope="module")
def bench(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    small: dict[str, Any] = {"prompts": 20, "lengths": (600, 800), "answer": 4, "budgets": (64,)}
    spec = CalibrationSpec.model_validate({"model": "tiny", "dtype": "float32", "corpora": (str(corpus),), **small})
    return Workbench(spec, tmp_path_factory.mktemp("recalkv"))


def naive_fisher(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Root of the mean square gradient of k_proj and v_proj, a mean for each layer, projection and head."""
    weights = [getattr(layer.self_attn, name).weight for layer in model.model.layers for name in ("k_proj", "v_proj")]
    sums = [torch.zeros_like(weight) for weight in weights]
    for ids in prompts:
        given = torch.tensor([list(ids)])
        for weight in weights:
            weight.requires_grad_(True)
        logits = model(input_ids=given).logits[0, :-1].log_softmax(dim=-1)
        loss = -logits.gather(1, given[0, 1:, None]).mean()
        for total, grad in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += grad.square()
        for weight in weights:
            weight.requires_grad_(False)
    roots = [(total / len(prompts)).sqrt() for total in sums]
    return torch.tensor([[float(root[at : at + 16].mean()) for at in (0, 16)] for root in roots]).view(-1, 2, 2)


def test_a_compilation_finds_fisher_information_and_bases(bench: Workbench) -> None:
    tensors, report = compile_constants(bench, 2)
    bench.loaded.model.set_attn_implementation("eager")
    wanted = naive_fisher(bench.loaded.model, [bench.prompts[at].ids for at in bench.training[:2]])
    bench.loaded.model.set_attn_implementation("kv_policy")
    torch.testing.assert_close(tensors["fisher"], wanted, rtol=1e-3, atol=0)
    shapes = {name: tuple(own.shape) for name, own in tensors.items()}
    assert shapes == {
        "key_order": (4, 2),
        "key_bases": (4, 1, 32, 32),
        "value_bases": (4, 32, 32),
        "key_bias": (4, 32),
        "value_bias": (4, 32),
        "fisher": (4, 2, 2),
    }
    for kind in ("keys", "values"):
        own = report["held_out_error"][kind]
        for share in ("0.25", "0.5", "0.75"):
            assert own[share]["whitened"] < own[share]["svd"]
        assert own["0.75"]["whitened"] < own["0.5"]["whitened"] < own["0.25"]["whitened"] < 1


def test_keys_that_are_no_map_of_the_input_are_refused(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    own = bench.loaded.model.model.layers[1].self_attn
    hook = own.k_proj.register_forward_hook(lambda module, given, out: out * 1.5 if out.shape[1] > 1 else out)
    with pytest.raises(HarnessError, match="does more to them, such as a norm"):
        compile_constants(bench, 1)
    hook.remove()
    monkeypatch.setattr(own, "v_proj", torch.nn.Identity())
    with pytest.raises(HarnessError, match="has no such map of its own in every layer"):
        compile_constants(bench, 1)


def of_kind(kind: str) -> Any:
    """A bench of a random model of 8 KV heads of 8 numbers, whose projections have biases if its kind's do."""
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = AutoConfig.for_model(kind, num_attention_heads=8, num_key_value_heads=8, sliding_window=None, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=2.0)
    draw = torch.Generator().manual_seed(0)
    prompts = [SimpleNamespace(ids=torch.randint(0, 100, (60,), generator=draw).tolist()) for _ in range(6)]
    bar = nullcontext(SimpleNamespace(update=lambda: None))
    places = {"training": [0, 1, 2, 3], "validation": [4, 5], "bar": lambda *given: bar}
    shapes, engine = SimpleNamespace(kv_heads=8), Engine(AttachedModel(model))
    return SimpleNamespace(engine=engine, loaded=SimpleNamespace(model=model), shapes=shapes, prompts=prompts, **places)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_models_of_the_common_kinds_are_compiled(kind: str) -> None:
    bench = of_kind(kind)
    tensors, report = compile_constants(bench, 1)
    assert report["group"] == 4 and tensors["key_bases"].shape == (2, 2, 32, 32)
    assert bool(tensors["key_bias"].any()) == bool(tensors["value_bias"].any()) == (kind == "qwen2")
    view, factors = bench.engine.prefill(bench.prompts[5].ids, Needs(window=1)).view, Factors.of(tensors)
    errors = []
    for keys, values in ((8, 16), (16, 32), (32, 64)):
        off = 0.0
        for at, layer in enumerate(view.layers):
            found = ReCalKV()._encoded(layer, layer.kv, at, (keys, values), factors).load()
            off += sum(
                float((a - b).square().mean()) for a, b in zip(found, (layer.kv.keys, layer.kv.values), strict=True)
            )
        errors.append(off)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9


@pytest.mark.parametrize("kind", ["qwen3", "olmo2"])
def test_a_norm_of_keys_is_refused(kind: str) -> None:
    with pytest.raises(HarnessError, match="needs keys that are k_proj of a layer's input"):
        compile_constants(of_kind(kind), 1)


def test_the_packaged_bases_are_orthogonal_and_small() -> None:
    folder = COMPILED / "recalkv" / "smollm2-135m"
    found = load_constants(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
    for name in ("key_bases", "value_bases"):
        bases = found.tensors[name].double()
        off = bases.mT @ bases - torch.eye(192, dtype=torch.float64)
        assert float(off.abs().max()) < 2e-3  # in half precision
        torch.testing.assert_close(orthonormal(bases).double(), bases, atol=5e-3, rtol=0)
    assert Factors.of(found.tensors).shape == (30, 3, 192, 192)
    policy = make_policy("recalkv").for_model(found.manifest.model_revision)
    assert isinstance(policy, ReCalKV) and policy.compiled == "smollm2-135m" and len(policy.fitted_on()) == 64
    with pytest.raises(PolicyError, match="recalkv has no constants of this model, abc; make some with"):
        make_policy("recalkv").for_model("abc")
    errors = found.manifest.report["held_out_error"]
    assert all(own["whitened"] < own["svd"] for kind in errors.values() for own in kind.values())
