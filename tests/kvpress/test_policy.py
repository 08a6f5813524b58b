"""Presses of kvpress under our budgets: their labels, the search for a ratio, the slots they leave, what is refused."""

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from itertools import product
from unittest.mock import Mock

import pytest
import torch

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.errors import HarnessError
from harness.kvpress.label import PressCall, parse_press
from harness.kvpress.policy import fit
from harness.kvpress.slots import Tracked, rows
from harness.models.load import LoadedModel, load_model
from harness.plan.sweep import plan_methods
from harness.records.spec import Sweep
from methods.base import KV, Budget, Needs, PolicyError
from methods.label import MethodLabel
from methods.registry import make_policy
from methods.views import POSITION_BYTES

TOKENS, BUDGET, LAYERS, HEADS = 600, 128, 4, 2
needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed")

EXACT = [
    *("CURPress", "CapPress", "CompactorPress", "ExpectedAttentionPress(epsilon=0.01)", "KeyDiffPress", "KnormPress"),
    *("LagKVPress", "LeverageScorePress", "NonCausalAttnPress", "ObservedAttentionPress", "PyramidKVPress"),
    *("RandomPress(seed=3)", "SnapKVPress(window_size=32, kernel_size=7)", "StreamingLLMPress(n_sink=8)", "TOVAPress"),
    *("AdaKVPress(SnapKVPress)", "AdaKVPress(ExpectedAttentionPress(epsilon=0.01), alpha_safeguard=0.0)"),
    *("BlockPress(KnormPress())", "ComposedPress([KnormPress, SnapKVPress(window_size=16)])"),
    *("CriticalAdaKVPress(SnapKVPress)", "CriticalKVPress(KnormPress)", "EntropyGatedChunkKVPress(SnapKVPress())"),
    *("KeyRerotationPress(press=KnormPress())", "MergingPress(KnormPress)"),
]
COARSE = {"ChunkKVPress(SnapKVPress)": 120, "ChunkPress(KnormPress(), chunk_length=100)": 126}  # whole chunks
CHANGED = {"KeyRerotationPress", "MergingPress"}  # whose slots are not the bits of the cache


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(AttachedModel(load_model("tiny", dtype="float32", device="cpu").model))


def prompt(tokens: int = TOKENS) -> Prompt:
    ids = torch.randint(5, 200, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    return Prompt(ids, tokens, (5, 6), Limits(max_new_tokens=3, eos_ids=frozenset()), needle=tuple(range(100, 110)))


def run(engine: Engine, press: str, budget: int = BUDGET) -> Outcome:
    return engine.run(prompt(), [Cell(make_policy(f"kvpress:{press}"), Budget(tokens=budget))])[0]


def left(engine: Engine, press: str, budget: int = BUDGET) -> tuple[list[KV], list[KV]]:
    """What the press leaves, and the whole cache."""
    policy = make_policy(f"kvpress:{press}")
    view = engine.prefill(prompt().ids, policy.needs).view
    with torch.inference_mode():
        return policy.compress(view, budget), [layer.kv for layer in view.layers]


@needs_kvpress
@pytest.mark.parametrize("press", [*EXACT, *COARSE])
def test_a_press_keeps_just_the_bytes_that_were_asked_for(engine: Engine, press: str) -> None:
    outcome = run(engine, press)
    assert (outcome.status, outcome.error) == ("ok", None)
    assert outcome.kv_bytes == sum(outcome.kept_slots) * (2 * 16 * 4 + POSITION_BYTES) and not outcome.over_budget
    if press in COARSE:
        assert outcome.kept_slots == (COARSE[press] * HEADS,) * LAYERS
    else:
        assert sum(outcome.kept_slots) == BUDGET * LAYERS * HEADS and outcome.kv_bytes == outcome.asked_bytes


@needs_kvpress
@pytest.mark.parametrize("press", [*EXACT, *COARSE])
def test_every_slot_is_the_token_that_it_is_said_to_be(engine: Engine, press: str) -> None:
    kept, whole = left(engine, press)
    for (own, full), head in product(zip(kept, whole, strict=True), range(HEADS)):
        live = own.positions[0, head][own.positions[0, head] >= 0]
        assert live.tolist() == sorted(set(live.tolist())) and int(live.max()) < TOKENS
        if press.partition("(")[0] not in CHANGED:
            assert torch.equal(own.keys[0, head, : len(live)], full.keys[0, head, live])
            assert torch.equal(own.values[0, head, : len(live)], full.values[0, head, live])


@needs_kvpress
def test_masked_keys_are_really_dropped_head_by_head(engine: Engine) -> None:
    kept, whole = left(engine, "AdaKVPress(SnapKVPress)")
    live = torch.stack([kv.live[0] for kv in kept])
    assert live.sum(dim=1).tolist() == [BUDGET * HEADS] * LAYERS and len(live.unique()) > 2
    assert sum(kv.nbytes for kv in kept) * TOKENS == sum(kv.nbytes for kv in whole) * BUDGET
    assert make_policy("kvpress:AdaKVPress(SnapKVPress)").memory == "physical"


@needs_kvpress
def test_turned_keys_and_merged_values_are_kept_as_the_press_left_them(engine: Engine) -> None:
    turned, _ = left(engine, "KeyRerotationPress(KnormPress)")
    plain, _ = left(engine, "KnormPress")
    for a, b in zip(turned, plain, strict=True):
        assert torch.equal(a.positions, b.positions) and torch.equal(a.values, b.values)
        assert not torch.equal(a.keys, b.keys)
        torch.testing.assert_close(*(x.keys.unflatten(-1, (2, -1)).norm(dim=-2) for x in (a, b)))  # a rotation
    merged, _ = left(engine, "MergingPress(KnormPress)")
    assert torch.equal(merged[1].positions, plain[1].positions)
    assert not torch.equal(merged[1].values, plain[1].values)


@needs_kvpress
def test_zeroed_channels_are_simulated_at_their_full_bytes(engine: Engine) -> None:
    label = "ThinKPress(key_channel_compression_ratio=0.5)"
    outcome = run(engine, label)
    assert make_policy(f"kvpress:{label}").memory == "simulated"
    assert outcome.kv_bytes == outcome.full_bytes and outcome.over_budget
    assert any(note.startswith("simulated: ThinKPress zeroes") for note in outcome.notes)
    kept, whole = left(engine, label)
    assert (kept[0].keys == 0).float().mean() == 0.5 and torch.equal(kept[0].values, whole[0].values)
    assert not (whole[0].keys == 0).any()  # the press had a copy


@needs_kvpress
def test_a_press_without_a_ratio_runs_as_given_and_says_so(engine: Engine) -> None:
    outcome = run(engine, "PerLayerCompressionPress(KnormPress, [0.5, 0.5, 0.5, 0.9])")
    assert outcome.kept_slots[:3] == (2 * TOKENS // 2,) * 3 and outcome.over_budget
    assert any("takes no ratio" in note for note in outcome.notes)
    assert run(engine, "SimLayerKVPress(lazy_threshold=0.0, n_recent=60)").kept_slots == (63 * HEADS,) * LAYERS


@needs_kvpress
def test_a_press_changes_nothing_of_the_model_and_of_the_draws(engine: Engine) -> None:
    before = [name for name, _ in engine.model.model.named_modules()]
    state = torch.get_rng_state()
    first = run(engine, "RandomPress")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = run(engine, "RandomPress")
    assert (first.token_ids, first.needle_kept) == (second.token_ids, second.needle_kept)
    assert [name for name, _ in engine.model.model.named_modules()] == before


@needs_kvpress
@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("KnormPres", "unknown press 'KnormPres'; did you mean 'KnormPress'?"),
        ("SnapKVPress(window=8)", "no parameter 'window'; did you mean 'window_size'?"),
        ("KnormPress(compression_ratio=0.5)", "the budget decides compression_ratio"),
        ("AdaKVPress(KnormPress(0.5))", "the budget decides compression_ratio"),
        ("AdaKVPress", "refused by kvpress"),
        ("AdaKVPress(KnormPress, alpha_safeguard=2)", "alpha_safeguard should be in"),
        ("ScorerPress", "unknown press"),
        ("KVzipPress", "runs the prompt again or acts while decoding"),
        ("DMSPress(KnormPress, threshold=0.1, decoding=True)", "acts while decoding"),
    ],
)
def test_a_press_that_cannot_run_is_refused_in_one_line(label: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(f"kvpress:{label}")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@needs_kvpress
def test_a_run_names_the_press_and_every_parameter() -> None:
    label = "kvpress:AdaKVPress(ExpectedAttentionPress(epsilon=0.01))"
    [(spec, policy)] = plan_methods(Sweep(methods=(label,), tasks=("niah",)))
    assert (spec.label, spec.name, spec.budgeted) == (label, "kvpress:AdaKVPress", True)
    assert policy.press == "AdaKVPress(ExpectedAttentionPress(epsilon=0.01))"
    inner = spec.params["parameters"]["AdaKVPress"]["press"]["ExpectedAttentionPress"]
    assert (inner["epsilon"], inner["n_future_positions"], "compression_ratio" in inner) == (0.01, 512, False)
    with pytest.raises(HarnessError, match="takes its parameters in its label"):
        plan_methods(Sweep(methods=("kvpress:KnormPress",), tasks=("niah",), set={"kvpress:KnormPress.x": 1}))


def test_kvpress_missing_or_beside_another_transformers_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.kvpress.label.version", Mock(side_effect=PackageNotFoundError("kvpress")))
    with pytest.raises(PolicyError, match="kvpress is not installed; .*pip install"):
        make_policy("kvpress:KnormPress")
    monkeypatch.setattr("harness.kvpress.label.version", {"kvpress": "0.5.5", "transformers": "5.23.0"}.get)
    with pytest.raises(PolicyError, match=r"needs transformers < 5.3, this is 5.23.0; .*pip install"):
        make_policy("kvpress:KnormPress")
    with pytest.raises(PolicyError, match="unknown prefix 'kvpres'; did you mean 'kvpress'"):
        make_policy("kvpres:KnormPress")


def test_a_label_is_names_and_literals() -> None:
    text = "AdaKVPress(SnapKVPress(window_size=8), alpha_safeguard=-0.1, names=['a', None])"
    call = parse_press(f"  {text} ")
    assert call.args == (PressCall("SnapKVPress", (), (("window_size", 8),)),)
    assert call.keywords == (("alpha_safeguard", -0.1), ("names", ["a", None]))
    assert str(call) == text and parse_press(str(call)) == call
    assert str(parse_press("KnormPress()")) == "KnormPress"
    assert MethodLabel.parse(f"kvpress:{text}").name == "kvpress:AdaKVPress"


@pytest.mark.parametrize(
    "text", ["", "3", "a.b", "a.b()", "f(x=1+y)", "f(**{'a': 1})", "f(", "f(lambda: 1)", "[f for f in g]", "f(a.b)"]
)
def test_a_label_that_is_code_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="write kvpress:NAME"):
        parse_press(text)


@pytest.mark.parametrize(("step", "rounding"), [(1, int), (1, round), (4, round), (20, int)])
@pytest.mark.parametrize(("tokens", "share"), [(100, 0.02), (777, 0.77), (1023, 0.3), (3000, 0.5), (3000, 0.95)])
def test_the_search_meets_the_budget_and_is_never_above_it(
    tokens: int, share: float, step: int, rounding: type[int]
) -> None:
    budget = max(step, int(tokens * share))

    def act(ratio: float | None) -> list[KV]:
        assert ratio is not None and 0 <= ratio < 1
        kept = min(tokens, max(1, rounding(tokens * (1 - ratio) / step)) * step)
        return [KV(*[torch.zeros(1, 2, kept, 1)] * 2, torch.arange(kept).expand(1, 2, kept))] * 3

    kept = int(fit(act, budget, tokens)[0].live[0, 0])
    assert budget - step < kept <= budget


def test_slots_are_followed_through_gathers_or_found_by_their_bits() -> None:
    keys = torch.randn(1, 2, 30, 4)
    keys[:, :, 7] = keys[:, :, 9]
    whole = KV(keys.clone(), keys.clone(), torch.arange(30).expand(1, 2, 30))
    first, second = torch.tensor([9, 7, 3, 20]).expand(1, 2, 4), torch.tensor([2, 0]).expand(1, 2, 2)
    with Tracked(keys) as tracked:
        some = keys.gather(2, first.unsqueeze(-1).expand(-1, -1, -1, 4)).contiguous()
        fewer = some.gather(2, second.unsqueeze(-1).expand(-1, -1, -1, 4))
    cut = torch.cat([keys[:, :, :4], keys[:, :, 20:]], dim=2)
    for some, expected in ((fewer, [3, 9]), (cut, [*range(4), *range(20, 30)])):
        found = tracked.positions(some, some, whole)
        assert found is not None and found.tolist() == [[expected] * 2]
    assert rows(keys[:, :, 7:8], whole.keys) is None  # two tokens have these bits
    assert rows(keys[:, :, :2] + 1, whole.keys) is None


def test_hidden_states_are_those_that_keys_come_from(engine: Engine, tiny: LoadedModel) -> None:
    view = engine.prefill(prompt(40).ids, Needs(hidden_states=True)).view
    for layer in view.layers:
        source = layer.source
        assert source is not None and source.rope is not None and source.model is engine.model.model
        keys = source.module.k_proj(source.hidden).view(1, 40, HEADS, 16).transpose(1, 2)  # type: ignore[operator]
        cos, sin = (x.unsqueeze(1) for x in source.rope)
        turned = keys * cos + torch.cat([-keys[..., 8:], keys[..., :8]], dim=-1) * sin
        torch.testing.assert_close(turned, layer.kv.keys)
    assert all(layer.source is None for layer in engine.prefill(prompt(40).ids, Needs()).view.layers)
    assert Needs(hidden_states=True) | Needs(window=4) == Needs(window=4, hidden_states=True)
    assert not any(module._forward_pre_hooks for module in engine.model.attention)
