"""Chat templates that are no programs, that raise anything, or that do not show a message: one line each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.models.prompt import template_notes, template_tokens, turn_tokens, wrap
from harness.models.tiny import tiny_tokenizer
from tasks.base import Sample, Turn
from tests.hostile import tried

pytestmark = pytest.mark.hostile
TOKENIZER = tiny_tokenizer()
SAMPLE = Sample("0", "some text.", " What?", ("a",), max_new_tokens=1, answer_prefix="")

PLAIN = "{{ messages[0]['content'] }}"
BROKEN = r"""
{% if
{{
{% endif %}
{% nope %}
{{ x | nope }}
{% for x in %}
{% extends 'x' %}
{% include 'x' %}
{{ 'turn ' + 1 }}
{{ messages[0]['content'][0:'x'] }}
{{ 1 / 0 }}
{{ messages[5]['content'] }}
{{ messages.nope.nope }}
{{ none() }}
{{ 10 ** 10 ** 3 }}
{{ 'x' * 10 ** 12 }}
{{ [1] | first.x }}
{% for i in range(10 ** 9) %}x{% endfor %}
{{ range(10 ** 9) | list }}
{{ {}['a']['b'] }}
{{ 'a' | int + 'b' }}
{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ raise_exception('no') }}
{{ raise_exception(5) }}
{{ raise_exception() }}
{{ messages[0]['content'].encode('nope') }}
{{ '%d' % 'x' }}
{{ '{}'.format() }}
{{ strftime_now(5) }}
{{ strftime_now() }}
{{ [1, 'a'] | sort }}
{{ 'x' | tojson(indent='y') }}
{% set messages.x = 1 %}
{{ messages[0].update({'content': 'x'}) }}
{{ ('x' * 100000) | batch(0) | list }}
nothing
{{ messages[0]['content'] }}{{ messages[0]['content'] }}
{{ messages[0]['content'] | upper }}
{{ messages[0]['content'] | reverse }}
{{ messages[0]['content'][:3] }}
{{ messages[0]['content'] | length }}
{{ raise_exception('a\nb\x1b[31m') }}
""".strip().split("\n")
"""One on each line."""


def _prompt(template: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    template_tokens(tokenizer)
    template_notes(tokenizer)
    wrap(tokenizer, SAMPLE)


@pytest.mark.parametrize("template", [*BROKEN, "", " "])
def test_templates_that_raise_or_hide_the_message(template: str) -> None:
    tried("chat template", lambda: _prompt(template), may_pass=not template)  # none at all is no template


@pytest.mark.parametrize(
    "several", [{"tool_use": "x"}, {"a": "x", "b": "y"}, {"rag": "{{ messages[0]['content'] }}"}, 5, [5]]
)
def test_several_templates_without_a_default(several: Any) -> None:
    tried("chat template", lambda: _prompt(several))


def test_a_default_among_several_templates_is_taken() -> None:
    _prompt({"tool_use": "{{ nope() }}", "default": TOKENIZER.chat_template})


PIECES = (
    "{{ messages[0]['content'] }}",
    "{% if ",
    "%}",
    "{{",
    "}}",
    "messages",
    "[0]",
    "|",
    "'",
    "1",
    "+",
    " ",
    "for",
    "in",
)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join))
def test_templates_of_any_pieces(template: str) -> None:
    tried("chat template", lambda: _prompt(template), may_pass=True)


@pytest.mark.parametrize("template", [text for text in BROKEN if text != "nothing"])
def test_templates_that_break_on_the_second_question(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{{% if messages | length > 1 %}}{template}{{% endif %}}{{{{ messages[0]['content'] }}}}"
    tried("chat template", lambda: turn_tokens(tokenizer, SAMPLE, Turn("And then?", 4)))
