"""The smallest visible difference of every task and family as a table of text."""

import math

import pandas as pd

from leaderboards.stats.aggregate import TableRow
from leaderboards.text import clean, number

TITLE = "Smallest visible difference between two methods at one budget, points"
OPTIONAL = ("length", "in the joint test", "why none")
"""Columns that are left out where no row has anything there."""


def visible_frame(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per row of `leaderboards.stats.visible`; a reason stands where there is no difference."""
    lines = [_texts(row) for row in rows.to_dict("records")]
    empty = [name for name in OPTIONAL if all(line[name] in ("", "-") for line in lines)]
    return pd.DataFrame(lines).drop(columns=empty)


def _texts(row: TableRow) -> dict[str, str]:
    error = "" if math.isnan(row["full_error"]) else f" ± {number(row['full_error'])}"
    return {
        "task": clean(row["name"]) + (" (family)" if row["kind"] == "family" else ""),
        "length": row["length"],
        "fullkv ± standard error": number(row["full"]) + error,
        "n": str(row["n"]),
        "contexts": str(row["contexts"] or "-"),
        "alone": "-" if row["why"] else number(row["one"]),
        "in the joint test": "-" if row["why"] else number(row["all"]),
        "ranks": clean(row["ranks"]),
        "why none": clean(row["why"]),
    }
