"""The lm-eval plugin on the tiny and the packaged model: beside `hf`, on compressed caches, and what it refuses."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from harness.engine.types import Limits, Prompt
from harness.errors import HarnessError
from harness.lm_eval.plugin import KVPolicyLM
from harness.lm_eval.requests import generation
from harness.models.load import LoadedModel, load_model

ROOT = Path(__file__).resolve().parents[2]
RULER = Path(lm_eval.__file__).parent / "tasks" / "ruler"
TEXT = "The ferry left the harbour at noon and the lantern on its mast was lit although the sun stood high. "
GREEDY = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 24, "until": []}
CHOICES = (" a lantern", " no", " the harbour at noon", " x")


def ask(kind: str, *arguments: tuple[Any, ...], task: str = "made-up") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=own, idx=i, metadata=(task, i, 1))
        for i, own in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """Of this module alone: the plugin replaces a model's attention."""
    return load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def hf() -> HFLM:
    own = load_model("tiny", dtype="float32", device="cpu")
    return HFLM(pretrained=own.model, tokenizer=own.tokenizer, batch_size=1, max_length=own.context)


@pytest.fixture
def full(tiny: LoadedModel) -> KVPolicyLM:
    return KVPolicyLM(pretrained=tiny)


def kept(lm: KVPolicyLM, *names: str) -> tuple[Any, ...]:
    return tuple(lm.get_model_info()["kv_tasks"]["made-up"][name] for name in names)


def scored(lm: Any, *pairs: tuple[str, str]) -> list[float]:
    return [x for x, _ in lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)]


@pytest.mark.parametrize("until", [[], ["e"], ["qx", "<|user|>"]])
def test_generations_are_those_of_hf(hf: HFLM, full: KVPolicyLM, until: list[str]) -> None:
    prompts = [(TEXT * n, {**GREEDY, "until": until}) for n in (1, 3)]
    requests = ask("generate_until", *prompts, ("<|bos|>starts with one", {**GREEDY, "until": until}))
    texts = full.generate_until(requests, disable_tqdm=True)
    assert texts == hf.generate_until(requests, disable_tqdm=True)
    assert any(texts)


def test_log_probabilities_are_those_of_hf(hf: HFLM, full: KVPolicyLM) -> None:
    requests = ask("loglikelihood", *product((TEXT, TEXT * 2 + "Answer: ", ""), CHOICES))
    ours, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (full, hf))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-4)


def test_what_greedy_decoding_gives_is_greedy(full: KVPolicyLM) -> None:
    prompt, ids = full.tok_encode(TEXT), greedy_ids(full)
    pairs = [(("", ""), prompt, ids), (("", ""), prompt, [*ids[:-1], ids[-1] ^ 1])]
    assert [greedy for _, greedy in full._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


@pytest.mark.parametrize("max_length", [4096, 70])  # one window; several, the last one mostly context
def test_rolling_is_that_of_hf(tiny: LoadedModel, hf: HFLM, max_length: int) -> None:
    requests = ask("loglikelihood_rolling", (TEXT * 2,), ("ab",), ("c",))
    hf._max_length = max_length
    theirs = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    hf._max_length = 4096
    ours = KVPolicyLM(pretrained=tiny, max_length=max_length)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(theirs, abs=2e-3, rel=1e-6)


def test_rolling_compresses_the_first_half_and_says_so(tiny: LoadedModel, full: KVPolicyLM) -> None:
    requests = ask("loglikelihood_rolling", (TEXT * 2,))
    lm = KVPolicyLM(pretrained=tiny, method="streamingllm", budget=16)
    assert abs(lm.loglikelihood_rolling(requests)[0] - full.loglikelihood_rolling(requests)[0]) > 0.1
    assert kept(lm, "kept_tokens", "prompt_tokens") == (16, (len(lm.tok_encode(TEXT * 2)) + 1) // 2)
    assert "first half" in lm.get_model_info()["kv_notes"][0]


def test_four_choices_cost_one_prefill(tiny: LoadedModel) -> None:
    lm = KVPolicyLM(pretrained=tiny, method="snapkv", budget=40)
    scored(lm, *product((TEXT, TEXT * 2), CHOICES))
    assert (lm.get_model_info()["kv_prefills"], *kept(lm, "prompts")) == (2, 2)


@pytest.mark.parametrize(
    ("method", "params"),
    [("streamingllm", {}), ("snapkv", {"recent": 8}), ("streamingllm", {"evict": True, "reassign": False})],
)
def test_every_choice_is_scored_as_if_it_were_alone(tiny: LoadedModel, method: str, params: dict[str, Any]) -> None:
    lm = KVPolicyLM(pretrained=tiny, method=method, budget=24, set=params)
    pairs = [*product([TEXT], CHOICES)]
    assert scored(lm, *pairs) == pytest.approx([scored(lm, pair)[0] for pair in pairs], abs=1e-4)


def test_the_first_token_comes_from_the_compressed_cache(tiny: LoadedModel, hf: HFLM, full: KVPolicyLM) -> None:
    """One-token choices must feel the compression: the context's last token is held back."""
    lm = KVPolicyLM(pretrained=tiny, method="streamingllm", budget=8)
    context = TEXT.rstrip()  # or the space would go to the continuation
    ours, whole = (scored(own, *product([context], "ABCD")) for own in (lm, full))
    assert max(abs(a - b) for a, b in zip(ours, whole, strict=True)) > 0.1
    ids = lm.tok_encode(context)
    assert ours == pytest.approx(_by_mask(hf, ids, [lm.tok_encode(x, False)[0] for x in "ABCD"], 8), abs=1e-4)


def _by_mask(hf: HFLM, ids: Sequence[int], letters: Sequence[int], budget: int) -> list[float]:
    """Log-probabilities after `ids` where the last token sees the first 4 tokens and the last `budget` - 4."""
    tokens = len(ids)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen[-1, 4 : tokens - (budget - 4)] = False
    logits = hf.model(torch.tensor([list(ids)]), attention_mask=seen[None, None]).logits[0, -1]
    return [float(logits.log_softmax(dim=-1)[letter]) for letter in letters]


def test_generation_is_compressed_and_measured(tiny: LoadedModel, full: KVPolicyLM) -> None:
    lm = KVPolicyLM(pretrained=tiny, method="snapkv", budget=0.25, recent=8)
    requests = ask("generate_until", (TEXT * 4, GREEDY))
    assert lm.generate_until(requests, disable_tqdm=True) != full.generate_until(requests, disable_tqdm=True)
    info, tokens = lm.get_model_info(), len(lm.tok_encode(TEXT * 4))
    assert (info["kv_method"]["label"], info["kv_budget"]) == ("snapkv[recent=8]", "0.25")
    quarter, token = round(tokens / 4), 4 * 2 * 16 * 4 * 2  # layers, heads, dims, float32, k and v
    assert (info["kv_kept_tokens"], info["kv_bytes"]) == (quarter, quarter * (token + 4 * 2 * 4))  # a position a slot
    assert info["kv_full_bytes"] == tokens * token


def test_a_context_below_the_budget_is_marked_and_said_once(
    tiny: LoadedModel, full: KVPolicyLM, caplog: pytest.LogCaptureFixture
) -> None:
    lm = KVPolicyLM(pretrained=tiny, method="snapkv", budget=512)
    pairs = [(TEXT * n, " a") for n in (1, 2, 8)]
    with caplog.at_level(logging.WARNING):
        scores = scored(lm, *pairs)
    assert scores[:2] == scored(full, *pairs)[:2]
    assert kept(lm, "uncompressed", "prompts") == (2, 3)
    assert sum("uncompressed" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(("side", "first", "last"), [("left", -40, -1), ("right", 0, 39), ("middle", 0, -1)])
def test_truncation_is_on_the_side_asked_for(tiny: LoadedModel, side: str, first: int, last: int) -> None:
    lm = KVPolicyLM(pretrained=tiny, max_length=64, truncation_side=side)
    seen: list[Sequence[int]] = []
    prefill = lm.answers.engine.prefill
    lm.answers.engine.prefill = lambda ids, needs: (seen.append(ids), prefill(ids, needs))[1]  # type: ignore[method-assign,func-returns-value]
    whole = lm.tok_encode(TEXT)
    lm.answers.generate("made-up", "x", whole, generation(GREEDY, default=256, eos="<|end|>"))
    assert (len(seen[0]), seen[0][0], seen[0][-1]) == (40, whole[first], whole[last])
    assert kept(lm, "truncated") == (1,)


def test_an_empty_stop_ends_no_text() -> None:
    asked = generation({**GREEDY, "until": ["", "e"]}, default=256, eos="<|end|>")
    assert asked == (24, 0, ("e", "<|end|>"))


def greedy_ids(lm: KVPolicyLM) -> list[int]:
    ids = lm.tok_encode(TEXT)
    prompt = Prompt(ids, len(ids), (), Limits(max_new_tokens=6, eos_ids=frozenset()))
    return list(lm.answers.engine.run(prompt, [lm.answers.planned.cell])[0].token_ids)


def test_a_generation_ends_at_every_end_of_text(tiny: LoadedModel, full: KVPolicyLM) -> None:
    ids = greedy_ids(full)
    ending = replace(tiny, eos_ids=tiny.eos_ids | {ids[3]})  # as a generation config may name another one
    text = KVPolicyLM(pretrained=ending).generate_until(ask("generate_until", (TEXT, GREEDY)))[0]
    assert text == tiny.tokenizer.decode(ids[: ids.index(ids[3])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size auto is not supported"),
        ({"batch_size": 8}, "batch_size 8 .* give 1"),
        ({"method": "snapvk", "budget": 8}, "did you mean 'snapkv'"),
        ({"method": "snapkv"}, "snapkv needs a budget; add budget=512"),
        ({"method": "snapkv", "budget": 0}, "budget 0 keeps nothing"),
        ({"method": "snapkv,h2o", "budget": 8}, "more than one"),
        ({"method": "snapkv", "budget": 8, "recnt": 4}, "did you mean 'recent'"),
        ({"truncation_side": "up"}, "truncation_side: Input should be 'left', 'right' or 'middle', got 'up'"),
        ({"max_length": 1}, "max_length: .* greater than or equal to 2, got 1"),
        ({}, "WORLD_SIZE is 2"),
    ],
)
def test_refusals(tiny: LoadedModel, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not arguments:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HarnessError, match=message) as refusal:
        KVPolicyLM(pretrained=tiny, **arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("option", ["device=cpu", "batch_size=2"])
def test_lm_evals_own_options_inside_model_args_are_refused(option: str) -> None:
    line = f"{option} does not belong inside --model_args; take it out and pass --{option.partition('=')[0]}"
    with pytest.raises(HarnessError, match=line):
        KVPolicyLM.create_from_arg_string(f"pretrained=tiny,{option}", {"device": "cpu", "batch_size": 1})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "asks for sampling"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"max_gen_toks": 5000}, "leaves no room"),
        ({"max_gen_toks": 0}, "max_gen_toks: .* greater than or equal to 1, got 0"),
    ],
)
def test_refused_generation_arguments(full: KVPolicyLM, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        full.generate_until(ask("generate_until", (TEXT, {**GREEDY, **changed})), disable_tqdm=True)


def test_a_response_cache_of_another_policy_is_refused(tiny: LoadedModel, full: KVPolicyLM) -> None:
    hook = SimpleNamespace(dbdict={})
    for lm in (full, KVPolicyLM(pretrained=tiny)):
        lm.set_cache_hook(hook)
    with pytest.raises(HarnessError, match="was made with method 'fullkv', this is 'snapkv': name another"):
        KVPolicyLM(pretrained=tiny, method="snapkv", budget=8).set_cache_hook(hook)
    with pytest.raises(HarnessError, match="was made with model 'another model', this is"):
        full.set_cache_hook(SimpleNamespace(dbdict={"some hash": "an answer"}))


def built(known: TaskManager, name: str, samples: int) -> list[Any]:
    (task,) = known.load([name])["tasks"].values()
    task.build_all_requests(limit=samples)
    return list(task.instances)


@pytest.mark.model
def test_the_packaged_model_answers_as_hf_and_loses_the_names_with_their_half_of_the_cache(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nltk")
    hf = HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=1, max_length=smollm2.context)
    own = load_model("smollm2-135m", dtype="float32", device="cpu")  # the plugin replaces a model's attention
    full, half = KVPolicyLM(pretrained=own), KVPolicyLM(pretrained=own, method="streamingllm", budget=0.5)
    metadata = {"tokenizer": full.tokenizer_folder, "max_seq_lengths": [512]}
    asked = built(TaskManager(include_path=RULER, include_defaults=False, metadata=metadata), "niah_single_1", 1)
    texts = full.generate_until(asked, disable_tqdm=True)
    assert texts == hf.generate_until(asked, disable_tqdm=True)
    assert asked[0].doc["outputs"][0] in texts[0]
    monkeypatch.chdir(ROOT)  # the example names its rows from there
    questions = built(TaskManager(include_defaults=False), "examples/lm_eval/kv_choices.yaml", 4)  # of 4 choices each
    mine, other = (lm.loglikelihood(questions[:4], disable_tqdm=True) for lm in (full, hf))
    assert [x for x, _ in mine] == pytest.approx([x for x, _ in other], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    right = []
    for lm in (full, half):
        scores = torch.tensor([x for x, _ in lm.loglikelihood(questions, disable_tqdm=True)]).view(4, 4)
        right.append(sum(map(int.__eq__, scores.argmax(dim=1).tolist(), [q.doc["label"] for q in questions[::4]])))
    assert right[0] == 4 and right[1] <= 1  # a guess
