"""RULER's variable tracking: one chain of five assignments in noise, after one worked example.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/variable_tracking.py and constants.py. NVIDIA's example has up to
500 tokens and needs at least five noise lines. Differences: below 4096 tokens the example has at most a quarter of
the length; a haystack of fewer than five noise lines is split into its sentences, so that 512 tokens work; the
example's places are drawn per sample.
"""

import string
from itertools import pairwise
from random import Random

from tasks.base import Tokenizer
from tasks.ruler.corpus import NOISE, letters
from tasks.ruler.family import SMALL, FittedPrompt, Generator, SamplePlan, largest, tokens

TEMPLATE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500


class ChainGenerator(Generator):
    """Draws the prompts. Units: noise lines."""

    generation = 30

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._examples: dict[int, int] = {}  # length -> noise lines of the example

    def least(self, length: int, index: int) -> int:
        return 1

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        draw = plan.draw
        value = str(draw.randint(10_000, 99_999))
        shown = value
        while shown == value:
            shown = str(draw.randint(10_000, 99_999))
        example = _prompt(self._example_lines(plan.length), value=shown, size=3, draw=draw)
        asked = _prompt(units, value=value, size=5, draw=draw)
        shot = f"{example.context}{example.question}{example.answer_prefix} {' '.join(example.answers)}\n"
        return FittedPrompt(
            context=f"{shot}\n{asked.context}",
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            answers=asked.answers,
            meta=asked.meta,
        )

    def _example_lines(self, length: int) -> int:
        if length not in self._examples:
            limit = EXAMPLE_TOKENS if length >= SMALL else length // 4

            def spare(lines: int) -> int:
                return limit - tokens(_prompt(lines, value="12345", size=3, draw=Random(0)), self.tokenizer)

            self._examples[length] = largest(spare, 1) if spare(1) >= 0 else 1
        return self._examples[length]


def _prompt(lines: int, *, value: str, size: int, draw: Random) -> FittedPrompt:
    """A chain of variables of `size` letters in `lines` noise lines, without an example."""
    names = letters(HOPS + 1, alphabet=string.ascii_uppercase, size=size, draw=draw)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    haystack = [NOISE] * lines
    if lines < len(chain):
        haystack = [f"{sentence}." for line in haystack for sentence in line.rstrip(".").split(". ")]
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
