"""Text that a page or a terminal shows as it is: cleaned, escaped, aligned, folded, and one way to write a section."""

import math
import re
import textwrap
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

KEYS = ["budget", "method"]
"""Columns that name a row; they come first, and again where a table is folded."""
LEFT = (*KEYS, "task", "memory", "flags", "family", "rival", "verdict", "over tasks", "best other", "best other NLL")
LEFT = (*LEFT, "ranks", "why none", "claim", "asked", "found")
"""Columns of words."""
NOTE_CHARS = 200
"""Characters of a name, a note or an error on a page."""
TERMINAL_WIDTH = 120
LABEL_CHARS = 1000
"""Characters of a text in a CSV."""
FORMULA = re.compile("[=+\\-@\uff1d\uff0b\uff0d\uff20].")
"""What a spreadsheet runs; tabs and line breaks at the beginning are cleaned away."""
ACTIVE = re.compile(r"([\\`*<>|~$]|(?<=\])[(\[]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))")
"""What markdown would act on."""
MIB = 2**20
"""Bytes of a mebibyte."""


class Section(NamedTuple):
    """A part of a page or of a terminal's text: a title, and below it a table, a list of lines, or a paragraph.

    The title may be empty. level: of the heading in markdown.
    """

    title: str
    body: pd.DataFrame | Sequence[str] | str
    level: int = 2


def markdown(sections: Iterable[Section]) -> str:
    """The sections as one markdown page. A paragraph is markdown already; everything else is escaped."""
    parts = []
    for title, body, level in sections:
        parts.append(f"{'#' * level} {escape(title)}" if title else "")
        if isinstance(body, pd.DataFrame):
            parts.append(_github(body))
        else:
            parts.append(body if isinstance(body, str) else "\n".join(f"- {escape(line)}" for line in body))
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(sections: Iterable[Section], *, width: int = TERMINAL_WIDTH) -> str:
    """The sections as text of at most `width` columns; a wide table goes on below, its first two columns repeated."""
    parts = []
    for title, body, _ in sections:
        if isinstance(body, pd.DataFrame):
            first, *more = [_plain(part) for part in _folded(body, width)]
        else:
            lines = [body] if isinstance(body, str) else body
            first, more = "\n".join(_wrapped(line, width) for line in lines), []
        parts += ["\n".join(filter(None, (title and _wrapped(title, width), first))), *more]
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


def rank_text(low: float, high: float) -> str:
    """`1-3`, `2`, or a dash where there is none."""
    if math.isnan(low):
        return "-"
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"


def keys(row: Mapping[Any, Any]) -> dict[str, str]:
    """The cells that name a row: its budget and its method."""
    return {name: clean(row[name]) for name in KEYS}


def clean(text: Any, *, longest: int = NOTE_CHARS) -> str:
    """One line without control characters, direction marks and the like."""
    visible = "".join(" " if unicodedata.category(c).startswith("C") else c for c in str(text))
    line = " ".join(visible.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def distinct(names: Iterable[Any], *, beside: Collection[str] = ()) -> dict[Any, str]:
    """Each name cleaned, for the head of a column: of two that look alike the later has a number behind it.

    beside: heads that are there already.
    """
    found, taken = dict[Any, str](), set(beside)
    for name in dict.fromkeys(names):
        shown = clean(name)
        found[name] = next(text for n in count(1) if (text := f"{shown} ({n})" if n > 1 else shown) not in taken)
        taken.add(found[name])
    return found


def escape(text: str) -> str:
    """Markdown shows the text as it is, in a table too.

    No column, emphasis, formula, entity, code, tag or link comes out of it.
    """
    return ACTIVE.sub(r"\\\1", text)


def csv_text(frame: pd.DataFrame) -> str:
    """A frame as CSV: texts cleaned, and none of them is a formula to the program that opens it.

    Numbers are written as they are, NaN is empty. Labels are not cut.
    """
    texts = frame.select_dtypes(exclude="number").columns
    frame = frame.assign(**{name: frame[name].map(csv_cell).astype(object) for name in texts})
    return str(frame.to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def csv_cell(value: Any) -> Any:
    """An apostrophe before what a spreadsheet would run; a sign alone is none."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float):
        text = "" if value is None else clean(value, longest=LABEL_CHARS)
        return f"'{text}" if FORMULA.match(text) else text
    return "" if math.isnan(value) else value


def _github(frame: pd.DataFrame) -> str:
    escaped = frame.rename(columns=escape).map(escape)
    return str(escaped.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=_align(frame)))


def _plain(frame: pd.DataFrame) -> str:
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


def _folded(frame: pd.DataFrame, width: int) -> list[pd.DataFrame]:
    """The frame in parts that fit into `width` columns of text where their own cells allow it.

    Its first two columns name a row and come first in every part.
    """
    wide = {name: size + 2 for name, size in _widths(frame).items()}
    first, rest = list(wide)[: len(KEYS)], list(wide)[len(KEYS) :]
    parts = [list(first)]
    for name in rest:
        if len(parts[-1]) > len(first) and sum(wide[part] for part in [*parts[-1], name]) > width + 2:
            parts.append(list(first))
        parts[-1].append(name)
    return [frame[names] for names in parts]


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
