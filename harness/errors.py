"""Errors that end a command with one line and exit code 2."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Options = TypeVar("Options", bound=BaseModel)


class HarnessError(ValueError):
    """Bad input or an unusable environment; the message says what is wrong, the value seen and what to do."""


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
    first = error.errors()[0]
    if first["type"] == "value_error":
        return HarnessError(str(first["ctx"]["error"]))
    where = ".".join(map(str, first["loc"]))
    return HarnessError(f"option {where}: {first['msg']}, got {first['input']!r}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known word nearest to `word`, for a refusal of it; empty where none is near."""
    return "".join(f"; did you mean {close!r}?" for close in get_close_matches(word, list(known), n=1))
