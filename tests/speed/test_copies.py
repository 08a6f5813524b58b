"""Batches of copies: own storage, what each of them decodes, and heads that stay ragged."""

import pytest
import torch

from harness.engine.packed import Packed, storage_bytes, tensors_of
from harness.engine.row_cache import GrowingRows
from harness.engine.transformers_seam import AttachedModel
from harness.records.measured import ProbeSpec
from harness.speed.copies import SHARE, copied
from harness.speed.measure import draw_prompts, run_round
from harness.speed.one_method import Isolated
from methods.registry import make_policy
from tests.speed.conftest import ids


@pytest.mark.parametrize("label", ["fullkv", "snapkv", "quant@int8", "tova", "streamingllm"])
def test_a_copy_decodes_the_same_in_storage_of_its_own(model: AttachedModel, label: str) -> None:
    policy = make_policy(label)
    runner = Isolated(model, policy, 20 if policy.budgeted else None)
    one = runner.prefill(ids())
    other = copied(one, seed=0)
    own, held = ([x for layer in prompt.layers for x in tensors_of(layer)] for prompt in (one, other))
    assert storage_bytes(own + held) == storage_bytes(own) + storage_bytes(held) == 2 * storage_bytes(own)
    first, second = runner.decode([one, other], 6).tokens
    assert first == second


def test_heads_of_a_copy_stay_ragged(model: AttachedModel) -> None:
    one = Isolated(model, make_policy("adakv"), 40).prefill(ids())
    copies = [copied(one, seed) for seed in range(4)]
    for i, layer in enumerate(one.layers):
        assert isinstance(layer, Packed) and len(set(layer.sizes)) > 1
        for other in (copy.layers[i] for copy in copies):
            assert isinstance(other, Packed)
            pairs = list(zip(layer.sizes, other.sizes, strict=True))
            assert all(0 < less <= size and size - less <= max(1, size // SHARE) for size, less in pairs)
            kv, whole = other.kv(), layer.kv()
            for head, (_, left) in enumerate(pairs):  # the newest of what the original holds
                assert torch.equal(kv.positions[0, head, :left], whole.positions[0, head, : pairs[head][0]][-left:])
                assert torch.equal(kv.keys[0, head, :left], whole.keys[0, head, : pairs[head][0]][-left:])
    rows = [copy.layers[0].kv() for copy in copies if isinstance(copy.layers[0], Packed)]
    assert len(GrowingRows(rows, position=90, room=4).groups) > 2
    assert copied(one, 3).layers[0].sizes == copies[3].layers[0].sizes  # type: ignore[union-attr]


def test_the_last_prompt_is_prefilled_beside_all_others(model: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    plain = Isolated.prefill
    monkeypatch.setattr(Isolated, "prefill", lambda self, ids: done.append("prefill") or plain(self, ids))
    monkeypatch.setattr(
        "harness.speed.measure.copied", lambda prompt, seed: done.append("copy") or copied(prompt, seed)
    )
    spec = ProbeSpec(method="snapkv", budget="20", tokens=90, batch=7, distinct=3, new_tokens=4)
    found = run_round(Isolated(model, make_policy("snapkv"), 20), draw_prompts(spec, range(50)), spec)
    assert done == ["prefill"] * 2 + ["copy"] * 4 + ["prefill"]
    assert len(found.phases) == 3 and len(found.step_s) == 3
