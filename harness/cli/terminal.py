"""Terminals and pipes that hold fewer characters than are printed: Δ and ± are then written as letters."""

import codecs
import io
import os
import sys
import unicodedata

PLAIN = {"Δ": "D", "±": "+-", "×": "x", "→": "->", "≤": "<=", "≥": ">=", "–": "-", "—": "-", "…": "..."}
HANDLER = "harness.plain"


def plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that cannot be encoded: letters that look alike, else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(map(_plain, letters)), error.end


def _plain(letter: str) -> str:
    ascii_form = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return PLAIN.get(letter) or ascii_form or letter.encode("ascii", "backslashreplace").decode()


def fit_streams() -> None:
    """Have stdout and stderr take every character, whatever their encoding, and nothing where they are closed."""
    codecs.register_error(HANDLER, plain)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
