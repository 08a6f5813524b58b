"""Methods of ours that read little attention or none, beside the presses of kvpress that they are."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("kvpress")

import torch
from kvpress import DuoAttentionPress, KVComposePress
from transformers import PreTrainedModel

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.kvpress.policy import build
from harness.models.load import load_model
from methods.base import Needs
from methods.compilerkv.manifest import Shapes
from methods.compilerkv.tables import neutral, save_tables
from methods.kvcompose import KVCompose
from methods.registry import make_policy
from methods.simlayerkv import SimLayerKV
from tests.kvpress.test_golden import SIZES, kept_by_kvpress, kept_by_us, ratio, text


@pytest.fixture(scope="module")
def ours() -> Engine:
    return Engine(AttachedModel(load_model("tiny", dtype="float32", device="cpu").model), first_token="prefill")


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    return load_model("tiny", dtype="float32", device="cpu").model


def same_but_for_ties(own: list[list[list[int]]], gold: list[list[list[int]]], ids: list[int]) -> None:
    """Occurrences of one token id are alike in the first layer, but for rounding; kvpress's top-k takes any of them."""
    assert own[1:] == gold[1:]
    for kept, theirs in zip(own[0], gold[0], strict=True):
        assert sorted(ids[t] for t in kept) == sorted(ids[t] for t in theirs)
        assert len(set(kept) - set(theirs)) <= 2


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


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
@pytest.mark.parametrize(
    ("of", "kind"), [("product", "kv_product"), ("mean", "kv_avg"), ("key", "key"), ("value", "value")]
)
def test_cur_keeps_kvpresss_tokens(
    ours: Engine, theirs: PreTrainedModel, of: str, kind: str, tokens: int, budget: int
) -> None:
    ids, made = text(tokens), build(f"CURPress(leverage_type='{kind}')")
    made.compression_ratio = ratio(tokens, budget)
    gold = kept_by_kvpress(theirs, made, ids)
    view = ours.prefill(ids, Needs()).view
    kvs = make_policy("cur@kvpress", {"of": of}).compress(view, budget)
    same_but_for_ties([kv.positions[0].tolist() for kv in kvs], gold, ids)
    assert kept_by_us(ours, f"kvpress:CURPress(leverage_type='{kind}')", ids, budget) == gold


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
def test_leverage_keeps_kvpresss_tokens(ours: Engine, theirs: PreTrainedModel, tokens: int, budget: int) -> None:
    """The tiny model's heads are narrower than the sketch, so both are exact."""
    ids, made = text(tokens), build("LeverageScorePress")
    made.compression_ratio = ratio(tokens, budget)
    same_but_for_ties(kept_by_us(ours, "leverage@kvpress", ids, budget), kept_by_kvpress(theirs, made, ids), ids)


@pytest.mark.parametrize(("tokens", "budget"), [(268, 100), (780, 333), (1036, 128), (1804, 1283)])
def test_compactor_keeps_kvpresss_tokens(ours: Engine, theirs: PreTrainedModel, tokens: int, budget: int) -> None:
    """Of whole stretches: in a shorter one the press attends to what it is filled up with."""
    ids, made = text(tokens), build("CompactorPress")
    made.compression_ratio = ratio(tokens, budget)
    assert kept_by_us(ours, "compactor@kvpress", ids, budget) == kept_by_kvpress(theirs, made, ids)


@pytest.mark.parametrize("whole", [1, 2, 3])
def test_simlayerkv_leaves_the_layers_whole_that_kvpress_does(
    ours: Engine, theirs: PreTrainedModel, whole: int
) -> None:
    """At the bytes that a threshold comes to. The press measures one recent token more than it keeps."""
    tokens, recent = 1000, 60
    ids, policy = text(tokens), SimLayerKV(recent=recent)
    view = ours.prefill(ids, policy.needs).view
    total = whole * tokens + (ours.model.layers - whole) * (4 + recent)
    assert total % ours.model.layers == 0 and policy.lazy_slots(total // ours.model.layers) == 4 + recent
    own = [kv.positions[0].tolist() for kv in policy.compress(view, total // ours.model.layers)]
    shares = []
    for layer in view.layers:
        attention = layer.attention(1).mean(dim=(0, 1, 2, 3))
        shares.append(float(attention[:4].sum() + attention[-recent - 1 :].sum()))
    middle = sum(sorted(shares)[whole - 1 : whole + 1]) / 2
    gold = kept_by_kvpress(theirs, build(f"SimLayerKVPress(lazy_threshold={middle}, n_recent={recent + 1})"), ids)
    assert own == gold and sorted(len(layer[0]) for layer in own) == [64] * (4 - whole) + [tokens] * whole


@pytest.mark.parametrize("whole", [1, 4, 7])
def test_duoattention_keeps_kvpresss_tokens(
    ours: Engine, theirs: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    """Of the same heads: the press masks what streaming ones are not to see, with 128 sinks and 256 recent tokens."""
    tokens, layers, heads = 1608, ours.model.layers, 2
    draw = torch.rand(1, layers, heads, generator=torch.Generator().manual_seed(whole))
    tables = neutral(Shapes(layers=layers, query_heads=2 * heads, kv_heads=heads), (64,))
    save_tables(replace(tables, importance=draw / draw.mean()), tmp_path)
    policy = make_policy("duoattention@kvpress", {"tables": str(tmp_path), "share": 0.9})
    ids, budget = text(tokens), (whole * tokens + (layers * heads - whole) * 384) // (layers * heads)
    kvs = policy.compress(ours.prefill(ids, policy.needs).view, budget)
    monkeypatch.setattr(DuoAttentionPress, "post_init_from_model", lambda self, model: None)  # fetches its gates
    press = DuoAttentionPress()
    order = draw.flatten().argsort(descending=True)[:whole]
    mask = torch.ones(layers * heads, dtype=torch.bool).index_fill_(0, order, value=False).view(layers, heads)
    press.sink_size, press.recent_size, press.streaming_mask, press.head_compression_ratio = 128, 256, mask, 0.5
    with torch.inference_mode(), press(theirs):
        theirs(input_ids=torch.tensor([ids]))
    for layer, kv in zip(theirs.model.layers, kvs, strict=True):
        masked = {(int(h), int(t)) for _, h, t in zip(*layer.self_attn.masked_key_indices, strict=True)}
        for head in range(heads):
            kept = [t for t in range(tokens) if (head, t) not in masked]
            assert [t for t in kv.positions[0, head].tolist() if t >= 0] == kept


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
def test_kvcompose_keeps_kvpresss_tokens(ours: Engine, theirs: PreTrainedModel, tokens: int, budget: int) -> None:
    """By its own second pass, in the attention that tells weights, by whose bits tokens are told here too."""
    ids, plain = text(tokens), copy.deepcopy(theirs)
    plain.set_attn_implementation("eager")
    gold = kept_by_kvpress(plain, KVComposePress(compression_ratio=ratio(tokens, budget)), ids)
    own = kept_by_us(ours, "kvcompose@kvpress", ids, budget)
    assert own == gold and len(gold) == ours.model.layers and len({len(layer[0]) for layer in gold}) > 1


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("tokens", "budget"), SIZES)
def test_kvcompose_shares_slots_out_as_kvpress_does(ours: Engine, structured: bool, tokens: int, budget: int) -> None:
    """Of our scores of the last queries, before our window."""
    policy = KVCompose(recent=32, structured=structured)
    view = ours.prefill(text(tokens), policy.needs).view
    scores = torch.cat([policy._score(layer) for layer in view.layers])[..., :-32]
    press = KVComposePress(structured=structured, compression_ratio=ratio(tokens - 32, budget - 32))
    press.num_layers, press.num_kv_heads, press.context_len = scores.shape
    press.scores, press.device = scores, "cpu"
    press.compute_important_per_layer()
    theirs = press.important_per_layer[:, None] if structured else press.important_per_head
    own = [kv.live[0].tolist() for kv in policy.compress(view, budget)]
    apart = torch.tensor(own) - torch.tensor(theirs + 32).expand(scores.shape[:2])
    assert apart.abs().max() <= structured  # the first layer's composite tokens equal another's; top-k takes either
    assert len({n for layer in own for n in layer}) > 1
