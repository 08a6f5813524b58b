"""HeadKV-style budgets: SnapKV's tokens, as many as the retrieval table gives each head."""

from pathlib import Path

import pytest
import torch

from harness.contract import HEADS, LAYERS
from methods.base import PolicyError
from methods.headkv import HeadKV
from methods.registry import make_policy
from methods.snapkv import SnapKV
from tests.methods.compiled import live, prompt, saved
from tests.methods.loops import sizes


def test_a_head_has_the_slots_of_its_table_and_snapkvs_best_tokens(tmp_path: Path) -> None:
    shares = saved(tmp_path, prompts=("a" * 64,)).retrieval
    view, policy = prompt(60), HeadKV(recent=4, kernel=5, tables=str(tmp_path))
    kept = policy.compress(view, 16)
    assert sum(int(kv.live.sum()) for kv in kept) == 16 * LAYERS * HEADS
    for layer, (kv, seen) in enumerate(zip(kept, view.layers, strict=True)):
        assert kv.live[0].tolist() == pytest.approx((4 + 12 * shares[0, layer]).tolist(), abs=1)
        for head, count in enumerate(kv.live[0].tolist()):
            plain = SnapKV(recent=4, kernel=5).select(seen, count)[0, head]
            assert torch.equal(kv.positions[0, head][kv.positions[0, head] >= 0], plain)
    assert policy.fitted_on() == {"a" * 64} and policy.provenance().keys() == {"tables_sha256"}
    assert policy.for_model("r1") == policy
    with pytest.raises(PolicyError, match="tables .* are of some"):
        policy.for_model("r2")


def test_without_tables_the_budgets_are_even_and_it_says_so() -> None:
    policy = make_policy("headkv").for_model("unknown")
    assert live(policy, prompt(60), 40) == [[40] * HEADS] * LAYERS
    assert "no tables for this model" in policy.notes(40, sizes(60, LAYERS))[0]
