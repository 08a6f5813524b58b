"""What the verbs of the command line share: lists in one argument, and refusals in one line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pydantic import ValidationError

from harness.errors import HarnessError


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
    try:
        return tuple(int(part) for part in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers; write 1024,2048") from None


def assignment(text: str) -> tuple[str, Any]:
    """A `--set` option as parameter and value: JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise HarnessError(f"--set {text!r} has no value; write method.parameter=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def one_line(error: ValidationError) -> HarnessError:
    """The first thing that a specification refuses, as an error for the user."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return HarnessError(f"option {where}: {first['msg']}, got {first['input']!r}")
