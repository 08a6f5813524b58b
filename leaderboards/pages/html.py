"""Untrusted text in HTML: cleaned, escaped, and as JSON that cannot end its script element."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from leaderboards.text import LONGEST, clean


def text(value: object, *, longest: int = LONGEST) -> str:
    """One line that HTML shows as it is, in an element or a quoted attribute."""
    return escape(clean(value, longest=longest))


def attributes(values: Mapping[str, str]) -> str:
    """` name="value"` for every value that is not empty, escaped; `data-v` may be empty. Names are the caller's own."""
    return "".join(f' {name}="{text(value)}"' for name, value in values.items() if value or name == "data-v")


def element(tag: str, inside: str, values: Mapping[str, str]) -> str:
    """An element. inside: HTML; values: attributes, not yet escaped."""
    return f"<{tag}{attributes(values)}>{inside}</{tag}>"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """A plain table of words that are not yet escaped; the first cell of a row is its header."""
    head = "".join(element("th", text(column), {"scope": "col"}) for column in columns)
    body = "".join(
        element(
            "tr",
            element("th", text(first), {"scope": "row"}) + "".join(element("td", text(cell), {}) for cell in rest),
            {},
        )
        for first, *rest in rows
    )
    return f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def frame_table(frame: pd.DataFrame, caption: str) -> str:
    """A frame of text as a plain table."""
    return text_table([str(name) for name in frame], frame.to_numpy().tolist(), caption=caption)


def data(name: str, value: Any) -> str:
    """A block of JSON that a script reads by its id; no character of it can end the element or begin a comment."""
    dumped = json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":"))
    for character in "<>&":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{dumped}</script>'
