"""Retrieval: one fact among others like it. Keys: several facts at once."""

import string
from random import Random

from tasks.graded.puzzle import Dial, Kind, Puzzle
from tasks.graded.scores import leading_digits, leads, listed_in_any_order
from tasks.graded.words import NAMES, THINGS, numbers, some

LABELS = 6  # letters of a label
GATES = 5  # gates besides the one asked for
SAFES = 3  # safes besides it


def _number(others: int, draw: Random) -> Puzzle:
    names = some(NAMES, others + 1, draw)
    values = numbers(others + 1, draw)
    lines = [_locker(name, value) for name, value in zip(names, values, strict=True)]
    asked = f" The locker number of {names[0]} is"
    return Puzzle(tuple(lines), tuple(lines[:1]), _what("locker number of " + names[0]), asked, (values[0],))


def _owner(others: int, draw: Random) -> Puzzle:
    names, things = some(NAMES, others + 1, draw), some(THINGS, others + 1, draw)
    lines = [f"Of all prizes, {name} won the {thing}." for name, thing in zip(names, things, strict=True)]
    question = f"Question: Who won the {things[0]}?\n"
    return Puzzle(tuple(lines), tuple(lines[:1]), question, f" The {things[0]} was won by", (names[0],))


def _digits(digits: int, draw: Random) -> Puzzle:
    names, values = some(NAMES, SAFES + 1, draw), numbers(SAFES + 1, draw, digits=digits)
    lines = [f"The safe code of {name} is {value}." for name, value in zip(names, values, strict=True)]
    asked = f" The safe code of {names[0]} is"
    return Puzzle(tuple(lines), tuple(lines[:1]), _what("safe code of " + names[0]), asked, (values[0],))


def _label(shared: int, draw: Random) -> Puzzle:
    """Labels that begin with the same letters, as many as the setting says, and go on with others."""
    start = "".join(draw.choices(string.ascii_uppercase, k=shared))
    firsts = draw.sample(string.ascii_uppercase, GATES + 1)
    rest = LABELS - shared - 1
    labels = [start + first + "".join(draw.choices(string.ascii_uppercase, k=rest)) for first in firsts]
    values = numbers(GATES + 1, draw)
    lines = [f"The code of gate {label} is {value}." for label, value in zip(labels, values, strict=True)]
    asked = f" The code of gate {labels[0]} is"
    return Puzzle(tuple(lines), tuple(lines[:1]), _what("code of gate " + labels[0]), asked, (values[0],))


def _all(count: int, draw: Random) -> Puzzle:
    values = tuple(numbers(count, draw))
    lines = tuple(f"One of the lucky numbers is {value}." for value in values)
    question = f"Question: Which {count} lucky numbers does the text name?\n"
    return Puzzle(lines, lines, question, " The lucky numbers are", values)


def _owned(count: int, draw: Random) -> Puzzle:
    """As many numbers of one owner as of another: those of the one."""
    (name, other), values = some(NAMES, 2, draw), numbers(2 * count, draw)
    owners = [name] * count + [other] * count
    lines = tuple(f"One of {owner}'s numbers is {value}." for owner, value in zip(owners, values, strict=True))
    question = f"Question: Which {count} numbers does {name} have?\n"
    return Puzzle(lines, lines[:count], question, f" {name}'s numbers are", tuple(values[:count]))


def _locker(name: str, value: str) -> str:
    return f"The locker number of {name} is {value}."


def _what(thing: str) -> str:
    return f"Question: What is the {thing}?\n"


LOCKER = "Remember the locker numbers in this text."
PRIZES = "Remember who won what in this text."
SAFE = "Remember the safe codes in this text."
GATE = "Remember the codes of gates in this text."
LUCKY = "Remember the lucky numbers in this text."
OWNED = "Remember whose numbers are in this text."
KINDS = (
    Kind("retrieval_number", Dial("others", (0, 2, 4, 8, 12, 16, 24, 32)), 16, leads, LOCKER, _number),
    Kind("retrieval_owner", Dial("others", (0, 1, 2, 3, 4, 6, 8, 12)), 16, leads, PRIZES, _owner),
    Kind("retrieval_digits", Dial("digits", (2, 4, 8, 12, 16, 20, 24)), 40, leading_digits, SAFE, _digits),
    Kind("retrieval_label", Dial("letters shared", (0, 1, 2, 3, 4, 5)), 16, leads, GATE, _label),
    Kind("keys_all", Dial("numbers", (1, 2, 3, 4, 6, 8)), 64, listed_in_any_order, LUCKY, _all),
    Kind("keys_owned", Dial("numbers", (1, 2, 3, 4, 6)), 64, listed_in_any_order, OWNED, _owned),
)
