"""What single options may be, wherever they come from: command line, TOML or Python. Each range is stated here.

A boolean is no number and a number no boolean; every number is finite and every list short enough to be a list.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict, ValidationInfo

from harness.errors import LINE_CHARS, UNSAFE, shown
from harness.records.paths import expanded

MOST_TOKENS = 10_000_000
"""Of a prompt or an answer."""
MOST_SAMPLES = 100_000
"""Of a task."""
MOST_ITEMS = 1000
"""Of a list: methods, tasks, budgets, lengths."""
DEPTH = 8
"""Lists and tables within one another, in the value of a method's parameter."""
MOST_BYTES = 2**63 - 1


def option(field: ValidationInfo) -> str:
    """The field's name as it is typed."""
    return "--" + str(field.field_name).removesuffix("_s").replace("_", "-")


def between(least: float, most: float) -> Callable[[Any, ValidationInfo], Any]:
    """A rule for a number. Its ValueError says the option as it is typed, and which way it is out of range."""

    def check(number: Any, field: ValidationInfo) -> Any:
        if number is None or least <= number <= most:
            return number
        what = f"is too large; give at most {most:,}"
        if not number > least:  # nan too
            what = f"is too small; give at least {least:,}" if least else "is negative; give 0 to turn it off"
        raise ValueError(f"{option(field)} {shown(number)} {what}")

    return check


def _word(text: str, field: ValidationInfo) -> str:
    if not text.strip() or len(text) > 4 * LINE_CHARS or UNSAFE.search(text):
        raise ValueError(f"{option(field)} {shown(text)} cannot be read; give a short text without control codes")
    return text


def _path(text: str, field: ValidationInfo) -> str:
    try:
        return expanded(text)
    except ValueError as error:
        raise ValueError(f"{option(field)} {error}") from None


def _once(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is asked for twice is there once."""
    return tuple(dict.fromkeys(given))


def _some(given: tuple[Any, ...], field: ValidationInfo) -> tuple[Any, ...]:
    if not given:
        raise ValueError(f"no {field.field_name} asked for; give some with {option(field)} 1024,4096")
    return given


def _changes(given: dict[str, Any], field: ValidationInfo) -> dict[str, Any]:
    level: list[Any] = [*given, *given.values()]
    for _ in range(DEPTH):
        for value in level:
            whole = isinstance(value, int) and abs(value) > MOST_BYTES
            if whole or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{option(field)}: {shown(value)} is no number that can be used; give a finite one")
            if isinstance(value, str) and value:
                _word(value, field)
        lists = ([*v, *v.values()] if isinstance(v, dict) else v if isinstance(v, list | tuple) else () for v in level)
        level = [value for own in lists for value in own]
    if level:
        raise ValueError(f"{option(field)} {shown(given)} is nested more than {DEPTH} deep; give a simple value")
    return given


Flag = Annotated[bool, Strict()]
Tokens = Annotated[int, Strict(), AfterValidator(between(1, MOST_TOKENS))]
TokensOrOff = Annotated[int, Strict(), AfterValidator(between(0, MOST_TOKENS))]
Samples = Annotated[int, Strict(), AfterValidator(between(1, MOST_SAMPLES))]
SamplesOrOff = Annotated[int, Strict(), AfterValidator(between(0, MOST_SAMPLES))]
Seed = Annotated[int, Strict(), AfterValidator(between(0, MOST_BYTES))]
TwoTokens = Annotated[int, Strict(), AfterValidator(between(2, MOST_TOKENS))]
"""As many as a prompt has at least, or an answer whose steps are timed."""
Times = Annotated[int, Strict(), AfterValidator(between(1, MOST_ITEMS))]
Seconds = Annotated[float, Strict(), AfterValidator(between(1, 1e6))]
Word = Annotated[str, AfterValidator(_word)]
PathText = Annotated[str, AfterValidator(_path)]
Words = Annotated[tuple[Word, ...], Field(max_length=MOST_ITEMS), AfterValidator(_once)]
Lengths = Annotated[tuple[Tokens, ...], Field(max_length=MOST_ITEMS), AfterValidator(_some), AfterValidator(_once)]
TwoTokenLengths = Annotated[tuple[TwoTokens, ...], Field(max_length=MOST_ITEMS), AfterValidator(_some)]
Changes = Annotated[dict[str, Any], AfterValidator(_changes)]
"""Changed parameters of methods, `method.parameter` to value."""
