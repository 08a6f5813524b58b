"""From a sample to token ids: chat template, answer prefix, and the border up to which tokens belong to the context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import HarnessError, line_of
from tasks.base import Sample, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "KVH7CONTENT7MARK"
ADVICE = "use a model whose template leaves user messages as they are"

DAY = datetime(2024, 7, 26)
"""The day on which every prompt is written."""
DATED = f"the chat template writes a date, always {DAY:%Y-%m-%d}"


DIRECTIVES = (*(f"-{letter}" for letter in "dmHIMS"), *"aAbBcdDeFhHIjmMnpRSTuUVwWxXyYzZ")
"""Those of strftime."""


def dated(tokenizer: PreTrainedTokenizerBase, day: datetime = DAY) -> dict[str, Any]:
    """Options by which a chat template writes `day`, whenever and wherever it is rendered.

    A date comes as a variable (`date_string`, Llama 3.1) or from a function of transformers (`strftime_now`, Llama
    3.2), which a macro of that name takes the place of. Raises ValueError for several templates without a default.
    """
    options, template = {"date_string": f"{day:%d %b %Y}"}, str(tokenizer.get_chat_template())
    if "strftime_now" in template:
        steps = "".join(f".replace({'%' + name!r}, {day.strftime('%' + name)!r})" for name in DIRECTIVES)
        macro = f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro +%}}"
        options["chat_template"] = macro + template
    return options


class TaskTokenizer:
    """The tokenizer of the model under test as tasks see it (`tasks.base.Tokenizer`): no special tokens in or out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.template_tokens = template_tokens(tokenizer)

    def encode(self, text: str) -> list[int]:
        if self._tokenizer.is_fast:  # without the offsets that a call computes: half the time
            return list(self._tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count tokens around one user message; without a chat template, those that are put before raw text (a BOS).

    Raises HarnessError for a template that refuses every message.
    """
    if not tokenizer.chat_template:
        return [*tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"], 0].index(0)
    try:
        around = render(tokenizer, "")
    except HarnessError:  # some refuse an empty message
        around = render(tokenizer, MARK).replace(MARK, "")
    return len(tokenizer(around, add_special_tokens=False)["input_ids"])


def open_ended(encoded: Any) -> list[int]:
    """The token ids of a text without those that the tokenizer added behind it, which is none of most tokenizers.

    encoded: with its `special_tokens_mask`.
    """
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    end = next((at + 1 for at in reversed(range(len(ids))) if not added[at]), len(ids))
    return ids[:end]


def template_notes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What a reader of records must know of the chat template: that it writes a date."""
    if not tokenizer.chat_template:
        return ()
    changes = render(tokenizer, MARK) != render(tokenizer, MARK, day=datetime(1999, 12, 31))
    return (DATED,) if changes else ()


class Wrapped(NamedTuple):
    """A prompt as token ids. context: how many leading ones hold nothing beyond the end of the sample's context.

    needle: indexes of the tokens that hold a part of one of the sample's needles. protected: of its spans to protect.
    """

    ids: list[int]
    context: int
    needle: tuple[int, ...] = ()
    protected: tuple[int, ...] = ()


def wrap(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Wrapped:
    """Return the whole prompt of a sample.

    A chat template brings its own special tokens; raw text gets those that the tokenizer puts before it (a BOS, unless
    it starts with one), and none behind it (`add_eos_token`): no model goes on after an end of text.
    The answer prefix is joined as text, before tokenising, so that merges are those of natural text.
    Raises HarnessError: the template fails or rewrites the message, or the tokenizer does not tell offsets.
    """
    if not tokenizer.is_fast:
        raise HarnessError(f"{type(tokenizer).__name__} gives no character offsets; use a model with a fast tokenizer")
    content = sample.context + sample.question
    text, border, bos = content, len(sample.context), tokenizer.bos_token
    special = not (isinstance(bos, str) and text.startswith(bos))
    if sample.chat and tokenizer.chat_template:
        text, border = _chat(tokenizer, content, border)
        special = False
    whole = text + sample.answer_prefix
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    encoded = tokenizer(whole, add_special_tokens=special, **options)
    ids, offsets = open_ended(encoded), encoded["offset_mapping"]
    context = next((index for index, (_, end) in enumerate(offsets[: len(ids)]) if end > border), len(ids))
    needle, protected = (_touching(text, offsets, sample.meta.get(name, ())) for name in ("needles", "protect"))
    return Wrapped(ids, context, needle, protected)


def turn_tokens(tokenizer: PreTrainedTokenizerBase, sample: Sample, turn: Turn) -> list[int]:
    """Return the tokens between an answer and the next: the end of the answer's message, the user's, the answer's head.

    They are what the chat template adds for another question to a conversation; without one, a blank line and the text.
    Raises HarnessError when the template fails, or does not show both messages as they are.
    """
    text = f"\n\n{turn.question}"
    if sample.chat and tokenizer.chat_template:
        parts = render(tokenizer, "Hello.", MARK, turn.question).split(MARK)
        if len(parts) != 2 or turn.question.strip() not in parts[1]:
            raise HarnessError("the chat template does not show a conversation as it is; use a model whose does")
        text = parts[1]
    return TaskTokenizer(tokenizer).encode(text + turn.answer_prefix)


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, wrapped: Wrapped, reference: str | None, *, limit: int
) -> list[int]:
    """Return the first `limit` tokens of a reference as text that goes on from the prompt; none without a reference."""
    if not reference or not limit:
        return []
    plain = TaskTokenizer(tokenizer)
    tail = plain.decode(wrapped.ids[-1:])
    glued = not tail or tail[-1].isspace() or reference[0].isspace() or ord(reference[0]) >= 0x2E80
    return plain.encode(reference if glued else f" {reference}")[:limit]


def _touching(text: str, offsets: Sequence[tuple[int, int]], spans: Iterable[str]) -> tuple[int, ...]:
    """Indexes of the tokens that hold a part of the first occurrence of one of the spans in `text`."""
    places = [(text.find(span), len(span)) for span in spans if span in text]
    found = enumerate(offsets)
    return tuple(i for i, (a, b) in found if any(a < b and a < at + size and b > at for at, size in places))


def token_sha256(ids: Iterable[int]) -> str:
    """Return the name of a prompt: the SHA-256 of its token ids, comma-separated decimal."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def _chat(tokenizer: PreTrainedTokenizerBase, content: str, context: int) -> tuple[str, int]:
    """The rendered message and the character where its first `context` characters end.

    A mark rendered in the message's place gives what the template puts before and after it. So a text that occurs
    twice cannot mislead, and a template that trims the message (Llama 3 does) is seen to do so.
    """
    marked = render(tokenizer, MARK)
    if marked.count(MARK) != 1:
        raise HarnessError(f"the chat template shows a message {marked.count(MARK)} times instead of once; " + ADVICE)
    head, tail = marked.split(MARK)
    text = render(tokenizer, content)
    body = text[len(head) : len(text) - len(tail)]
    leading = len(content) - len(content.lstrip())
    for cut in (0, leading):
        rest = content[cut + len(body) :]
        if text == head + body + tail and content[cut:].startswith(body) and not rest.strip():
            return text, len(head) + min(max(context - cut, 0), len(body))
    raise HarnessError(
        f"the chat template rewrites the message, so its context cannot be found in the prompt; {ADVICE}"
    )


def render(tokenizer: PreTrainedTokenizerBase, *contents: str, day: datetime = DAY) -> str:
    """A conversation, which the user begins, up to the head of the next answer.

    Models that think aloud (Qwen3, SmolLM3) get no room for it: no benchmark's generation length leaves any.
    """
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    what = "a single user message" if len(said) == 1 else f"a conversation of {len(said)} messages"
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        return str(tokenizer.apply_chat_template(said, **options, **dated(tokenizer, day)))
    except Exception as error:  # a template is a program
        why = line_of(str(error) or type(error).__name__)[:300]
        raise HarnessError(f"the chat template refuses {what} ({why}); {ADVICE}") from None
