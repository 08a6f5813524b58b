"""RULER's frequent words extraction: the three most frequent words of a coded text with zeta-distributed counts.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/freq_words_extraction.py and constants.py. The most frequent rank
is written as dots and not asked for. Difference: the order of the text is drawn per sample (NVIDIA repeats one fixed
seed).
"""

import string
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

from tasks.ruler.corpus import letters
from tasks.ruler.fit import FittedPrompt, Generator, SamplePlan

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
)
QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
DOTS = "..."
LETTERS = 6
ASKED = 3
SCALE = 10**40
ZETA_2 = 1_6449340668_4822643647_2415166646_0251892189  # the zeta function at alpha = 2.0, x SCALE: pi^2 / 6


class CodedWords(Generator):
    """Draws the prompts. Units: words that the counts of all ranks, infinitely many, would sum to."""

    generation = 50

    def least(self, length: int, index: int) -> int:
        units = 1
        while not _told_apart(counts(units, ASKED + 2)):
            units += 1
        return units

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        draw = plan.draw
        size = max(ASKED + 2, plan.length // 50)
        vocabulary = [DOTS, *letters(size - 1, alphabet=string.ascii_lowercase, size=LETTERS, draw=draw)]
        text = [word for word, count in zip(vocabulary, counts(units, size), strict=True) for _ in range(count)]
        draw.shuffle(text)
        return FittedPrompt(
            context=TEMPLATE.format(context=" ".join(text)),
            question=QUESTION,
            answer_prefix=ANSWER_PREFIX,
            answers=tuple(vocabulary[1 : ASKED + 1]),
            meta={"words": len(text)},
        )

    def search(self, spare: Callable[[int], int], *, length: int, least: int) -> int:
        """Grow from max_len // 6 in steps of max_len // 32 and return the last size that fits."""
        step = max(1, (length - self.generation) // 32)
        units = max(least, (length - self.generation) // LETTERS)
        while units > least and spare(units) < 0:
            units = max(least, units - step)
        while spare(units + step) >= 0:
            units += step
        return units


@cache
def counts(units: int, size: int) -> tuple[int, ...]:
    """Return how often each rank of a vocabulary of `size` words appears: units / (zeta(2) rank^2), rounded down.

    In whole numbers, so that no machine's floating point decides.
    """
    return tuple(units * SCALE // (ZETA_2 * rank * rank) for rank in range(1, size + 1))


def _told_apart(ranked: Sequence[int]) -> bool:
    return all(a > b for a, b in pairwise(ranked[: ASKED + 2]))
