"""Length fitting of RULER prompts: how many haystack units fill a length, and how a sample that is too long shrinks.

A length includes the prompt, the answer prefix, the tokens to generate and what the chat template adds. Source:
NVIDIA/RULER@c3f5e3b, which searches once per length with a drawn sample and shrinks single samples that exceed it.
Differences: a sample shrinks by its own overshoot and not by a fixed 5 to 500 units, so it ends close to the length,
and a length that fits nothing raises instead of looping.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tasks.base import Tokenizer

OFFICIAL_SAMPLES = 500
LARGEST_LENGTH = 131072
SMALL = 4096
"""Below this length NVIDIA's generators use smaller variants."""


@dataclass(frozen=True)
class FittedPrompt:
    """A drawn sample. context ends where the question begins; context + question is the user's message."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplePlan:
    """What one sample is drawn from.

    index: which sample. draw: every random choice comes from it. at: point of an evenly spread sequence in [0, 1), the
    place of the one answer in the haystack.
    """

    length: int
    index: int
    draw: Random
    at: float


class Generator(ABC):
    """Draws prompts of one task. A unit is what the haystack is measured in: words, lines, documents."""

    generation: int
    """Tokens to generate."""

    available: int | None = None
    """Samples that exist, or None for any number. Where they are counted, those that do not fit are passed over."""

    @abstractmethod
    def least(self, length: int, index: int) -> int:
        """Return the fewest units of sample `index` at this length."""

    @abstractmethod
    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        """Return the sample of a plan with a haystack of `units`."""

    def search(self, spare: Callable[[int], int], *, length: int, least: int) -> int:
        """Find the units for a length. spare: units -> tokens left over, negative when too long; `least` fits."""
        return largest(spare, least)


def tokens(prompt: FittedPrompt, tokenizer: Tokenizer) -> int:
    """Return the number of tokens of the user's message and the answer prefix, without what the chat template adds."""
    message = len(tokenizer.encode(prompt.context + prompt.question))
    return message + len(tokenizer.encode(prompt.answer_prefix))


def room(length: int, generation: int, tokenizer: Tokenizer) -> int:
    """Return how many tokens a prompt may have at a length."""
    return length - generation - tokenizer.template_tokens


def largest(spare: Callable[[int], int], least: int) -> int:
    """Return the largest number of units with tokens to spare, for a `spare` that falls with the units; `least` fits.

    The bracket is halved, or cut where a straight line through its ends crosses zero.
    """
    low, left = least, spare(least)
    step = max(1, least)
    high, right = low + step, spare(low + step)
    while right >= 0:
        low, left, step = high, right, 2 * step
        high, right = low + step, spare(low + step)
    line = True
    while high - low > 1:
        guess = low + left * (high - low) // max(1, left - right) if line else (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        here = spare(middle)
        low, left, high, right = (middle, here, high, right) if here >= 0 else (low, left, middle, here)
        line = not line
    return low


def shrink(
    build: Callable[[int], FittedPrompt], used: Callable[[FittedPrompt], int], *, room: int, units: int, least: int
) -> tuple[FittedPrompt, int] | None:
    """Return a prompt of at most `units` that fits `room` tokens, and its tokens; None when `least` do not fit.

    A prompt that is too long loses its overshoot's share of the units.
    """
    units = max(units, least)
    prompt = build(units)
    while (size := used(prompt)) > room:
        if units == least:
            return None
        units = max(least, units + (room - size) * units // size)
        prompt = build(units)
    return prompt, size
