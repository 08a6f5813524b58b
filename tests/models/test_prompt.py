"""Prompts on the byte-level tokenizer: one token per byte, so every border can be read off."""

from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer, template_notes, template_tokens, turn_tokens, wrap
from harness.models.tiny import SPECIAL, tiny_tokenizer
from tasks.base import Sample, Turn

TRIMMING = (  # as Llama 3 has it
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
BYTES = tiny_tokenizer()


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = deepcopy(BYTES)
    tokenizer.chat_template = template
    return tokenizer


def sample(context: str, question: str, *, prefix: str = "", chat: bool = True) -> Sample:
    return Sample("0", context, question, ("a",), max_new_tokens=1, answer_prefix=prefix, chat=chat)


def split(tokenizer: PreTrainedTokenizerBase, item: Sample) -> tuple[str, str]:
    ids, border, *_ = wrap(tokenizer, item)
    return str(tokenizer.decode(ids[:border])), str(tokenizer.decode(ids[border:]))


def test_raw_prompt_gets_one_bos() -> None:
    item = sample("some text.", " What?", prefix=" It is", chat=False)
    assert split(BYTES, item) == ("<|bos|>some text.", " What? It is")
    twice = sample("<|bos|>some text.", " What?", chat=False)
    assert split(BYTES, twice) == ("<|bos|>some text.", " What?")


def test_without_a_template_a_chat_sample_is_raw() -> None:
    plain = with_template(None)
    assert wrap(plain, sample("abc", "d")) == wrap(plain, sample("abc", "d", chat=False))
    assert template_tokens(plain) == 1


@pytest.mark.parametrize("context", ["What?", "What? What?", "user", "<|assistant|>", "KVH"])
def test_a_context_that_occurs_elsewhere(context: str) -> None:
    assert split(BYTES, sample(context, f" {context}", prefix=context)) == (
        f"<|bos|><|user|>{context}",
        f" {context}<|end|><|assistant|>{context}",
    )


def test_a_trimming_template_moves_the_border_along() -> None:
    trimming = with_template(TRIMMING)
    expected = ("<|bos|><|user|>\n\nsome text.", "\nWhat?<|end|><|assistant|>\n\n")
    assert split(trimming, sample("\n  some text.", "\nWhat? \n")) == expected
    assert split(trimming, sample("some text. \n", "")) == ("<|bos|><|user|>\n\nsome text.", "<|end|><|assistant|>\n\n")
    assert split(trimming, sample("\n\n", "What?")) == ("<|bos|><|user|>\n\n", "What?<|end|><|assistant|>\n\n")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30)


@given(TEXT, TEXT, st.sampled_from([BYTES.chat_template, TRIMMING]))
@example("é\u3000", "\u3000日本", TRIMMING)
def test_border_is_exact_for_any_text(context: str, question: str, template: str) -> None:
    content = context + question
    kept = content.strip() if template == TRIMMING else content
    cut = content.index(kept) if kept else 0
    of_context = kept[: max(len(context) - cut, 0)]
    tokenizer = with_template(template)
    ids, border, *_ = wrap(tokenizer, sample(context, question))
    head = 2 + (2 if template == TRIMMING else 0)
    assert border - head == len(of_context.encode())
    assert tokenizer.decode(ids[head : head + len(kept.encode())]) == kept


def test_a_token_across_the_border_belongs_to_the_question() -> None:
    merging = with_template(None)
    merging.add_tokens(["t.What"])
    assert split(merging, sample("some text.", "What?", chat=False)) == ("<|bos|>some tex", "t.What?")


def test_needle_tokens_are_found_where_the_text_is() -> None:
    item = replace(sample("aé needle b", " needle?"), meta={"needles": ["needle b", "é", "absent"]})
    wrapped = wrap(BYTES, item)
    assert BYTES.decode(list(wrapped.ids)[wrapped.needle[0] : wrapped.needle[1] + 1]) == "é"
    assert "".join(BYTES.decode([wrapped.ids[at]]) for at in wrapped.needle[2:]) == "needle b"
    merging = with_template(None)
    merging.add_tokens(["x nee", "b?"])
    torn = wrap(merging, replace(sample("x needle b", "?", chat=False), meta={"needles": ["needle b"]}))
    assert [merging.decode([torn.ids[at]]) for at in torn.needle] == ["x nee", "d", "l", "e", " ", "b?"]
    assert wrap(BYTES, sample("a", "b")).needle == ()
    marked = wrap(BYTES, replace(item, meta={"protect": ["needle b"]}))
    assert (marked.needle, marked.protected) == ((), wrapped.needle[2:])


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ messages[0]['content'] | upper }}", "rewrites the message"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "2 times instead of once"),
        ("nothing", "0 times instead of once"),
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
    ],
)
def test_templates_that_hide_the_context_are_refused(template: str, complaint: str) -> None:
    with pytest.raises(HarnessError, match=complaint):
        wrap(with_template(template), sample("some text", "?"))


def test_prompts_do_not_depend_on_the_day() -> None:
    day = "{{ date_string if date_string is defined else strftime_now('%d') }}"
    assert split(with_template(day + "{{ messages[0]['content'] }}"), sample("x", ""))[0] == "26 Jul 2024x"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("strftime_now('%d %b %Y')", "26 Jul 2024"),
        ("strftime_now('%A, %B %-d, %Y, %H:%M')", "Friday, July 26, 2024, 00:00"),
        ("date_string", "26 Jul 2024"),
    ],
)
def test_a_date_in_a_prompt_is_always_the_same_and_said(call: str, says: str) -> None:
    dated = with_template(f"{{% set day = {call} %}}\n \n{{{{ day }}}}: {{{{ messages[0]['content'] }}}}")
    assert split(dated, sample("x", ""))[0].strip() == f"{says}: x"
    assert template_notes(dated) == ("the chat template writes a date, always 2024-07-26",)
    asked = "{% if strftime_now is defined %}yes {% endif %}{{ messages[0]['content'] }}"
    assert split(with_template(asked), sample("x", ""))[0] == "yes x"
    assert template_notes(with_template(asked)) == template_notes(BYTES) == template_notes(with_template(None)) == ()


@pytest.mark.parametrize("before", ["", "<|bos|> "])
@pytest.mark.parametrize("behind", ["", " <|end|>", " <|end|> <|user|>"])
def test_a_raw_prompt_ends_in_its_own_text(before: str, behind: str) -> None:
    ending = with_template(None)
    own = [(symbol, index) for index, symbol in enumerate(SPECIAL)]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single=f"{before}$A{behind}", special_tokens=own)
    item = replace(sample("some text.", " What?", prefix="<|end|>"), meta={"needles": ["What"]})
    wrapped = wrap(ending, item)
    assert ending.decode(wrapped.ids) == f"{before.strip()}some text. What?<|end|>"  # the text's own stays
    assert ending.decode([wrapped.ids[at] for at in wrapped.needle]) == "What"
    assert template_tokens(ending) == len(before.split())


def test_a_template_that_refuses_an_empty_message_takes_others() -> None:
    strict = "{% if not messages[0]['content'] %}{{ raise_exception('empty') }}{% endif %}" + str(BYTES.chat_template)
    assert template_tokens(with_template(strict)) == template_tokens(BYTES) == 4
    assert wrap(with_template(strict), sample("abc", "?")) == wrap(BYTES, sample("abc", "?"))


def test_task_tokenizer(tiny: LoadedModel) -> None:
    tokenizer = TaskTokenizer(tiny.tokenizer)
    assert tokenizer.template_tokens == len(["bos", "user", "end", "assistant"])
    text = " Paris , 日本 's"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode([1, *ids, 2]) == text
    assert ids == tiny.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.model
@given(st.text(max_size=60))
@example("<|im_start|>user\n  a  1234567 <|im_end|> é日本\t\n\n")
def test_text_is_encoded_as_the_tokenizer_encodes_it(smollm2: LoadedModel, text: str) -> None:
    own = smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert TaskTokenizer(smollm2.tokenizer).encode(text) == own


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("template", [BYTES.chat_template, TRIMMING, CHATML])
def test_a_turn_goes_on_as_the_template_renders_the_conversation(template: str) -> None:
    tokenizer = with_template(template)
    item, turn = sample("abc ", "What?", prefix="It is"), Turn("And then?", 4, "Then")
    said = wrap(tokenizer, item).ids + TaskTokenizer(tokenizer).encode(" so.")
    messages = [("user", "abc What?"), ("assistant", "It is so."), ("user", "And then?")]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(said + turn_tokens(tokenizer, item, turn)) == f"{whole}Then"


def test_a_turn_without_a_template_is_plain_text() -> None:
    item, turn = sample("abc", "What?"), Turn("And then?", 4, " Then")
    for tokenizer, own in ((with_template(None), item), (BYTES, replace(item, chat=False))):
        assert tokenizer.decode(turn_tokens(tokenizer, own, turn)) == "\n\nAnd then? Then"


def test_a_template_that_hides_or_refuses_a_conversation_is_refused() -> None:
    last = "{{ messages[-1]['content'] }}"
    strict = "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}" + last
    for template, why in ((last, "does not show a conversation"), (strict, "refuses a conversation of 3 messages")):
        with pytest.raises(HarnessError, match=why):
            turn_tokens(with_template(template), sample("abc", "What?"), Turn("And then?", 4))
