"""Probes of KVzap, compiled for the tiny model: they tell scores of prompts that they were not made from."""

from pathlib import Path

import pytest
import torch

from harness.compiler import kvzap
from harness.compiler.asked import CalibrationSpec
from harness.compiler.stage import Workbench
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from methods.artefact import Constants, ConstantsManifest, save_constants
from methods.base import Budget
from methods.kvzap_probe import logits, names
from methods.registry import make_policy
from methods.repeat import repeated


@pytest.fixture(scope="module")
def bench(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    given = {"model": "tiny", "dtype": "float32", "device": "cpu", "corpora": (str(corpus),)}
    spec = CalibrationSpec(**given, prompts=20, lengths=(700, 900), budgets=(64,))  # type: ignore[arg-type]
    return Workbench(spec, tmp_path_factory.mktemp("out"))


def test_probes_tell_scores_that_they_never_saw(bench: Workbench, tmp_path: Path) -> None:
    constants, report = kvzap.compile_constants(bench, 4)
    assert list(constants) == [*names("linear"), *names("mlp")]
    assert constants["mlp.up.weight"].shape == (4, 8, 64) and constants["linear.linear.bias"].shape == (4, 2)
    assert report["training_tokens"] == 256 * len(bench.training) and report["epochs"] == 4
    own = report["correlation_of_layers"]
    assert all(report["correlation"][probe] > 0.4 and len(own[probe]) == 4 for probe in ("linear", "mlp"))

    at = bench.validation[0]
    view = bench.engine.prefill(bench.prompts[at].ids, kvzap.NEEDS).view
    layer, told = view.layers[1], {name: x[1:2].float() for name, x in constants.items()}
    span = slice(repeated(layer, kvzap.PLUS).start, repeated(layer, kvzap.PLUS).end)
    true = repeated(layer, kvzap.PLUS).received.amax(dim=2)[0, :, span].log()
    assert layer.source is not None
    found = logits(layer.source.hidden[:, span], told, "linear")[0].t()
    for pair in zip(found, true, strict=True):
        assert float(torch.corrcoef(torch.stack(pair))[0, 1]) > 0.2

    revision = bench.loaded.spec.revision
    told_of = {"model": "tiny", "model_revision": revision, "corpus": "made", "prompts": (), "seed": 0}
    save_constants(Constants(ConstantsManifest(method="kvzap", **told_of), constants), tmp_path)  # type: ignore[arg-type]
    policy = make_policy("kvzap", {"compiled": str(tmp_path)}).for_model(revision)
    engine = Engine(AttachedModel(bench.loaded.model, bench.loaded.wording))
    ids = bench.prompts[at].ids
    (outcome,) = engine.run(Prompt(ids, len(ids), (), Limits(2, frozenset())), [Cell(policy, Budget(tokens=64))])
    assert (outcome.status, sum(outcome.kept_slots)) == ("ok", 64 * 4 * 2)
    assert policy.method_bytes == sum(x.nbytes for x in constants.values())


def test_the_linear_probe_is_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(2, 400, 6, generator=draw), torch.randn(2, 6, 3, generator=draw)
    made = kvzap._ridge(hidden, hidden @ weights + 5)
    assert torch.allclose(made["linear.linear.weight"].float(), weights.transpose(1, 2), atol=2e-2)
    assert torch.allclose(made["linear.linear.bias"].float(), torch.full((2, 3), 5.0), atol=2e-2)
