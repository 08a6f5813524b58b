"""What a model's files ask for, in lm-eval: an end behind every text, a date, a template that raises, a penalty."""

from copy import deepcopy
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

from harness.errors import HarnessError
from harness.lm_eval.plugin import KVPolicyLM
from harness.models.load import LoadedModel
from tests.hostile import tried

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]


@pytest.fixture
def own(tiny: LoadedModel) -> KVPolicyLM:
    """With a tokenizer that is free to be changed."""
    return KVPolicyLM(replace(tiny, tokenizer=deepcopy(tiny.tokenizer)), method="fullkv")


def test_no_end_of_text_is_put_behind_a_text(own: KVPolicyLM) -> None:
    plain = own.tok_encode("Hi."), own._encoded("The sky", " is blue")
    ends = TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 1), ("<|end|>", 2)])
    own.tokenizer.backend_tokenizer.post_processor = ends
    assert (own.tok_encode("Hi."), own._encoded("The sky", " is blue")) == plain
    assert own.tok_encode("Hi.<|end|>")[-1] == 2


def test_a_template_writes_the_same_day_whenever_it_is(own: KVPolicyLM) -> None:
    own.tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[-1]['content'] }}"
    assert own.apply_chat_template(MESSAGES) == "2024-07-26 Hi."


@pytest.mark.hostile
@pytest.mark.parametrize(
    "template", ["{{ 1 + 'x' }}", "{{ 1 / 0 }}", "{% if", "{{ raise_exception('no') }}", {"a": "x"}]
)
def test_a_template_that_raises_anything_is_one_line(own: KVPolicyLM, template: str) -> None:
    own.tokenizer.chat_template = template
    assert "the chat template refuses" in tried("chat template", lambda: own.apply_chat_template(MESSAGES))


def test_a_template_that_refuses_a_system_message_gets_the_others(own: KVPolicyLM) -> None:
    own.tokenizer.chat_template = "{{ messages[0]['content'] if messages[0]['role'] == 'user' else nope() }}"
    assert own.apply_chat_template(MESSAGES) == "Hi."


def test_what_is_set_aside_and_what_has_no_embedding_is_said(tiny: LoadedModel) -> None:
    said = KVPolicyLM(replace(tiny, set_aside=("repetition_penalty",), vocabulary=50), method="fullkv")
    assert said.get_model_info()["kv_notes"] == ["repetition_penalty"]
    with pytest.raises(HarnessError, match="the text '~' has token"):
        said.tok_encode("~")
