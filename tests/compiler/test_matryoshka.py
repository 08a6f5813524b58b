"""MatryoshkaKV's constants on the tiny model: PCA, the Cayley turn, the order in which ranks fall."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from harness.compiler import matryoshka
from harness.compiler.asked import CompileSpec
from harness.compiler.matryoshka import Training, compile_constants, moments
from harness.compiler.projected import LEVELS, SEEN, Bases, Projected, losses
from harness.compiler.ranks import LADDER_TOKENS, levels_at
from harness.compiler.rollouts import Rollout
from harness.compiler.stage import Workbench
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel

STEPS = 30


@pytest.fixture(scope="module")
def bench(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    small = {"prompts": 20, "lengths": (600, 800), "answer": 4, "budgets": (64,)}
    fixed = {"model": "tiny", "dtype": "float32", "device": "cpu", "corpora": (str(corpus),)}
    return Workbench(CompileSpec.model_validate({**fixed, **small}), tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def compiled(bench: Workbench) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matryoshka, "RATE", 1e-2)
        return compile_constants(bench, STEPS)


def bases(tensors: dict[str, Tensor], kind: str) -> Bases:
    keys, values = (tensors[f"{kind}_{name}"].float() for name in ("keys", "values"))
    return Bases(keys, values, tensors[f"{kind}_key_mean"], tensors[f"{kind}_value_mean"])


def test_kept_energy_is_the_sum_of_the_highest_eigenvalues(bench: Workbench, compiled: Any) -> None:
    tensors, _ = compiled
    views = [bench.engine.prefill(bench.prompts[at].ids, SEEN).view for at in bench.training]
    for layer in range(4):
        x = (
            torch.cat([view.layers[layer].kv.keys[0] for view in views], dim=1)
            - tensors["pca_key_mean"][layer][:, None]
        )
        for rank in (1, 6, 16):
            kept = (x.float() @ tensors["pca_keys"][layer].float()[:, :, :rank]).square().sum(dim=2).mean(dim=1)
            torch.testing.assert_close(kept, tensors["key_energy"][layer, :, :rank].sum(dim=1), rtol=3e-3, atol=1e-4)


def test_trained_bases_are_orthogonal_and_no_longer_those_of_pca(compiled: Any) -> None:
    tensors, _ = compiled
    for name in ("pca_keys", "pca_values", "trained_keys", "trained_values"):
        own = tensors[name].float()
        torch.testing.assert_close(own.mT @ own, torch.eye(16).expand_as(own), rtol=0, atol=3e-3)
    assert (tensors["trained_keys"] - tensors["pca_keys"]).abs().max() > 0.05


def test_at_full_rank_any_basis_gives_the_full_caches_answer(bench: Workbench, compiled: Any) -> None:
    rollout = matryoshka.piece(bench, bench.validation, 0)
    for kind in ("pca", "trained"):
        own = bases(compiled[0], kind)
        assert losses(rollout, own, [own.full()])[0].item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Gemma2"])
def test_full_rank_is_exact_on_other_models_too(kind: str) -> None:
    """Sliding windows, biases of keys and a soft cap, which what the mean adds to a logit goes through."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    window = 16 if kind == "Gemma2" else None
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, sliding_window=window, pad_token_id=0)
    engine = Engine(AttachedModel(getattr(transformers, f"{kind}ForCausalLM")(config).eval()))
    ids = torch.randint(1, 96, (40,)).tolist()
    rollout = Rollout(engine, ids[:30], ids[30:], SEEN)
    shape = len(rollout.compressible), 2, 16
    columns = [torch.linalg.qr(torch.randn(*shape, 16)).Q for _ in range(2)]
    own = Bases(*columns, torch.randn(shape) * 2, torch.randn(shape))
    full, half = own.full(), own.full() // 2
    found = losses(rollout, own, [full, half])[0].tolist()
    assert found[0] == pytest.approx(0, abs=1e-4) and found[1] > 0.01


def test_training_lowers_the_loss_at_half_the_rank_on_other_prompts(bench: Workbench, compiled: Any) -> None:
    for share in ("0.5", "0.5 alike"):
        trained, pca = (compiled[1][kind][share] for kind in ("trained", "pca"))
        assert 0.25 * trained[0] + 0.75 * trained[1] < 0.25 * pca[0] + 0.75 * pca[1]


def test_hidden_states_are_those_the_head_turns_into_logits(bench: Workbench, compiled: Any) -> None:
    own = bases(compiled[0], "pca")
    seen = Projected(matryoshka.piece(bench, bench.validation, 1), own)
    levels = torch.stack([own.full(), own.full() // 2])
    logits = bench.loaded.model.lm_head(seen.hidden(levels)).log_softmax(dim=-1)
    torch.testing.assert_close(logits, seen.logprobs(levels), rtol=1e-4, atol=1e-4)


def test_ranks_fall_to_an_eighth_and_a_share_takes_the_fewest_falls(compiled: Any) -> None:
    tensors, _ = compiled
    own, order = bases(tensors, "pca"), tensors["order"].long()
    assert torch.equal(order.bincount(), torch.full((16,), LEVELS - 1))
    assert torch.equal(levels_at(own, order, 1.0), own.full()) and bool((levels_at(own, order, 1 / LEVELS) == 1).all())
    assert (
        levels_at(own, order, 0.5).sum() == 16 * LEVELS // 2 and levels_at(own, order, 0.501).float().mean() > 4 - 1e-6
    )


def test_the_first_rank_to_fall_is_the_one_whose_fall_changes_least(bench: Workbench, compiled: Any) -> None:
    own = bases(compiled[0], "trained")
    prompts = [bench.prompts[at] for at in bench.training[:5]]
    changes = torch.zeros(16)
    for one in prompts:
        seen = Projected(Rollout(bench.engine, one.ids, one.answer[:LADDER_TOKENS], SEEN), own)
        full = seen.hidden(own.full()[None])
        for item in range(16):
            levels = own.full()
            levels.view(-1)[item] -= 1
            changes[item] += (seen.hidden(levels[None]) - full).norm() ** 2 / full.norm() ** 2
    assert compiled[0]["order"][0] == changes.argmin()


def test_a_training_goes_on_where_it_stopped(bench: Workbench) -> None:
    found = moments(bench, bench.training[:4])
    columns = [matryoshka.decomposed(own)[1] for own in found[2:]]
    pca, rollout = Bases(*columns, *(own.float() for own in found[:2])), matryoshka.piece(bench, bench.training, 0)

    def run(training: Training, count: int) -> Training:
        for _ in range(count):
            training.step(rollout, torch.Generator().manual_seed(len(training.losses)))
        return training

    whole = run(Training(pca, 4), 4)
    again = run(Training(pca, 4).at(run(Training(pca, 4), 2).state()), 2)
    assert again.losses == whole.losses and torch.equal(again.bases().keys, whole.bases().keys)
