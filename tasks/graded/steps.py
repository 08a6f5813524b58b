"""Tracking: what is true after several steps. Ordering: what came first, next, and in which order."""

from itertools import pairwise
from random import Random

from tasks.graded.puzzle import Dial, Kind, Puzzle
from tasks.graded.scores import leads, listed_in_order
from tasks.graded.words import NAMES, PLACES, THINGS, numbers, some

CHAINS = 3


def _moves(moves: int, draw: Random) -> Puzzle:
    """A thing that is carried on: where it is at last."""
    (thing,), places = some(THINGS, 1, draw), some(PLACES, moves + 1, draw)
    lines = [f"The {thing} is moved to the {place}." for place in places]
    question = f"Question: Where is the {thing} in the end?\n"
    prefix = f" In the end the {thing} is moved to the"
    return Puzzle(tuple(lines), tuple(lines[-1:]), question, prefix, (places[-1],), ordered=True)


def _hands(hands: int, draw: Random) -> Puzzle:
    """A thing that goes from hand to hand: who has it at last."""
    (thing,), names = some(THINGS, 1, draw), some(NAMES, hands + 2, draw)
    lines = tuple(f"{a} gives the {thing} to {b}." for a, b in pairwise(names))
    question = f"Question: Who is given the {thing} in the end?\n"
    return Puzzle(lines, lines[-1:], question, f" In the end someone gives the {thing} to", (names[-1],), ordered=True)


def _same(hops: int, draw: Random) -> Puzzle:
    """Boxes that hold what other boxes hold."""
    names = some(NAMES, CHAINS * (hops + 1), draw)
    values = numbers(CHAINS, draw)
    chains = [names[at::CHAINS] for at in range(CHAINS)]
    lines = [f"{chain[0]} has number {value}." for chain, value in zip(chains, values, strict=True)]
    for row in range(hops):
        lines += [f"{chain[row + 1]} has the same number as {chain[row]}." for chain in chains]
    needed = tuple(lines[::CHAINS])
    asked = chains[0][-1]
    question = f"Question: Which number does {asked} have?\n"
    return Puzzle(tuple(lines), needed, question, f" {asked} has number", (values[0],), ordered=True)


def _visitors(count: int, draw: Random) -> tuple[list[str], tuple[str, ...]]:
    names = some(NAMES, count, draw)
    return names, tuple(f"At the gate came a visitor named {name}." for name in names)


def _first(count: int, draw: Random) -> Puzzle:
    names, lines = _visitors(count, draw)
    question = "Question: Who was the first visitor at the gate?\n"
    return Puzzle(lines, lines[:1], question, " The first at the gate was a visitor named", (names[0],), ordered=True)


def _last(count: int, draw: Random) -> Puzzle:
    names, lines = _visitors(count, draw)
    question = "Question: Who was the last visitor at the gate?\n"
    return Puzzle(lines, lines[-1:], question, " The last at the gate was a visitor named", (names[-1],), ordered=True)


def _next(count: int, draw: Random) -> Puzzle:
    names, lines = _visitors(count, draw)
    at = draw.randrange(count - 1)
    question = f"Question: Who was the next visitor at the gate after {names[at]}?\n"
    prefix = f" After {names[at]} came a visitor named"
    return Puzzle(lines, lines[at : at + 2], question, prefix, (names[at + 1],), ordered=True)


def _order(count: int, draw: Random) -> Puzzle:
    names, lines = _visitors(count, draw)
    question = "Question: Who came to the gate, in order?\n"
    return Puzzle(lines, lines, question, " The visitors, in order, were named", tuple(names), ordered=True)


VISITORS = "Remember who came to the gate, and in which order."
COUNTS = (1, 2, 3, 4, 6, 8)
KINDS = (
    Kind("tracking_moves", Dial("moves", (0, 1, 2, 3, 4, 6, 8)), 16, leads, "Remember where things are.", _moves),
    Kind("tracking_hands", Dial("hands", (0, 1, 2, 3, 4, 6)), 16, leads, "Remember who has what.", _hands),
    Kind("tracking_same", Dial("hops", (0, 1, 2, 3, 4)), 16, leads, "Remember everyone's number.", _same),
    Kind("ordering_first", Dial("visitors", COUNTS), 16, leads, VISITORS, _first),
    Kind("ordering_last", Dial("visitors", COUNTS), 16, leads, VISITORS, _last),
    Kind("ordering_next", Dial("visitors", (2, 3, 4, 6, 8)), 16, leads, VISITORS, _next),
    Kind("ordering_list", Dial("visitors", COUNTS), 64, listed_in_order, VISITORS, _order),
)
