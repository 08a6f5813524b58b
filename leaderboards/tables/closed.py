"""The closed division as text: of each floor a table of the rows that are in, and a line per family of who is not."""

import pandas as pd

from leaderboards.stats.aggregate import TableRow
from leaderboards.text import MIB, clean, interval, number, rank_text

WORDS = {"stored_bytes_end": "stored MiB at the end", "kv_bytes_end": "live MiB at the end", "kv_bytes": "live MiB"}
"""Kind of bytes to the head of its column."""


TITLE = "Closed division"


def closed_parts(rows: pd.DataFrame) -> dict[str, pd.DataFrame | list[str]]:
    """Title to table or lines, of every floor; one list of reasons where nothing is told at all."""
    found: dict[str, pd.DataFrame | list[str]] = {}
    if len(rows) and (rows["why"] != "").all():
        return {TITLE: _lines(rows)}
    for floor, own in rows.groupby("floor") if len(rows) else ():
        inside = own[own["state"] == "in"].sort_values(["place_low", "percent", "method"], kind="stable")
        timed = bool(inside["tpot_s"].notna().any())
        of_family = (inside[inside["family"] == family] for family in own["family"].unique())
        lines = [_texts(row, timed=timed) for part in of_family for row in part.to_dict("records")]
        title = f"{TITLE}, told to keep {floor} % of fullkv"
        found |= {title: pd.DataFrame(lines)} if lines else {}
        found[f"{title}: who is not in it"] = _lines(own)
    return found


def _lines(rows: pd.DataFrame) -> list[str]:
    """A line per family."""
    return [_others(str(family), own) for family, own in rows.groupby("family", sort=False)]


def _texts(row: TableRow, *, timed: bool) -> dict[str, str]:
    cells = {
        "family": clean(row["family"]),
        "place": rank_text(row["place_low"], row["place_high"]),
        "method": clean(row["method"]),
        "budget": clean(row["budget"]),
        WORDS[row["what"]]: number(row["bytes"] / MIB, digits=3),
        "% of fullkv": number(row["percent"]),
        "keeps %": interval(row["kept"], row["low"], row["high"]),
    }
    if timed:
        cells |= {
            "TPOT ms": number(1000 * row["tpot_s"], digits=2),
            "place by TPOT": rank_text(row["time_low"], row["time_high"]),
        }
    return cells | {"tasks": str(row["tasks"]), "n": str(row["n"])}


def _others(family: str, rows: pd.DataFrame) -> str:
    """Who is not told and who is out, in a line; of a family where nothing is told, why."""
    whys = rows["why"].unique().tolist()
    if len(whys) == 1 and whys[0]:
        return f"{clean(family)}: nothing is told: {whys[0]}"
    parts = []
    for state, words in (("not told", "not told"), ("out", "out")):
        own = rows[rows["state"] == state]
        if len(own):
            parts.append(f"{words}: {', '.join(_named(str(method), part) for method, part in own.groupby('method'))}")
    return f"{clean(family)}: {'; '.join(parts) or 'all are in it'}"


def _named(method: str, rows: pd.DataFrame) -> str:
    whys = [why for why in rows["why"].unique().tolist() if why]
    return f"{clean(method)} at {', '.join(map(clean, rows['budget']))}" + (f" ({', '.join(whys)})" if whys else "")
