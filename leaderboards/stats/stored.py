"""Stored bytes of a table's cells, and which bytes its pictures and fronts are of: stored ones where all are known.

Old records know live bytes alone. A table with one of them goes by live bytes throughout, and says so by its columns.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import Array
from leaderboards.stats.comparable import NOT_GIVEN, is_of_reading
from leaderboards.stats.grid import Grid

STORED = "stored_percent_of_full"
AT_END = ("stored_bytes_end", "kv_bytes_end")
UNDER = 0.99  # of the bytes asked for, below which a row is marked: it was given no equal budget


def is_stored(grid: Grid, what: str = "stored_bytes") -> bool:
    """Whether every scored record knows its stored bytes, or those of another field."""
    known = [grid.values(cell, what) for cell in grid.cells]
    found = np.concatenate(known) if known else np.array([])
    return bool((found[~np.isnan(found)] > 0).all() and (~np.isnan(found)).any())


def at_end(grid: Grid) -> str:
    """Name the field of the bytes after the last decoded token: stored ones, or live ones where some are unknown.

    Of records that know neither, the live ones right after compression.
    """
    return next((what for what in AT_END if is_stored(grid, what)), "kv_bytes")


def stored_columns(grid: Grid) -> dict[CellKey, dict[str, Any]]:
    """Columns of mean stored bytes, their percent of the full cache, and samples under budget; none where unknown."""
    if not is_stored(grid):
        return {cell: {} for cell in grid.cells}
    return {cell: _columns(grid, cell) for cell in grid.cells}


def share(part: Array, whole: Array) -> float:
    """The sum of some bytes by that of others; NaN where the latter is 0."""
    of = float(whole.sum())
    return float(part.sum()) / of if of else math.nan


def percent_column(rows: pd.DataFrame) -> str:
    """Name the column of a table's bytes in percent of the full cache: stored ones where it has them."""
    return STORED if STORED in rows else "kv_percent_of_full"


def held_or_read(row: Mapping[Any, Any]) -> tuple[float, str]:
    """Say what a row costs in percent of the full cache, and in words what that is: what its budget is of."""
    if is_of_reading(row["budget"]):
        return row.get("read_percent_of_full", math.nan), "read for a token"
    return row.get(STORED, row["kv_percent_of_full"]), "of bytes"


def words(rows: pd.DataFrame) -> str:
    """Name those bytes in words."""
    return "stored KV bytes" if STORED in rows else "KV bytes"


def _columns(grid: Grid, cell: CellKey) -> dict[str, Any]:
    stored, asked, full = (grid.values(cell, what) for what in ("stored_bytes", "asked_bytes", "full_bytes"))
    there = ~np.isnan(stored)
    return {
        "stored_bytes_mean": float(stored[there].mean()) if there.any() else math.nan,
        STORED: 100 * share(stored[there], full[there]),
        "n_under_budget": 0 if cell[1] in NOT_GIVEN else int((stored[there] < UNDER * asked[there]).sum()),
    }
