"""HeadKV: SnapKV's tokens, as many as the importance of each head gives it; SnapKV with compiled budgets likewise."""

from pathlib import Path

import pytest
import torch

from harness.contract import GROUP, HEADS, LAYERS
from methods.base import KV, KVPolicy, PolicyError, PromptView, Sizes
from methods.headkv import BETAS, HeadKV
from methods.registry import make_policy
from methods.snapkv import SnapKV
from tests.methods.compiled import live, prompt, saved
from tests.methods.loops import sizes


def authors_capacities(importance: list[float], budget: int, window: int, beta: float) -> list[float]:
    """Slots of each head outside the window, unrounded (snapkv_utils.py:381-389 at HeadKV 0862a09, temp 1)."""
    base = budget - window
    given, score = base // beta, [own / sum(importance) for own in importance]
    return [own * given * len(score) + (base - given) for own in score]


@pytest.mark.parametrize("beta", [1.005, 1.2, 10.0])
def test_a_head_has_the_slots_of_the_authors_rule_and_snapkvs_best_tokens(tmp_path: Path, beta: float) -> None:
    importance = saved(tmp_path, prompts=("a" * 64,)).importance.flatten().tolist()
    policy = HeadKV(recent=4, kernel=5, tables=str(tmp_path), beta=beta)
    view = prompt(90)
    kept = held_to_snapkv(policy, SnapKV(recent=4, kernel=5), view, 24)
    counts = [count for kv in kept for count in kv.live[0].tolist()]
    theirs = authors_capacities(importance, 24, 4, beta)
    assert counts == pytest.approx([4 + own for own in theirs], abs=2)  # they floor the pool by up to a slot a head
    assert sum(counts) == 24 * LAYERS * HEADS
    assert policy.fitted_on() == {"a" * 64} and policy.provenance().keys() == {"tables_sha256"}
    assert policy.for_model("r1") == policy
    with pytest.raises(PolicyError, match="tables .* are of some"):
        policy.for_model("r2")


def test_what_a_head_has_no_room_for_goes_to_the_others(tmp_path: Path) -> None:
    saved(tmp_path)
    policy = HeadKV(recent=4, tables=str(tmp_path), beta=BETAS[0])
    counts = [own for layer in live(policy, prompt(30), 27) for own in layer]
    assert max(counts) == 30 and sum(counts) == 27 * LAYERS * HEADS


def test_snapkv_takes_compiled_budgets_too(tmp_path: Path) -> None:
    tables = saved(tmp_path)
    policy = make_policy("snapkv@compiled", {"recent": 4, "tables": str(tmp_path)})
    kept = held_to_snapkv(policy, SnapKV(recent=4), prompt(60), 16)
    for kv, shares in zip(kept, tables.budget[0], strict=True):
        assert kv.live[0].tolist() == pytest.approx((4 + 12 * shares).tolist(), abs=1)
    assert policy.provenance() == {"tables_sha256": tables.manifest.tensors_sha256}
    plain = make_policy("snapkv")
    assert plain.for_model("r1") == plain and plain.provenance() == {} and plain.fitted_on() == frozenset()


@pytest.mark.parametrize("label", ["headkv", "snapkv@compiled"])
def test_without_tables_the_budgets_are_even_and_it_says_so(label: str) -> None:
    policy = make_policy(label).for_model("unknown")
    assert live(policy, prompt(60), 40) == [[40] * HEADS] * LAYERS
    assert policy.notes(40, sizes(60, LAYERS)) == ("no tables for this model: uniform budgets",)


@pytest.mark.parametrize("label", ["snapkv", "pyramidkv", "headkv", "dynamickv"])
def test_methods_that_their_authors_store_per_query_head_say_what_that_costs(label: str) -> None:
    told = make_policy(label).notes(40, Sizes(60, LAYERS, HEADS * GROUP, HEADS))
    assert told[0] == f"its authors' code stores slots per query head: {GROUP} times these bytes"
    assert not any("query head" in note for note in make_policy(label).notes(40, sizes(60, LAYERS)))


def held_to_snapkv(policy: KVPolicy, plain: SnapKV, view: PromptView, budget: int) -> list[KV]:
    """What `policy` keeps; every head's are the best that `plain` chooses at that head's own budget."""
    kept = policy.compress(view, budget)
    for kv, seen in zip(kept, view.layers, strict=True):
        for head, count in enumerate(kv.live[0].tolist()):
            own = kv.positions[0, head]
            assert torch.equal(own[own >= 0], plain.select(seen, count)[0, head])
    return kept
