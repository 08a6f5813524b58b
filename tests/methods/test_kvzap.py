"""KVzap: its probes and what is kept by them, against plain loops, and the constants that come with the package."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.contract import HEADS, LAYERS, make_view
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.models.load import LoadedModel
from methods.artefact import COMPILED, Constants, ConstantsManifest, load_constants, save_constants
from methods.base import Needs, PolicyError, PromptView
from methods.kvzap import KVzap
from methods.kvzap_probe import logits, names
from methods.registry import make_policy
from methods.views import LayerSource
from tests.methods.loops import positions
from tests.methods.test_kvzip import naive

WIDTH, INNER = 6, 4


def constants(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, WIDTH), (HEADS,), (INNER, WIDTH), (INNER,), (HEADS, INNER), (HEADS,)]
    drawn = [torch.randn(LAYERS, *shape, generator=draw).half() for shape in shapes]
    return dict(zip([*names("linear"), *names("mlp")], drawn, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    told = {"model": "some", "model_revision": "r1", "corpus": "none", "prompts": ("a",), "seed": 0}
    save_constants(Constants(ConstantsManifest(method="kvzap", **told), constants()), tmp_path)  # type: ignore[arg-type]
    return tmp_path


def view_of(tokens: int) -> PromptView:
    view = make_view(tokens, Needs())
    draw = torch.Generator().manual_seed(tokens)
    for layer in view.layers:
        hidden = torch.randn(1, tokens, WIDTH, generator=draw)
        layer.source = LayerSource(torch.nn.Module(), torch.nn.Module(), hidden, None)
    return view


def naive_probe(hidden: list[float], own: dict[str, Any], probe: str, head: int) -> float:
    """One layer's prediction of one token for one KV head."""

    def linear(x: list[float], part: str, row: int) -> float:
        weights = own[f"{probe}.{part}.weight"][row]
        return sum(a * b for a, b in zip(x, weights, strict=True)) + own[f"{probe}.{part}.bias"][row]

    if probe == "linear":
        return linear(hidden, "linear", head)
    inner = [linear(hidden, "up", row) for row in range(INNER)]
    return linear([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in inner], "down", head)


def naive_scores(view: PromptView, probe: str) -> list[list[list[float]]]:
    found = []
    for at, layer in enumerate(view.layers):
        own = {name: x[at].float().tolist() for name, x in constants().items()}
        assert layer.source is not None
        rows = layer.source.hidden[0].tolist()
        found.append([[naive_probe(row, own, probe, head) for row in rows] for head in range(HEADS)])
    return found


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_probes_are_the_loops(probe: Any) -> None:
    view = view_of(9)
    hidden = torch.cat([layer.source.hidden for layer in view.layers if layer.source is not None])
    found = logits(hidden, {name: x.float() for name, x in constants().items()}, probe).transpose(1, 2)
    assert torch.allclose(found, torch.tensor(naive_scores(view, probe)), atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "share", "ends"), [("", "model", True), ("@linear", "model", True), ("@kvpress", "head", False)]
)
def test_what_is_kept_is_what_the_loop_keeps(folder: Path, preset: str, share: str, ends: bool) -> None:
    policy = make_policy(f"kvzap{preset}", {"compiled": str(folder)}).for_model("r1")
    assert isinstance(policy, KVzap)
    for tokens, budget in ((60, 11), (60, 40), (90, 59)):
        view = view_of(tokens)
        recent = min(128, budget // 2) if ends else 0
        expected = naive(naive_scores(view, policy.probe), budget, 4 if ends else 0, tokens - recent, share)
        assert [positions(kv) for kv in policy.compress(view, budget)] == expected


def test_a_threshold_finds_its_own_budget(folder: Path) -> None:
    policy = make_policy("kvzap@threshold", {"compiled": str(folder), "threshold": 0.5, "recent": 5}).for_model("r1")
    view = view_of(60)
    scores = naive_scores(view, "mlp")
    kept = [positions(kv) for kv in policy.compress(view, 60)]
    assert policy.kind == "own" and make_policy("kvzap").kind == "budgeted"
    assert kept == [[[t for t in range(60) if row[t] >= 0.5 or t < 4 or t >= 55] for row in layer] for layer in scores]
    assert len({len(head) for layer in kept for head in layer}) > 2
    everything = make_policy("kvzap@threshold", {"compiled": str(folder), "threshold": -1e6})
    assert all(kv.live.tolist() == [[60] * HEADS] for kv in everything.compress(view, 60))


def test_without_constants_it_says_that_it_knows_nothing() -> None:
    policy = make_policy("kvzap")
    assert policy.needs == Needs() and "no constants" in policy.lacks
    assert policy.notes(16, make_view(9, Needs()).sizes) == (policy.lacks,)
    kept = [positions(kv) for kv in policy.compress(make_view(60, Needs()), 20)]
    assert kept == [[[*range(4), *range(44, 60)]] * HEADS] * LAYERS


def test_hidden_states_must_be_observed(folder: Path) -> None:
    policy = make_policy("kvzap", {"compiled": str(folder)})
    assert policy.needs == Needs(hidden_states=True)
    with pytest.raises(PolicyError, match="kvzap needs hidden states, which were not observed"):
        policy.compress(make_view(60, Needs()), 20)


def test_constants_of_another_model_are_refused(folder: Path) -> None:
    with pytest.raises(PolicyError, match="this model is other"):
        make_policy("kvzap", {"compiled": str(folder)}).for_model("other")
    with pytest.raises(PolicyError, match=r"kvzap has no constants of this model.*harness compile kvzap"):
        make_policy("kvzap").for_model("other")


def test_the_packaged_probes_are_those_of_the_packaged_model(smollm2: LoadedModel) -> None:
    policy = make_policy("kvzap").for_model(smollm2.spec.revision)
    assert isinstance(policy, KVzap) and (policy.compiled, policy.lacks) == ("smollm2-135m", "")
    assert len(policy.fitted_on()) == 40 and policy.method_bytes < 3_000_000
    told = load_constants(COMPILED / "kvzap" / "smollm2-135m").manifest.report["correlation"]
    assert told["mlp"] > told["linear"] > 0.7
    engine = Engine(AttachedModel(copy.deepcopy(smollm2.model), smollm2.wording))
    ids = smollm2.tokenizer("One two three, and the quick brown fox. " * 6).input_ids
    kept = policy.compress(engine.prefill(ids, policy.needs).view, 20)
    assert sum(int(kv.live.sum()) for kv in kept) == 20 * 30 * 3
    assert len({int(n) for kv in kept for n in kv.live[0]}) > 5
