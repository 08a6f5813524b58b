"""The kinds of work: what a prompt lists, and the step of an answer for each line of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from tasks.graded.words import FRUITS, NAMES, PLACES, THINGS, some

COLOURS = ("red", "blue", "green", "white", "black", "brown")
FRUIT_CYCLE, COLOUR_CYCLE = 4, 2  # words of a table's columns, which come in turn
END = "END"
SHOWN = (True, False, True, True, False, True)  # which of the first lines bring two, or move the box: both are shown


@dataclass(frozen=True)
class Work:
    """One piece of work. intro: what to do, and a heading. lines: of the prompt. title, answer: of what is asked for.

    Lines and answer are numbered down to 1, and end with `0. END`; each line has a step of the answer.
    """

    intro: str
    lines: tuple[str, ...]
    title: str
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A task. make: (lines, draw) to a piece of work with so many."""

    name: str
    make: Callable[[int, Random], Work]


def _table(count: int, draw: Random) -> Work:
    """Two tables by one rule: fruits and colours come in turn, and every row has the table's name."""
    fruits, colours = some(FRUITS, FRUIT_CYCLE, draw), some(COLOURS, COLOUR_CYCLE, draw)
    tables = some(NAMES, 2, draw)
    rows = [
        [f"{fruits[at % FRUIT_CYCLE]}, {colours[at % COLOUR_CYCLE]}, {name}" for at in range(count)] for name in tables
    ]
    intro = f"Both tables follow one rule. Write table {tables[1]}, down to 0."
    return Work(f"{intro}\n\nTable {tables[0]}", _down(rows[0]), f"Table {tables[1]}", _down(rows[1]))


def _list(count: int, draw: Random) -> Work:
    """Lost things and their owners, which are to be copied."""
    lost = zip(_many(NAMES, count, draw), _many(THINGS, count, draw), strict=True)
    rows = _down([f"{name}: {thing}" for name, thing in lost])
    return Work("Copy the list, down to 0.\n\nList", rows, "Copy", rows)


def _sums(count: int, draw: Random) -> Work:
    """Apples that people bring, one or two, and how many there are then."""
    brought = [*(1 + more for more in SHOWN), *(draw.choice((1, 2)) for _ in range(count))][:count]
    totals = list(accumulate(brought))
    lines = [f"{name}: {more}" for name, more in zip(_many(NAMES, count, draw), brought, strict=True)]
    sums = [f"{total - more} + {more} = {total}" for total, more in zip(totals, brought, strict=True)]
    steps = [f"{line}, {text}" for line, text in zip(lines, sums, strict=True)]
    intro = "Count the apples that these people bring, down to 0."
    return Work(f"{intro}\n\nApples", _down(lines), "Count", _down(steps))


def _state(count: int, draw: Random) -> Work:
    """A box that people carry somewhere or leave where it is, and where it is then."""
    lines, steps, place = [], [], ""
    for at, (name, goal) in enumerate(zip(_many(NAMES, count, draw), _many(PLACES, count, draw), strict=True)):
        waits = not SHOWN[at] if at < len(SHOWN) else draw.random() < 0.5
        place = place if waits else goal
        lines.append(f"{name}: {'wait' if waits else goal}")
        steps.append(f"{lines[-1]}, at {place}")
    intro = "A box is carried about. Write where it is after each step, down to 0."
    return Work(f"{intro}\n\nSteps", _down(lines), "Box", _down(steps))


def _many(words: tuple[str, ...], count: int, draw: Random) -> list[str]:
    """Words in drawn orders, all of them before one comes again."""
    found: list[str] = []
    while len(found) < count:
        found += some(words, len(words), draw)
    return found[:count]


def _down(rows: Sequence[str]) -> tuple[str, ...]:
    """The rows, each behind its number, down to 1, and the end."""
    return tuple(f"{len(rows) - at}. {row}" for at, row in enumerate([*rows, END]))


KINDS = (Kind("table", _table), Kind("list", _list), Kind("sums", _sums), Kind("state", _state))
