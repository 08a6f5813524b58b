"""Aggregation: what many statements say together. Copying: a marked list, word for word."""

import string
from random import Random

from tasks.graded.puzzle import Dial, Kind, Puzzle
from tasks.graded.scores import leads, listed_in_any_order, listed_in_order
from tasks.graded.words import FRUITS, NAMES, THINGS, some

VOTES = 12  # votes for the fruit that wins
RIVALS = 3  # fruits that lose
LETTERS = 5  # of a word that means nothing


def _most(against: int, draw: Random) -> Puzzle:
    """Votes for fruits, of which one has the most. against: votes for the others, which share them evenly."""
    fruits = some(FRUITS, RIVALS + 1, draw)
    votes = fruits[:1] * VOTES + [fruits[1 + at % RIVALS] for at in range(against)]
    draw.shuffle(votes)
    names = some(NAMES, len(votes), draw)
    lines = tuple(f"{name} votes for the {fruit}." for name, fruit in zip(names, votes, strict=True))
    needed = tuple(line for line, fruit in zip(lines, votes, strict=True) if fruit == fruits[0])
    question = "Question: Which fruit has the most votes?\n"
    return Puzzle(lines, needed, question, " Most people vote for the", (fruits[0],))


def _voters(count: int, draw: Random) -> Puzzle:
    """As many votes for one fruit as for another: who votes for the one."""
    fruits, names = some(FRUITS, 2, draw), some(NAMES, 2 * count, draw)
    votes = fruits[:1] * count + fruits[1:] * count
    lines = tuple(f"The {fruit} has the vote of {name}." for name, fruit in zip(names, votes, strict=True))
    question = f"Question: Which {count} people vote for the {fruits[0]}?\n"
    return Puzzle(lines, lines[:count], question, f" The {fruits[0]} has the vote of", tuple(names[:count]))


def _kinds(kinds: int, draw: Random) -> Puzzle:
    """Fruits that are bought, each twice: which there are."""
    fruits, names = some(FRUITS, kinds, draw), some(NAMES, 2 * kinds, draw)
    lines = [f"At the market, {name} buys a basket of {fruit}." for name, fruit in zip(names, fruits * 2, strict=True)]
    question = f"Question: Which {kinds} different fruits were bought at the market?\n"
    return Puzzle(tuple(lines), tuple(lines), question, " At the market, people buy a basket of", tuple(fruits))


def _words(count: int, draw: Random) -> Puzzle:
    return _copied(some(THINGS, count, draw))


def _letters(count: int, draw: Random) -> Puzzle:
    return _copied(["".join(draw.choices(string.ascii_lowercase, k=LETTERS)) for _ in range(count)])


def _copied(words: list[str]) -> Puzzle:
    line = f"SHOPPING LIST: {', '.join(words)}."
    return Puzzle(
        (line,), (line,), "Question: What does the shopping list say? Repeat it.\n", " SHOPPING LIST:", tuple(words)
    )


VOTING = "Remember who votes for which fruit."
MARKET = "Remember what is bought at the market."
LISTS = "Remember the shopping list in this text."
KINDS = (
    Kind("aggregation_most", Dial("votes against", (0, 1, 2, 3, 4, 6, 9, 12)), 16, leads, VOTING, _most),
    Kind("aggregation_voters", Dial("voters", (1, 2, 3, 4, 6, 8)), 64, listed_in_any_order, VOTING, _voters),
    Kind("aggregation_kinds", Dial("kinds", (1, 2, 3, 4, 6, 8)), 64, listed_in_any_order, MARKET, _kinds),
    Kind("copying_words", Dial("words", (2, 4, 8, 16, 20, 24, 32)), 112, listed_in_order, LISTS, _words),
    Kind("copying_letters", Dial("words", (1, 2, 3, 4, 6, 8, 12)), 96, listed_in_order, LISTS, _letters),
)
