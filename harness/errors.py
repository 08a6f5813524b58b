"""Errors that end a command with one line and exit code 2."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Options = TypeVar("Options", bound=BaseModel)


VALUE_CHARS = 200
"""Characters of a value in an error line."""
LINE_CHARS = 1000
"""Characters of an error line."""
CUT = "[...]"
ADVICE = {
    **{"extra_forbidden": "leave it out, or mend its name", "missing": "add it"},
    **{"tuple_type": 'write a list, ["a", "b"]', "list_type": 'write a list, ["a", "b"]', "dict_type": "write a table"},
    **{"int_type": "write a whole number", "float_type": "write a number", "string_type": 'write a text, "a"'},
    **{"bool_type": "write true or false", "too_long": "shorten it", "string_too_long": "shorten it"},
}
"""What to do about what pydantic refuses, by its name for the reason."""
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What a terminal obeys, hides or cannot encode: control codes, line breaks, marks of direction, halves of a pair."""


class HarnessError(ValueError):
    """Bad input or an unusable environment; the message says what is wrong, the value seen and what to do."""

    def __str__(self) -> str:
        return line_of(super().__str__())


def line_of(text: str) -> str:
    """A text as one line that a terminal shows as it is: what is unsafe escaped, the middle of a very long one cut."""
    return _cut(UNSAFE.sub(_escaped, text), LINE_CHARS)


def shown(value: object, most: int = VALUE_CHARS) -> str:
    """A value as an error line shows it: `repr` with what is unsafe escaped, at most `most` characters of it."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # the rest need not be read
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list too deep
        text = f"<a {type(value).__name__} too large to show>"
    return _cut(UNSAFE.sub(_escaped, text), most)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _cut(text: str, most: int) -> str:
    """At most so many characters, from both ends."""
    if len(text) <= most:
        return text
    head = (most - len(CUT)) // 2
    return text[:head] + CUT + text[len(text) - (most - len(CUT) - head) :]


def checked(model: type[Options], given: Mapping[str, Any]) -> Options:
    """The options of a command or a file as their model takes them. Raises HarnessError for the first it refuses."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise one_line(error) from None


def one_line(error: ValidationError) -> HarnessError:
    """The first thing that a specification refuses, as an error for the user.

    A rule of ours says all of it already: what is wrong, the value seen and what to do.
    """
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")  # what is no option, before all
    if first["type"] == "value_error":
        return HarnessError(str(first["ctx"]["error"]))
    where, advice = ".".join(map(str, first["loc"])), ADVICE.get(first["type"], "give another value")
    return HarnessError(f"option {shown(where)[1:-1]}: {first['msg']}, got {shown(first['input'])}; {advice}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known word nearest to `word`, for a refusal of it; empty where none is near."""
    return "".join(f"; did you mean {close!r}?" for close in get_close_matches(word.lower(), list(known), n=1))
