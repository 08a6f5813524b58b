"""Methods of ours that read no attention, beside the presses of kvpress that they are."""

import pytest

pytest.importorskip("kvpress")

from transformers import PreTrainedModel

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.kvpress.policy import build
from harness.models.load import load_model
from tests.kvpress.test_golden import kept_by_kvpress, kept_by_us, ratio, text


@pytest.fixture(scope="module")
def ours() -> Engine:
    return Engine(AttachedModel(load_model("tiny", dtype="float32", device="cpu").model), first_token="prefill")


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    return load_model("tiny", dtype="float32", device="cpu").model


@pytest.mark.parametrize(("tokens", "measured"), [(777, 5), (1000, 6), (1900, 13)])
@pytest.mark.parametrize("each", [1, 30, 127])
def test_lagkv_keeps_kvpresss_tokens_where_partitions_share_evenly(
    ours: Engine, theirs: PreTrainedModel, tokens: int, measured: int, each: int
) -> None:
    """Elsewhere its top-k decides between equal ranks of different partitions (lagkv_press.py:78 at 8bb29b9)."""
    ids, budget = text(tokens), tokens - measured * (128 - each)
    made = build("LagKVPress")
    made.compression_ratio = ratio(tokens, budget)
    gold = kept_by_kvpress(theirs, made, ids)
    for own in ("lagkv@kvpress", "kvpress:LagKVPress"):
        assert kept_by_us(ours, own, ids, budget) == gold
