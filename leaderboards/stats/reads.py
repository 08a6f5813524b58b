"""Bytes read per decoded token: what attention reads of the cache for one token, beside the bytes that are stored.

Codes are read at their own size, and a method that chooses slots for each token stores all and reads few. Records from
before it was measured have none: a cell with one of them has none either, and a table of them alone no such columns.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.grid import Grid
from leaderboards.stats.stored import share

READ = "read_percent_of_full"


def read_columns(grid: Grid) -> dict[CellKey, dict[str, Any]]:
    """Columns of the mean bytes read per decoded token and their percent of the full cache; NaN where unknown."""
    if all(np.isnan(grid.values(cell, "read_bytes")).all() for cell in grid.cells):
        return {cell: {} for cell in grid.cells}
    return {cell: _columns(grid, cell) for cell in grid.cells}


def is_read(rows: pd.DataFrame) -> bool:
    """Whether some cell of a table knows what it reads."""
    return READ in rows and bool(rows[READ].notna().any())


def _columns(grid: Grid, cell: CellKey) -> dict[str, Any]:
    read, full = (grid.values(cell, what) for what in ("read_bytes", "full_bytes"))
    there = ~np.isnan(full)
    whole = bool(there.any() and not np.isnan(read[there]).any())
    return {
        "read_bytes_mean": float(read[there].mean()) if whole else math.nan,
        READ: 100 * share(read[there], full[there]) if whole else math.nan,
    }
