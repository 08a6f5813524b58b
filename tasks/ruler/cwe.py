"""RULER's common words extraction: the ten words that a numbered list repeats most, after one worked example.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/common_words_extraction.py and constants.py. Differences: NVIDIA
changes to a file of English words when more words are needed than wonderwords holds; here adjective-noun pairs top
the list up (`meta` counts them). The order of the list is drawn per sample, where NVIDIA's fixed seed repeats it.
"""

from random import Random

from tasks.ruler.corpus import all_words, draw_word
from tasks.ruler.fit import SMALL, FittedPrompt, Generator, SamplePlan

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
)
QUESTION = "Question: What are the 10 most common words in the above list?"
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10


class CommonWords(Generator):
    """Draws the prompts. Units: different words in the list."""

    generation = 120

    def least(self, length: int, index: int) -> int:
        return 2 * COMMON

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        small, draw = plan.length < SMALL, plan.draw
        shown, shown_answers, _ = _list(20 if small else 40, repeats=(3, 1) if small else (10, 3), draw=draw)
        asked, answers, pairs = _list(units, repeats=(6, 1) if small else (30, 3), draw=draw)
        shot = TEMPLATE.format(context=shown) + QUESTION + ANSWER_PREFIX + " " + _numbered(shown_answers)
        return FittedPrompt(
            context=f"{shot}\n{TEMPLATE.format(context=asked)}",
            question=QUESTION,
            answer_prefix=ANSWER_PREFIX,
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
