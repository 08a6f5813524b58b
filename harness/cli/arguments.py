"""What the commands share: a parser that complains in one line, lists in one argument."""

import argparse
from pathlib import Path
from typing import NoReturn

from harness.errors import line_of

RESULTS = Path("results")  # folder of run folders, where none is named


class Parser(argparse.ArgumentParser):
    """Ends with one line and exit code 2 for arguments that it cannot take."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"harness: {line_of(message)}; see `{self.prog} --help`\n")


def names(text: str) -> tuple[str, ...]:
    """The parts of a list, cut at commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, by commas. Raises ArgumentTypeError for anything else."""
    try:
        return tuple(int(part) for part in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers; write 1024,2048") from None
