"""Templates of pages. What a template shows is one cleaned line that HTML escapes, unless it is markup already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from leaderboards.tables.verdicts import MethodName
from leaderboards.text import NOTE_CHARS, clean, number


@dataclass(frozen=True)
class TextTable:
    """A plain table of words that are not yet escaped; the first cell of a row is its header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, frame: pd.DataFrame, caption: str) -> TextTable:
        """A frame of text under its caption."""
        return cls(caption, [str(name) for name in frame], frame.to_numpy().tolist())


@dataclass(frozen=True)
class HeatTable:
    """A table of shaded boxes. rows: of each its head and its boxes: shade 0-10, what it shows, and words about it.

    A box is None where there is nothing.
    """

    caption: str
    columns: Sequence[object]
    rows: Sequence[tuple[object, Sequence[tuple[int, str, str] | None]]]


def line(value: object, longest: int = NOTE_CHARS) -> Markup:
    """One line that HTML shows as it is, in an element or a quoted attribute."""
    return escape(clean(value, longest=longest))


def render(template: str, **values: Any) -> str:
    """A template of `leaderboards/pages/templates` filled in. Raises jinja2's UndefinedError for a missing value."""
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """The templates with their filters; a value that a template asks for and does not get is an error."""
    made = Environment(
        loader=PackageLoader("leaderboards.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else line(value),
    )
    made.filters |= {"line": line, "number": number}
    made.tests["method_name"] = lambda part: isinstance(part, MethodName)
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": True, "separators": (",", ":")}
    return made
