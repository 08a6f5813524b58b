"""Presets of ours beside the presses of kvpress that they are, run as its users run them."""

from functools import partial

import pytest
import torch

pytest.importorskip("kvpress")

from kvpress import BasePress, FinchPress
from transformers import DynamicCache, PreTrainedModel

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.kvpress.policy import build
from harness.kvpress.slots import rows
from harness.models.load import load_model
from methods.base import Budget
from methods.registry import make_policy

PAIRS = [
    *[("snapkv@kvpress", "SnapKVPress"), ("streamingllm@kvpress", "StreamingLLMPress")],
    *[("pyramidkv@kvpress", "PyramidKVPress"), ("keydiff@kvpress", "KeyDiffPress")],
    ("keydiff@block", "BlockPress(KeyDiffPress())"),
]
SIZES = [(300, 100), (777, 333), (1000, 128), (1900, 1400), (1900, 1283)]  # the last two are no flat pyramids


@pytest.fixture(scope="module")
def ours() -> Engine:
    return Engine(AttachedModel(load_model("tiny", dtype="float32", device="cpu").model), first_token="prefill")


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    return load_model("tiny", dtype="float32", device="cpu").model


def text(tokens: int) -> list[int]:
    return torch.randint(5, 200, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def ratio(tokens: int, budget: int) -> float:
    """The ratio at which kvpress, which rounds down, keeps `budget` of `tokens`."""
    exact = 1 - budget / tokens
    return exact if int(tokens * (1 - exact)) == budget else 1 - (budget + 1e-6) / tokens


@torch.inference_mode()
def kept_by_kvpress(model: PreTrainedModel, press: object, ids: list[int]) -> list[list[list[int]]]:
    """Tokens that each layer of its cache holds, ascending: [H][S] each, told by the bits of their keys."""
    whole, cache = DynamicCache(), DynamicCache()
    model(input_ids=torch.tensor([ids]), past_key_values=whole)
    with press(model):  # type: ignore[operator]
        model(input_ids=torch.tensor([ids]), past_key_values=cache)
    found = [rows(some.keys, full.keys) for some, full in zip(cache.layers, whole.layers, strict=True)]
    return [layer[0].sort(dim=-1).values.tolist() for layer in found if layer is not None]


@torch.inference_mode()
def kept_by_us(engine: Engine, label: str, ids: list[int], budget: int) -> list[list[list[int]]]:
    policy = make_policy(label)
    kvs = policy.compress(engine.prefill(ids, policy.needs).view, budget)
    return [kv.positions[0].sort(dim=-1).values.tolist() for kv in kvs]


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
@pytest.mark.parametrize(("label", "press"), PAIRS)
def test_our_preset_keeps_the_tokens_that_kvpress_keeps(
    ours: Engine, theirs: PreTrainedModel, label: str, press: str, tokens: int, budget: int
) -> None:
    ids = text(tokens)
    made = build(press)
    made.compression_ratio = ratio(tokens, budget)
    gold = kept_by_kvpress(theirs, made, ids)
    assert len(gold) == ours.model.layers
    assert len({len(layer[0]) for layer in gold}) == (4 if press == "PyramidKVPress" and budget >= 1280 else 1)
    for own in (label, f"kvpress:{press}"):
        assert kept_by_us(ours, own, ids, budget) == gold


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
def test_expected_attention_of_the_paper_is_kvpresses_evaluated_one(ours: Engine, tokens: int, budget: int) -> None:
    """Their AdaKVPress masks, so the tokens that stay are read from the press as a method of ours."""
    ids = text(tokens)
    gold = kept_by_us(ours, "kvpress:AdaKVPress(ExpectedAttentionPress(epsilon=0.01))", ids, budget)
    assert kept_by_us(ours, "expected_attention@paper", ids, budget) == gold
    assert len({len([t for t in head if t >= 0]) for layer in gold for head in layer}) > 1


@pytest.mark.parametrize(("tokens", "budget"), [size for size in SIZES if size[1] >= 128])  # whose half is its window
@pytest.mark.parametrize(
    ("label", "press"),
    [
        ("criticalkv@kvpress", "CriticalKVPress(SnapKVPress())"),
        ("criticaladakv@kvpress", "CriticalAdaKVPress(SnapKVPress())"),
    ],
)
def test_critical_kv_keeps_the_tokens_that_kvpress_keeps(
    ours: Engine, label: str, press: str, tokens: int, budget: int
) -> None:
    ids = text(tokens)
    gold = kept_by_us(ours, f"kvpress:{press}", ids, budget)
    assert kept_by_us(ours, label, ids, budget) == gold
    plain = {"criticalkv": "snapkv@kvpress", "criticaladakv": "adakv@kvpress"}[label.partition("@")[0]]
    assert kept_by_us(ours, plain, ids, budget) != gold


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
def test_finch_keeps_the_tokens_that_kvpress_keeps(
    ours: Engine, theirs: PreTrainedModel, tokens: int, budget: int
) -> None:
    """Its delimiter only tells the window; turned keys tell no token."""
    made, ids = FinchPress(compression_ratio=ratio(tokens, budget), rerotate_keys=False), text(tokens)
    made.window_size = 32
    policy = make_policy("finch@kvpress", {"recent": 32})
    kvs = policy.compress(ours.prefill(ids, policy.needs).view, budget)
    own = [kv.positions[0].sort(dim=-1).values.tolist() for kv in kvs]
    assert own == kept_by_kvpress(theirs, partial(BasePress.__call__, made), ids)


@pytest.mark.parametrize("press", ["KnormPress()", "AdaKVPress(SnapKVPress())", "CriticalAdaKVPress(SnapKVPress())"])
def test_generation_is_that_of_kvpress_masked_or_dropped(ours: Engine, theirs: PreTrainedModel, press: str) -> None:
    """AdaKV's masked keys have no weight there, and are absent here."""
    tokens, budget, new = 400, 80, 12
    ids = text(tokens)
    prompt = Prompt(ids, tokens, (), Limits(max_new_tokens=new, eos_ids=frozenset()))
    outcome = ours.run(prompt, [Cell(make_policy(f"kvpress:{press}"), Budget(tokens=budget))])[0]
    made = build(press)
    made.compression_ratio = ratio(tokens, budget)
    cache, answer = DynamicCache(), []
    with torch.inference_mode(), made(theirs):
        logits = theirs(input_ids=torch.tensor([ids]), past_key_values=cache).logits
        for step in range(new):
            answer.append(int(logits[0, -1].argmax()))
            at = torch.tensor([[tokens + step]])
            given = {"input_ids": torch.tensor([answer[-1:]]), "position_ids": at, "cache_position": at[0]}
            logits = theirs(**given, past_key_values=cache).logits
    assert list(outcome.token_ids) == answer and len(set(answer)) > 3
