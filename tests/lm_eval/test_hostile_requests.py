"""What lm-eval's tasks and options may ask of the plugin: answered as it stands, or refused in one line."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from harness.lm_eval.plugin import KVPolicyLM
from harness.lm_eval.requests import generation
from harness.models.load import LoadedModel, load_model
from tests.hostile import tried
from tests.json_parts import HALF

pytestmark = pytest.mark.hostile
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    0.5,
    10**400,
    math.nan,
    math.inf,
    "",
    "x",
    "\x1b[31m",
    HALF,
    [],
    [3],
    {},
    b"x",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("made", 0, 1))]  # type: ignore[arg-type]


def answered(lm: KVPolicyLM, kind: str, *arguments: Any) -> Any:
    """The answer of one request, which must be text or finite."""
    (answer,) = getattr(lm, kind)(ask(kind, *arguments), disable_tqdm=True)
    assert isinstance(answer, str) or math.isfinite(answer[0] if isinstance(answer, tuple) else answer)
    return answer


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """Of this module alone: the plugin replaces a model's attention."""
    return load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def lm(tiny: LoadedModel) -> KVPolicyLM:
    return KVPolicyLM(pretrained=tiny, method="streamingllm", budget=8)


@pytest.mark.parametrize(
    "name", ["until", "max_gen_toks", "max_new_tokens", "max_tokens", "min_new_tokens", "do_sample"]
)
def test_a_generation_argument_is_what_it_must_be(name: str) -> None:
    for value in ODD:
        given_ = {"max_gen_toks": 4, "until": ["\n"], name: value}
        tried("a generation argument", lambda given_=given_: generation(given_, default=4, eos="x"), may_pass=True)


@pytest.mark.parametrize(
    "name", ["temperature", "num_beams", "max_length", "\x1b[31m", "x" * 5000, "repetition_penalty"]
)
def test_other_generation_arguments(name: str) -> None:
    for value in ODD:
        tried("another argument", lambda value=value: generation({name: value}, default=4, eos=None), may_pass=True)


@given(JSON)
def test_any_json_as_generation_arguments(value: Any) -> None:
    tried("any generation arguments", lambda: generation(value, default=4, eos="x"), may_pass=True)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_are_none(kind: str, lm: KVPolicyLM) -> None:
    others = {"generate_until": ({"max_gen_toks": 2},), "loglikelihood": (" a",), "loglikelihood_rolling": ()}
    for value in (*ODD, " ", "\n\n", "\0", "<|bos|>", "<|end|>", "\u202e", "é" * 9):
        tried("a request's text", lambda value=value: answered(lm, kind, value, *others[kind]), may_pass=True)
        if kind == "loglikelihood":
            tried("a continuation", lambda value=value: answered(lm, kind, "one", value), may_pass=True)


def test_a_request_is_refused_before_any_is_answered(lm: KVPolicyLM) -> None:
    before = lm.answers.engine.prefills
    for kind, arguments in (("generate_until", ("a", {"until": 5})), ("loglikelihood", ("a", ""))):
        good = {"generate_until": ("a", {"max_gen_toks": 2}), "loglikelihood": ("a", " b")}[kind]
        asked = [*ask(kind, *good), *ask(kind, *arguments)]
        tried("a request behind a good one", lambda kind=kind, asked=asked: getattr(lm, kind)(asked, disable_tqdm=True))
    assert lm.answers.engine.prefills == before


@pytest.mark.parametrize(
    "name",
    [
        *("pretrained", "method", "budget", "dtype", "max_length", "truncation_side", "add_bos_token", "set"),
        *("batch_size", "trust_remote_code", "device_map", "recent", "first_token"),
    ],
)
def test_a_model_argument_is_what_it_must_be(name: str, tiny: LoadedModel) -> None:
    for value in (*ODD, "nowhere/at-all", "auto", 3.7):
        arguments = {"pretrained": tiny, "method": "snapkv", "budget": 8, name: value}
        tried("a model argument", lambda arguments=arguments: KVPolicyLM(**arguments), may_pass=True)


def merging(tiny: LoadedModel) -> LoadedModel:
    """The tiny model with a tokenizer that makes one token of `ab`."""
    symbols = tiny.tokenizer.convert_ids_to_tokens(list(range(len(tiny.tokenizer))))
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    vocabulary["ab"] = vocabulary.pop("<|user|>")
    core = Tokenizer(BPE(vocab=vocabulary, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return replace(tiny, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>"))


def test_a_continuation_that_merges_is_never_certain(tiny: LoadedModel) -> None:
    lm = KVPolicyLM(pretrained=merging(tiny))
    for context, continuation in itertools.product(("xa", "a", "xa ", " ", ""), ("b", "bc", "", " ", "<|end|>")):
        line = tried("a merge", lambda x=context, y=continuation: answered(lm, "loglikelihood", x, y), may_pass=True)
        assert line or answered(lm, "loglikelihood", context, continuation)[0] < 0
    assert any("merges" in note for note in lm.get_model_info()["kv_notes"])


def test_a_tokenizer_that_names_no_end_and_no_beginning(tiny: LoadedModel) -> None:
    made = merging(tiny)
    made.tokenizer.eos_token = None
    lm = KVPolicyLM(pretrained=replace(made, eos_ids=frozenset()))
    assert isinstance(answered(lm, "generate_until", "one", {"max_gen_toks": 3}), str)
    assert answered(lm, "loglikelihood", "one", " two")[0] < 0
    for kind, arguments in (
        ("generate_until", ("", {"max_gen_toks": 3})),
        ("loglikelihood", ("", "a")),
        ("loglikelihood", (" ", "a")),
        ("loglikelihood_rolling", ("one",)),
    ):
        line = tried("no context and no token for it", lambda kind=kind, own=arguments: answered(lm, kind, *own))
        assert "names no beginning and no end of text" in line


@pytest.fixture(params=[math.nan, math.inf, -math.inf])
def unsound(request: pytest.FixtureRequest) -> KVPolicyLM:
    """A model whose logits hold a number that is none."""
    own = load_model("tiny", dtype="float32", device="cpu")
    with torch.no_grad():
        own.model.lm_head.weight[97:99] = request.param  # type: ignore[index,operator,union-attr]
    return KVPolicyLM(pretrained=own, method="streamingllm", budget=8)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", ("one text of some length", " abab")),
        ("loglikelihood_rolling", ("one text of some length, and more of it abab",)),
        ("generate_until", ("one text of some length", {"max_gen_toks": 3, "until": []})),
    ],
)
def test_logits_that_are_no_numbers(kind: str, arguments: tuple[Any, ...], unsound: KVPolicyLM) -> None:
    tried("logits that are not finite", lambda: answered(unsound, kind, *arguments))


def test_a_cache_holds_all_that_decides_an_answer_and_nothing_else(tiny: LoadedModel) -> None:
    same = {"method": "snapkv", "budget": 8}
    first = KVPolicyLM(pretrained=tiny, **same)
    held: dict[str, Any] = {}
    first.set_cache_hook(SimpleNamespace(dbdict=held))  # type: ignore[arg-type]
    renamed = replace(tiny, spec=tiny.spec.model_copy(update={"name": "./another/spelling", "device": "cuda:1"}))
    KVPolicyLM(pretrained=renamed, **same).set_cache_hook(SimpleNamespace(dbdict=held))  # type: ignore[arg-type]
    for change in (
        *({"budget": 9}, {"recent": 3}, {"max_length": 99}, {"truncation_side": "right"}, {"add_bos_token": False}),
        *({"method": "h2o"}, {"method": "snapkv@kvcf"}),
    ):
        other = KVPolicyLM(pretrained=tiny, **{**same, **change})
        tried("a cache of other answers", lambda other=other: other.set_cache_hook(SimpleNamespace(dbdict=held)))
    for update in ({"revision": "other"}, {"dtype": "bfloat16"}, {"loaded_as": ("quantised",)}):
        moved = KVPolicyLM(pretrained=replace(tiny, spec=tiny.spec.model_copy(update=update)), **same)
        tried("a cache of other answers", lambda moved=moved: moved.set_cache_hook(SimpleNamespace(dbdict=held)))
    for odd in (None, "x" * 9000, 3, {}, json.loads('{"model": ["\\ud83d"]}'), b"\x1b"):
        hook = SimpleNamespace(dbdict={"kvpolicy": odd})
        tried("a damaged cache", lambda hook=hook: first.set_cache_hook(hook))
