"""`harness.attached`: transformers' own `generate` on a compressed cache, beside the engine and the plain model."""

import doctest
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import harness.generate.attached
from harness import attached
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.errors import HarnessError
from harness.models.load import LoadedModel, load_model
from harness.records.spec import FirstToken
from methods.base import Budget
from methods.registry import make_policy

NEW = 70  # more than a fresh cache has room for
SURE: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def own() -> LoadedModel:
    """A tiny model of the test's own, since contexts change it for a while."""
    return load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture
def model(own: LoadedModel) -> Iterator[PreTrainedModel]:
    """The model, which must come back as it was."""
    before = state(own.model)
    yield own.model
    assert state(own.model) == before


def state(model: PreTrainedModel) -> tuple[object, ...]:
    head = model.get_output_embeddings()
    assert head is not None
    return set(vars(model)), model.config._attn_implementation, len(head._forward_pre_hooks)


def ids_of(*lengths: int) -> Tensor:
    """Prompts [R, T], each padded on the left to the longest."""
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(5, 260, (length,), generator=draw) for length in lengths]
    return torch.stack([torch.cat([row.new_zeros(max(lengths) - len(row)), row]) for row in rows])


def by_engine(loaded: LoadedModel, ids: Tensor, method: str, budget: int | None, first: FirstToken) -> list[int]:
    policy = make_policy(method)
    cell = Cell(policy, Budget(tokens=budget) if policy.budgeted else None)
    prompt = Prompt(ids.tolist(), len(ids), (), Limits(NEW, frozenset()))
    [outcome] = Engine(AttachedModel(loaded.model), first_token=first).run(prompt, [cell])
    assert outcome.status == "ok", outcome.error
    return list(outcome.token_ids)


def test_fullkv_generates_what_the_plain_model_does(model: PreTrainedModel) -> None:
    ids = ids_of(90)
    plain = model.generate(ids, **SURE)
    for first in ("compressed", "prefill"):
        with attached(model, method="fullkv", first_token=first) as report:  # type: ignore[arg-type]
            assert torch.equal(model.generate(ids, **SURE), plain)
        assert report.kv_bytes == report.full_bytes > 0
    assert torch.equal(model.generate(ids, **SURE), plain)


WAYS = ["snapkv", "snapkv prefill", "h2o@paper", "streamingllm@paper prefill", "headkv", "quant@int4"]


@pytest.mark.filterwarnings("ignore:headkv. no tables")
@pytest.mark.parametrize("method", WAYS)
def test_a_method_generates_what_the_engine_does(own: LoadedModel, method: str) -> None:
    method, _, prefill = method.partition(" ")
    ids, first = ids_of(120), "prefill" if prefill else "compressed"
    with attached(own.model, method=method, budget=40, first_token=first) as report:
        out = own.model.generate(ids, **SURE)
    assert out[0, 120:].tolist() == by_engine(own, ids[0], method, 40, first)
    assert report.kv_bytes <= report.full_bytes * (40 / 120 * 33 / 32 if report.rows[0].budget_tokens else 0.7)
    assert len(report.rows[0].kept_slots) == 4


@pytest.mark.parametrize("method", ["snapkv", "streamingllm@paper"])
def test_rows_of_a_batch_are_those_of_each_prompt_alone(model: PreTrainedModel, method: str) -> None:
    ids = ids_of(60, 31)
    with attached(model, method=method, budget=0.3) as report:
        together = model.generate(ids, attention_mask=(ids > 0).long(), **SURE)
        told = [(row.prompt_tokens, row.budget_tokens, row.kept_slots) for row in report.rows]
        assert told == [(60, 18, (36,) * 4), (31, 9, (18,) * 4)]  # in each of 2 KV heads
        for row, length in enumerate((60, 31)):
            alone = model.generate(ids[row : row + 1, -length:], **SURE)
            assert torch.equal(alone[0, length:], together[row, 60:])


def test_layers_with_a_window_of_their_own_evict_as_it_passes() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    late = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = Qwen2Config(vocab_size=300, num_hidden_layers=2, initializer_range=0.2, **shape, **late)
    torch.manual_seed(0)
    mixed, ids = Qwen2ForCausalLM(config).eval(), ids_of(40)
    whole = mixed.generate(ids, **SURE)
    for method, changed in (("fullkv", {}), ("streamingllm@paper", {"reassign": False})):
        with attached(mixed, method=method, budget=500, params=changed) as report:
            assert torch.equal(mixed.generate(ids, **SURE), whole)
        assert len(report.rows[0].kept_slots) == 1


@pytest.mark.filterwarnings("ignore:compilerkv. no tables")
@pytest.mark.parametrize("method", ["snapkv", "compilerkv", "streamingllm@paper"])
def test_prompts_shorter_than_the_budget_are_kept(model: PreTrainedModel, method: str) -> None:
    for tokens in (1, 30):
        ids = ids_of(tokens)
        plain = model.generate(ids, **{**SURE, "max_new_tokens": 8})
        with attached(model, method=method, budget=64, params={"reassign": False} if "stream" in method else None):
            assert torch.equal(model.generate(ids, **{**SURE, "max_new_tokens": 8}), plain)


def test_a_generation_goes_on_from_its_own_cache(model: PreTrainedModel) -> None:
    ids, more = ids_of(60), ids_of(7)
    short = {**SURE, "max_new_tokens": 5, "return_dict_in_generate": True}
    with attached(model, method="fullkv") as report:
        first = model.generate(ids, **short)
        longer = torch.cat([first.sequences, more], dim=1)
        second = model.generate(longer, past_key_values=first.past_key_values, **short)
        assert report.rows[0].prompt_tokens == 60
        assert torch.equal(second.sequences, model.generate(longer, **short).sequences)


def test_sampling_is_that_of_transformers(model: PreTrainedModel) -> None:
    ids, drawn = ids_of(50), {**SURE, "do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(1)
    plain = model.generate(ids, **drawn)
    with attached(model, method="fullkv"):
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, **drawn), plain)


def test_other_calls_inside_are_the_plain_model(model: PreTrainedModel) -> None:
    ids = ids_of(50)
    with torch.inference_mode():
        with attached(model, method="snapkv", budget=8):
            inside = model(ids).logits
        assert torch.equal(model(ids).logits, inside)


def test_the_model_comes_back_after_an_exception(model: PreTrainedModel) -> None:
    def stop(ids: Tensor, scores: Tensor, **kwargs: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attached(model, method="snapkv", budget=8):
        model.generate(ids_of(30), stopping_criteria=[stop], **SURE)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds=Tensor"),
        ({"past_key_values": object()}, "past_key_values=object"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"attention_mask": (torch.arange(30) < 20).long()[None]}, "padding_side='left'"),
    ],
)
def test_another_cache_or_padding_is_refused(model: PreTrainedModel, options: dict[str, Any], complaint: str) -> None:
    with attached(model, method="snapkv", budget=8), pytest.raises(HarnessError, match=complaint):
        model.generate(ids_of(30), max_new_tokens=2, **options)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"method": "snapvk", "budget": 8}, "did you mean 'snapkv'"),
        ({"method": "snapkv"}, "needs a budget, got None"),
        ({"method": "snapkv", "budget": True}, "budget True is no budget"),
        ({"method": "snapkv", "budget": 0}, "budget 0 keeps nothing"),
        ({"method": "snapkv", "budget": 1.5}, "is not a kept fraction"),
        ({"method": "snapkv", "budget": 8, "params": {"kernal": 5}}, "did you mean 'kernel'"),
    ],
)
def test_bad_arguments_are_one_line(model: PreTrainedModel, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HarnessError, match=complaint), attached(model, **arguments):
        pass


def test_one_context_at_a_time(model: PreTrainedModel) -> None:
    with attached(model, method="snapkv", budget=8):
        again = attached(model, method="fullkv")
        with pytest.raises(HarnessError, match="attached to snapkv already"), again:
            pass
    with pytest.raises(HarnessError, match="Linear is no transformers model"):
        attached(torch.nn.Linear(1, 1), method="fullkv").__enter__()  # type: ignore[arg-type]


def test_the_example_runs() -> None:
    tried = doctest.testmod(harness.generate.attached)
    assert tried.attempted > 5 and not tried.failed


def test_importing_the_harness_brings_no_torch() -> None:
    code = "import sys, harness; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'detached'"):
        harness.detached  # noqa: B018
