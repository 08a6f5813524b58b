"""Text that a page or a terminal shows as it is: cleaned, escaped, aligned, folded, and one way to write a section."""

import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

KEYS = ["budget", "method"]
"""Columns that name a row; they come first, and again where a table is folded."""
LEFT = (*KEYS, "memory", "flags", "family", "rival", "verdict", "over tasks", "best other", "best other NLL")
"""Columns of words."""
NOTE_CHARS = 200
"""Characters of a name, a note or an error on a page."""
TERMINAL_WIDTH = 120
MIB = 2**20
"""Bytes of a mebibyte."""


@dataclass(frozen=True)
class Section:
    """A part of a page or of a terminal's text: a title, and below it a table, a list of lines, or a paragraph.

    The title may be empty. level: of the heading in markdown.
    """

    title: str
    body: pd.DataFrame | Sequence[str] | str
    level: int = 2


def markdown(sections: Iterable[Section]) -> str:
    """The sections as one markdown page. A paragraph is markdown already; everything else is escaped."""
    parts = []
    for section in sections:
        body = section.body
        parts.append(f"{'#' * section.level} {escape(section.title)}" if section.title else "")
        if isinstance(body, str):
            parts.append(body)
        else:
            parts.append(github(body) if isinstance(body, pd.DataFrame) else bullets(body))
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(sections: Iterable[Section], *, width: int = TERMINAL_WIDTH) -> str:
    """The sections as text of at most `width` columns; a wide table goes on below, its first two columns repeated."""
    parts = []
    for section in sections:
        body, title = section.body, [wrap(section.title, width)] if section.title else []
        if isinstance(body, pd.DataFrame):
            first, *more = [plain(part) for part in fold(body, width)]
            parts += ["\n".join([*title, first]), *more]
        else:
            lines = [body] if isinstance(body, str) else body
            parts.append("\n".join([*title, *(wrap(line, width) for line in lines)]))
    return "\n\n".join(part for part in parts if part)


def number(value: float, *, digits: int = 1, sign: str = "") -> str:
    """The value with `digits` decimals; a dash for NaN."""
    return "-" if math.isnan(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def interval(mean: float, low: float, high: float, *, digits: int = 1, sign: str = "") -> str:
    """`1.0 [0.5, 1.5]`, or the mean alone where there is no interval."""
    ends = [number(end, digits=digits, sign=sign) for end in (low, high)]
    return number(mean, digits=digits, sign=sign) + ("" if ends[0] == "-" else f" [{', '.join(ends)}]")


def estimate(row: Mapping[Any, Any], name: str, *, digits: int = 1, sign: str = "") -> str:
    """`interval` of the columns `<name>_mean`, `_low` and `_high` of a row."""
    return interval(*(row[f"{name}_{part}"] for part in ("mean", "low", "high")), digits=digits, sign=sign)


def half_width(mean: float, low: float, high: float) -> str:
    """`1.0 ± 0.5`, the mean and half of its interval; the mean alone where there is none."""
    return number(mean) + ("" if math.isnan(low) else f" ± {number((high - low) / 2)}")


def keys(row: Mapping[Any, Any]) -> dict[str, str]:
    """The cells that name a row: its budget and its method."""
    return {name: clean(row[name]) for name in KEYS}


def clean(text: Any, *, longest: int = NOTE_CHARS) -> str:
    """One line without control characters, direction marks and the like."""
    visible = "".join(" " if unicodedata.category(c).startswith("C") else c for c in str(text))
    line = " ".join(visible.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def escape(text: str) -> str:
    """Markdown shows the text as it is, in a table too: no column, emphasis, code, tag or link comes out of it."""
    return re.sub(r"([\\`*<>|]|(?<=\])[(\[])", r"\\\1", text)


def bullets(lines: Sequence[str]) -> str:
    """A markdown list."""
    return "\n".join(f"- {escape(line)}" for line in lines)


def github(frame: pd.DataFrame) -> str:
    """A markdown table of a frame of text."""
    escaped = frame.rename(columns=escape).map(escape)
    return str(escaped.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=_align(frame)))


def plain(frame: pd.DataFrame) -> str:
    """A table for a terminal of a frame of text."""
    wide = _widths(frame)
    aligned = {name: str.ljust if side == "left" else str.rjust for name, side in zip(wide, _align(frame), strict=True)}
    lines = [list(wide), ["-" * width for width in wide.values()], *frame.to_numpy().tolist()]
    return "\n".join(
        "  ".join(aligned[name](cell, wide[name]) for name, cell in zip(wide, line, strict=True)).rstrip()
        for line in lines
    )


def _widths(frame: pd.DataFrame) -> dict[str, int]:
    return {str(name): max(len(str(name)), *frame[name].map(len)) for name in frame}


def _align(frame: pd.DataFrame) -> list[str]:
    return ["left" if name in LEFT else "right" for name in frame]


def fold(frame: pd.DataFrame, width: int) -> list[pd.DataFrame]:
    """The frame in parts that fit into `width` columns of text where their own cells allow it.

    Its first two columns name a row and come first in every part.
    """
    wide = _widths(frame)
    names_of_rows = list(wide)[: len(KEYS)]
    taken = sum(wide[name] + 2 for name in names_of_rows)
    parts: list[list[str]] = []
    room = 0
    for name in list(wide)[len(KEYS) :]:
        if not parts or wide[name] + 2 > room:
            parts.append([])
            room = width + 2 - taken
        parts[-1].append(name)
        room -= wide[name] + 2
    return [frame[[*names_of_rows, *names]] for names in parts]


def wrap(line: str, width: int) -> str:
    """One line as several of at most `width` columns."""
    return textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
