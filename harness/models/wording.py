"""What a model is told so that it repeats its prompt, as token ids: KVzip's words within the model's chat template.

Source: https://arxiv.org/abs/2505.23416, https://github.com/snu-mllab/KVzip at 5d84729 (model/wrapper.py:188,
model/template.py). The request goes on in the user's message, which holds the context alone there. A prompt whose
message is closed already, with its question in it, is asked in a message after that, and what closed it is not
repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from harness.errors import HarnessError
from harness.models.prompt import MARK, TaskTokenizer, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = "Repeat the previous context exactly."
PART = "Repeat the part of the previous context exactly, starting with "
APART, ANSWER = "\n\n", "\n\nAnswer: "
"""Before a request; and after one to a model without a chat template."""
LAST = 8
"""Tokens of the chunk before that a later one is asked for by."""

Ids = tuple[int, ...]
Encode = Callable[[str], list[int]]


class Request(NamedTuple):
    """Token ids: the request for a prompt's first chunk, that for a later one, and what goes before the answer."""

    whole: Ids
    part: Ids
    closing: Ids


class Span(NamedTuple):
    """What of a prompt is repeated, `start` to `end`, and by which request."""

    start: int
    end: int
    request: Request


@dataclass(frozen=True)
class Wording:
    """The requests that a tokenizer makes.

    raw: after raw text. bos: before it. opening: what the chat template puts before a user's text; empty without one.
    sure: how many of its tokens are there whatever the text is: the last one may merge with it. going_on, anew: within
    a user's message, and after one that is closed.
    """

    raw: Request
    bos: Ids = ()
    opening: Ids = ()
    sure: int = 0
    going_on: Request | None = None
    anew: Request | None = None

    def span(self, ids: Sequence[int]) -> Span:
        """Return what of a prompt is repeated: all but what the chat template, or a BOS, adds around the text."""
        ids, raw = tuple(ids), len(self.bos) if tuple(ids[: len(self.bos)]) == self.bos else 0
        alike = next((i for i, (a, b) in enumerate(zip(ids, self.opening, strict=False)) if a != b), len(self.opening))
        if self.going_on is None or alike < self.sure:
            return Span(raw if raw < len(ids) else 0, len(ids), self.raw)
        end = _last(ids, self.going_on.closing)
        if end is None or end <= alike or self.anew is None:
            return Span(alike if alike < len(ids) else 0, len(ids), self.going_on)
        return Span(alike, end, self.anew)


def wording(tokenizer: PreTrainedTokenizerBase) -> Wording:
    """Return the requests of a tokenizer; a chat template that shows no message as it is counts for none."""
    encode = TaskTokenizer(tokenizer).encode
    bos = tokenizer.bos_token_id
    raw, first = _request(encode, APART, ANSWER), () if bos is None else (int(bos),)
    parts = _parts(tokenizer, MARK)
    if len(parts) != 2:
        return Wording(raw, first)
    turn = _parts(tokenizer, "Hello.", MARK, MARK)
    anew = _request(encode, turn[1], turn[2]) if len(turn) == 3 else None
    opening = tuple(encode(parts[0]))
    sure = len(opening) - (opening[-1:] != () and opening[-1] not in tokenizer.added_tokens_decoder)
    return Wording(raw, first, opening, sure, _request(encode, APART, parts[1]), anew)


def _parts(tokenizer: PreTrainedTokenizerBase, *contents: str) -> list[str]:
    """What the chat template puts around the marks of a conversation; nothing without one, or one that refuses it."""
    try:
        return render(tokenizer, *contents).split(MARK) if tokenizer.chat_template else []
    except HarnessError:
        return []


def _request(encode: Encode, before: str, closing: str) -> Request:
    return Request(*(tuple(encode(text)) for text in (before + WHOLE, before + PART, closing)))


def _last(ids: Ids, wanted: Ids) -> int | None:
    """Where `wanted` stands last in `ids`, or all of it but its end, which may have merged with what follows."""
    for own in (wanted, wanted[:-1]):
        places = range(len(ids) - len(own), -1, -1) if own else ()
        found = next((at for at in places if ids[at : at + len(own)] == own), None)
        if found is not None:
            return found
    return None
