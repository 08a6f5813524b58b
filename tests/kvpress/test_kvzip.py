"""KVzip beside KVzipPress of kvpress, which repeats the prompt by itself, so that no adapter of ours runs it."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("kvpress")

from transformers import DynamicCache, PreTrainedModel

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.kvpress.policy import build
from harness.models.load import load_model
from methods.registry import make_policy
from tests.methods.loops import positions

HEADS = 2


def text(tokens: int) -> list[int]:
    """The beginning of a chat message of the tiny model, as kvpress compresses it."""
    loaded = load_model("tiny", dtype="float32", device="cpu")
    drawn = torch.randint(5, 200, (tokens - 2,), generator=torch.Generator().manual_seed(tokens)).tolist()
    return [*loaded.wording.opening, *drawn]


@torch.inference_mode()
def kept_by_kvpress(model: PreTrainedModel, press: Any, ids: list[int]) -> list[list[list[int]]]:
    """Tokens that each head of each layer is not told to mask."""
    with press(model):
        model.model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache())
    found = []
    for layer in model.model.layers:
        _, heads, masked = layer.self_attn.masked_key_indices
        gone = set(zip(heads.tolist(), masked.tolist(), strict=True))
        found.append([[t for t in range(len(ids)) if (head, t) not in gone] for head in range(HEADS)])
        layer.self_attn.masked_key_indices = None
    return found


@pytest.mark.parametrize(
    ("label", "call"),
    [
        ("kvzip@kvpress", "KVzipPress"),
        ("kvzip@plus", "KVzipPress(kvzip_plus_normalization=True)"),
        ("kvzip@kvpress", "KVzipPress(layerwise=True)"),
    ],
)
@pytest.mark.parametrize(("tokens", "budget"), [(120, 30), (400, 100), (400, 250)])
def test_our_preset_keeps_the_pairs_that_kvpress_keeps(
    tmp_path: Path, label: str, call: str, tokens: int, budget: int
) -> None:
    loaded, ids = load_model("tiny", dtype="float32", device="cpu"), text(tokens)
    loaded.tokenizer.save_pretrained(tmp_path)
    loaded.model.config.name_or_path = str(tmp_path)
    press = build(call)
    press.compression_ratio = 1 - budget / tokens + 1e-9
    gold = kept_by_kvpress(loaded.model, press, ids)
    policy = make_policy(label, {"share": "layer"} if press.layerwise else {})
    engine = Engine(AttachedModel(loaded.model, loaded.wording))
    kept = [positions(kv) for kv in policy.compress(engine.prefill(ids, policy.needs).view, budget)]
    assert sum(len(head) for layer in gold for head in layer) == budget * HEADS * 4
    assert kept == gold
