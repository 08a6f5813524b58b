"""Words and lines that RULER's haystacks are made of. Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic."""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from random import Random
from uuid import UUID

from tasks.base import TaskError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """Return the words of one wonderwords list, in its order. kind: `noun`, `adjective` or `verb`.

    Raises TaskError when wonderwords is not installed.
    """
    try:
        text = (files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise TaskError(f"RULER's words need the package wonderwords ({error}); install it") from None
    return tuple(line.rstrip() for line in text.splitlines() if line.strip())


@cache
def all_words() -> tuple[str, ...]:
    """Return every noun, adjective and verb once, sorted."""
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)}))


def draw_word(draw: Random) -> str:
    """Return an adjective-noun pair such as `quiet-harbor`."""
    return f"{draw.choice(word_list('adjective'))}-{draw.choice(word_list('noun'))}"


DRAWS: dict[str, Callable[[Random], str]] = {
    "words": draw_word,
    "numbers": lambda draw: str(draw.randint(1_000_000, 9_999_999)),
    "uuids": lambda draw: str(UUID(int=draw.getrandbits(128), version=4)),
}


def distinct(count: int, drawn: Callable[[], str]) -> list[str]:
    """Return `count` different values, in drawing order."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[drawn()] = None
    return list(values)


def letters(count: int, *, alphabet: str, size: int, draw: Random) -> list[str]:
    """Return `count` different words of `size` letters of an alphabet, in drawing order."""
    return distinct(count, lambda: "".join(draw.choices(alphabet, k=size)))
