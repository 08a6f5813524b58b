"""RULER's two aggregation tasks. Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic and constants.py there.

cwe, common_words_extraction.py: the ten words that a numbered list repeats most, after one worked example. fwe,
freq_words_extraction.py: the three most frequent words of a coded text with zeta-distributed counts, whose most
frequent rank is written as dots and not asked for. Differences: NVIDIA changes to a file of English words when more
words are needed than wonderwords holds; here adjective-noun pairs top the list up (`meta` counts them). The order of
list and text is drawn per sample, where NVIDIA's fixed seed repeats it.
"""

import string
from collections.abc import Callable
from functools import cache
from itertools import count, pairwise
from random import Random

from tasks.ruler.corpus import all_words, draw_word, letters
from tasks.ruler.family import SMALL, FittedPrompt, Generator, SamplePlan

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
)
COMMON_QUESTION = "Question: What are the 10 most common words in the above list?"
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
CODED_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
)
CODED_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
DOTS = "..."
LETTERS = 6
ASKED = 3
SCALE = 10**40
ZETA_2 = 1_6449340668_4822643647_2415166646_0251892189  # the zeta function at alpha = 2.0, x SCALE: pi^2 / 6


class CommonWords(Generator):
    """Draws the prompts. Units: different words in the list."""

    generation = 120

    def least(self, length: int, index: int) -> int:
        return 2 * COMMON

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        small, draw = plan.length < SMALL, plan.draw
        shown, shown_answers, _ = _list(20 if small else 40, repeats=(3, 1) if small else (10, 3), draw=draw)
        asked, answers, pairs = _list(units, repeats=(6, 1) if small else (30, 3), draw=draw)
        shot = COMMON_TEMPLATE.format(context=shown) + COMMON_QUESTION + COMMON_PREFIX + " " + _numbered(shown_answers)
        return FittedPrompt(
            context=f"{shot}\n{COMMON_TEMPLATE.format(context=asked)}",
            question=COMMON_QUESTION,
            answer_prefix=COMMON_PREFIX,
            answers=tuple(answers),
            meta={"words": units, "pairs": pairs},
        )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _list(count: int, *, repeats: tuple[int, int], draw: Random) -> tuple[str, list[str], int]:
    """A numbered list of `count` words, its common words, and how many adjective-noun pairs topped the words up."""
    pool = dict.fromkeys(all_words())
    missing = max(0, count - len(pool))
    while len(pool) < count:
        pool[draw_word(draw)] = None
    words = draw.sample(list(pool), count)
    listed = words[:COMMON] * repeats[0] + words[COMMON:] * repeats[1]
    draw.shuffle(listed)
    return _numbered(listed), words[:COMMON], missing


class CodedWords(Generator):
    """Draws the prompts. Units: words that the counts of all ranks, infinitely many, would sum to."""

    generation = 50

    def least(self, length: int, index: int) -> int:
        return next(units for units in count(1) if all(a > b for a, b in pairwise(counts(units, ASKED + 2))))

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        draw = plan.draw
        size = max(ASKED + 2, plan.length // 50)
        vocabulary = [DOTS, *letters(size - 1, alphabet=string.ascii_lowercase, size=LETTERS, draw=draw)]
        text = [word for word, times in zip(vocabulary, counts(units, size), strict=True) for _ in range(times)]
        draw.shuffle(text)
        return FittedPrompt(
            context=CODED_TEMPLATE.format(context=" ".join(text)),
            question=CODED_QUESTION,
            answer_prefix=CODED_PREFIX,
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
