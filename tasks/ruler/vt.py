"""RULER's variable tracking: one chain of five assignments in noise, after one worked example.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/variable_tracking.py and constants.py. NVIDIA's example has up to
500 tokens and needs at least five noise lines. Differences: below 4096 tokens the example has at most a quarter of
the length; a haystack of fewer than five noise lines is split into its sentences, so that 512 tokens work; the
example's places are drawn per sample. With drawn contexts the lines are a span of `tasks.pool`, as many words each as
a noise line has, and the first of them are the example's: every sample has its own.
"""

import string
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from random import Random

from tasks.base import TaskError, Tokenizer
from tasks.pool import Span, Spans
from tasks.ruler.corpus import NOISE, letters
from tasks.ruler.family import SMALL, DrawnText, FittedPrompt, SamplePlan, largest, tokens

TEMPLATE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500


class ChainGenerator(DrawnText):
    """Draws the prompts. Units: lines."""

    generation = 30

    def __init__(self, tokenizer: Tokenizer, spans: Spans | None = None) -> None:
        self.tokenizer = tokenizer
        self.spans = spans
        self._examples: dict[int, int] = {}  # length -> noise lines of the example

    def units(self, length: int, index: int) -> int | None:
        if self.spans is None:
            return None
        lines = _lines(self.spans.at(length, index))
        return max(self.least(length, index), len(lines) - self._shown(lines, length))

    def least(self, length: int, index: int) -> int:
        return 1 if self.spans is None else HOPS + 1

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        draw = plan.draw
        value = str(draw.randint(10_000, 99_999))
        shown = value
        while shown == value:
            shown = str(draw.randint(10_000, 99_999))
        before, lines = self._noise(units, plan)
        example = _prompt(before, value=shown, size=3, draw=draw)
        asked = _prompt(lines, value=value, size=5, draw=draw)
        shot = f"{example.context}{example.question}{example.answer_prefix} {' '.join(example.answers)}\n"
        return FittedPrompt(
            context=f"{shot}\n{asked.context}",
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            answers=asked.answers,
            meta={**asked.meta, "group": span.group if (span := self.span(plan)) else "noise"},
        )

    def _noise(self, units: int, plan: SamplePlan) -> tuple[list[str], list[str]]:
        """The lines of the example and `units` lines of the haystack, without their chains."""
        span = self.span(plan)
        if span is None:
            return [NOISE] * self._example_lines(plan.length), [NOISE] * units
        lines = _lines(span)
        first = self._shown(lines, plan.length)
        return lines[:first], lines[first : first + units]

    def _shown(self, lines: Sequence[str], length: int) -> int:
        """How many of the lines the example has: as many as fit its limit, and at least one for each assignment."""

        def used(count: int) -> int:
            return tokens(_prompt(lines[:count], value="12345", size=3, draw=Random(0)), self.tokenizer)

        fitting = bisect_right(range(HOPS + 1, len(lines) - HOPS), _limit(length), key=used)
        return HOPS + max(1, fitting)

    def _example_lines(self, length: int) -> int:
        if length not in self._examples:

            def spare(lines: int) -> int:
                shown = _prompt([NOISE] * lines, value="12345", size=3, draw=Random(0))
                return _limit(length) - tokens(shown, self.tokenizer)

            self._examples[length] = largest(spare, 1) if spare(1) >= 0 else 1
        return self._examples[length]


def _limit(length: int) -> int:
    """Tokens of the worked example at most."""
    return EXAMPLE_TOKENS if length >= SMALL else length // 4


def _lines(span: Span) -> list[str]:
    """The words of a span in lines as long as a noise line."""
    words, size = span.text.split(), len(NOISE.split())
    return [" ".join(words[at : at + size]) for at in range(0, len(words), size)]


def _prompt(lines: Sequence[str], *, value: str, size: int, draw: Random) -> FittedPrompt:
    """A chain of variables of `size` letters in these lines, without an example."""
    names = letters(HOPS + 1, alphabet=string.ascii_uppercase, size=size, draw=draw)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    haystack = list(lines)
    if len(haystack) < len(chain):
        haystack = [f"{sentence}." for line in haystack for sentence in line.rstrip(".").split(". ")]
    if len(haystack) < len(chain):
        few = f"a haystack of {len(haystack)} sentences has no place for {len(chain)} assignments"
        raise TaskError(f"ruler/vt: {few}; ask for more tokens")
    places = sorted(draw.sample(range(len(haystack)), len(chain)))
    for already, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        haystack.insert(place + already, assignment)
    return FittedPrompt(
        context=TEMPLATE.format(context="\n".join(haystack)),
        question=QUESTION.format(query=value),
        answer_prefix=ANSWER_PREFIX.format(num_v=len(names), query=value),
        answers=tuple(names),
        meta={"needles": [assignment.strip() for assignment in chain]},
    )
