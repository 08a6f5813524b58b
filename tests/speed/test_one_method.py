"""A method by itself: it keeps what it keeps in company, layer by layer, chunk by chunk, and gives memory back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from harness.engine.clock import PhaseClock, StepClock
from harness.engine.engine import Engine
from harness.engine.packed import live_bytes
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.speed.one_method import Isolated
from methods.base import Budget, KVPolicy, LayerView
from methods.coded import CodedPolicy
from methods.compilerkv.form import Form, FormPolicy
from methods.registry import load_methods, make_policy
from tests.speed.conftest import ids

TOKENS, BUDGET, NEW = 90, 20, 6
SHARES = ((1.0, 3.0), (0.5, 1.0), (2.0, 0.2), (1.0, 1.0))
POLICIES: dict[str, KVPolicy] = {
    label: make_policy(label)
    for name, entry in load_methods().items()
    if entry.policy.__module__.startswith("methods.")
    for label in (name, *(f"{name}@{preset}" for preset in entry.presets))
    if name != "q8_0"  # heads of the tiny model fill no block of it
} | {"form": FormPolicy(Form(window=8, kernel=5), SHARES), "global": FormPolicy(Form(window=8, basis="global"))}
every_policy = pytest.mark.parametrize("label", POLICIES)
CHUNKED = [
    (label, chunk)
    for label, policy in POLICIES.items()
    for chunk in ((None,) if policy.needs.hidden_states else (7,) if "@" in label else (None, 7, 64, 89))
]
"""A preset takes the path of its method with other numbers, so one chunk size that no window divides is enough."""


def alone(model: AttachedModel, label: str, chunk: int | None = None) -> Isolated:
    policy = POLICIES[label]
    return Isolated(model, policy, BUDGET if policy.budgeted else None, chunk=chunk)


@pytest.mark.parametrize(("label", "chunk"), CHUNKED)
def test_it_keeps_what_the_engine_keeps(model: AttachedModel, label: str, chunk: int | None) -> None:
    """In chunks that share nothing with the window: keys and scores equal up to rounding, the slots the same."""
    policy = POLICIES[label]
    prefilled = Engine(model, first_token="prefill").prefill(ids(), policy.needs)
    with torch.inference_mode():
        expected = policy.compress(prefilled.view, BUDGET if policy.budgeted else TOKENS)
    found = alone(model, label, chunk).prefill(ids())
    torch.testing.assert_close(found.logits, prefilled.logits, atol=1e-4, rtol=1e-4)
    for kv, other in zip(found.kvs, expected, strict=True):
        assert torch.equal(kv.positions, other.positions)
        for own, wanted in zip(kv.load(), other.load(), strict=True):
            live = kv.positions >= 0
            apart = (own[live] - wanted[live]).abs() > 1e-4 * (1 + wanted[live].abs())
            assert int(apart.sum()) <= apart.numel() * (0.02 if isinstance(policy, CodedPolicy) else 0)  # a code flips
    assert found.layer_bytes == [live_bytes(kv, TOKENS) for kv in expected]


@every_policy
def test_a_batch_decodes_what_each_prompt_decodes_in_the_engine(model: AttachedModel, label: str) -> None:
    policy, runner = POLICIES[label], alone(model, label)
    prompts = [ids(seed=seed) for seed in (3, 4, 5)]
    decoded = runner.decode([runner.prefill(own) for own in prompts], NEW)
    assert len(decoded.step_s) == NEW - 1 and min(decoded.step_s) > 0
    engine = Engine(model, first_token="prefill")
    cell = Cell(policy, Budget(tokens=BUDGET) if policy.budgeted else None)
    for own, tokens in zip(prompts, decoded.tokens, strict=True):
        (outcome,) = engine.run(Prompt(own, TOKENS - 10, [70, 80], Limits(NEW, frozenset())), [cell])
        assert outcome.status == "ok" and list(outcome.token_ids) == tokens


def test_a_layer_gives_its_full_cache_back_before_the_next_one_is_prefilled(model: AttachedModel) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class Watching(FormPolicy):
        def _alone(self, counts: list[int], layer: LayerView) -> object:  # type: ignore[override]
            gc.collect()
            alive.append(sum(ref() is not None for ref in seen))
            seen.append(weakref.ref(layer.kv.keys))
            return super()._alone(counts, layer)

    Isolated(model, Watching(Form(window=8, kernel=5)), BUDGET).prefill(ids())
    assert len(alive) == model.layers and max(alive) <= 1


def test_prompts_of_different_lengths_are_no_batch(model: AttachedModel) -> None:
    runner = alone(model, "snapkv")
    with pytest.raises(ValueError, match=r"prompts of \[50, 90\] tokens; a batch has one length"):
        runner.decode([runner.prefill(ids()), runner.prefill(ids(50))], NEW)


def test_seconds_are_apart(model: AttachedModel) -> None:
    plain, heavy = alone(model, "fullkv").prefill(ids()), alone(model, "h2o").prefill(ids())
    assert plain.prefill_s > 0 and heavy.observe_s > plain.observe_s >= 0 and heavy.compress_s > 0


class FakeEvent:
    """Stands for a CUDA event; time goes on by 1 ms a record."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.at - self.at)


def test_steps_of_a_gpu_are_timed_without_waiting_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    clock = StepClock(torch.device("cuda"))
    for _ in range(4):
        clock.tick()
    assert not waits
    assert clock.seconds() == pytest.approx([0.001] * 3) and len(waits) == 1


def test_a_gpu_is_timed_by_events_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    clock = PhaseClock(torch.device("cuda"))
    with clock.part("all"):
        for _ in range(3):
            with clock.part("observe"):
                pass
    assert not waits
    assert clock.seconds("observe") == pytest.approx(0.003) and clock.seconds("all") == pytest.approx(0.007)
    assert len(waits) == 1 and clock.seconds("other") == 0
