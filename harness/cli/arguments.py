"""What the commands share: a parser that complains in one line, and the types of their options.

A type here says what can be read at all; how large a number may be, the command's model (`harness.records.options`).
"""

import argparse
import re
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from harness.errors import HarnessError, line_of, shown
from harness.records.paths import path_of

RESULTS = Path("results")  # folder of run folders, where none is named
WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
REAL = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
NO_TEXT = re.compile("[\0\ud800-\udfff]")

Value = TypeVar("Value")


class Parser(argparse.ArgumentParser):
    """Ends with one line and exit code 2 for arguments that it cannot take, of which it shows what a line can hold."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"harness: {line_of(message)}; see `{self.prog} --help`\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = self.parse_known_args(args, namespace)
        if left:
            self.error(f"unknown arguments {shown(' '.join(left))}")
        return found

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:  # argparse would drop it and give an empty list
            raise argparse.ArgumentError(action, "'--' is no value; leave the option out or give one")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{shown(value)} is none of {', '.join(action.choices)}")


def check_words(words: Iterable[str]) -> None:
    """Raises HarnessError for a word of a command line that is no text, and so could be stored nowhere."""
    for number, word in enumerate(words, start=1):
        if NO_TEXT.search(word):
            raise HarnessError(f"argument {number}, {shown(word)}, is not UTF-8; write it in UTF-8")


def _typed(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """A type of argparse, which shows the message of no other error than its own."""

    @wraps(read)
    def checked(text: str) -> Value:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


@_typed
def place(text: str) -> Path:
    """A path, `~` and `$VARIABLE` filled in."""
    return path_of(text)


@_typed
def names(text: str) -> tuple[str, ...]:
    """The parts of a list, cut at commas outside brackets; one at least."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    if not any(part.strip() for part in parts):
        raise HarnessError(f"{shown(text)} names nothing; leave the option out or name something")
    return tuple(part.strip() for part in parts if part.strip())


@_typed
def whole(text: str) -> int:
    """A whole number, as it is usually written."""
    if not WHOLE.fullmatch(text):
        raise HarnessError(f"{shown(text)} is no whole number of at most 18 digits; write one such as 1024")
    return int(text)


@_typed
def real(text: str) -> float:
    """A finite number, as it is usually written."""
    number = float(text) if REAL.fullmatch(text) and len(text) < 40 else float("inf")
    if abs(number) == float("inf"):
        raise HarnessError(f"{shown(text)} is no finite number; write one such as 0.5")
    return number


@_typed
def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, by commas."""
    parts = names(text)
    if not all(map(WHOLE.fullmatch, parts)):
        raise HarnessError(f"{shown(text)} is not whole numbers; write 1024,2048")
    return tuple(map(int, parts))


@_typed
def threads(text: str) -> int:
    """Threads that this machine can run."""
    from harness.machine import check_threads

    return check_threads(whole(text))
