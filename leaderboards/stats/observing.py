"""What observing costs each cell: the median over the prompts on which it was measured (`harness.run.observing`).

A median, for seconds of a shared machine have outliers; without an interval, for it is measured on a few prompts.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.grid import Grid


def observe_columns(grid: Grid) -> dict[CellKey, dict[str, Any]]:
    """Columns `observe_ms_median` and `observe_n`, its number of prompts; none where no cell of the table has any."""
    values = {cell: grid.values(cell, "observe_ms") for cell in grid.cells}
    known = {cell: own[~np.isnan(own)] for cell, own in values.items()}
    if not any(own.size for own in known.values()):
        return {cell: {} for cell in grid.cells}
    medians = {cell: float(np.median(own)) if own.size else math.nan for cell, own in known.items()}
    return {cell: {"observe_ms_median": medians[cell], "observe_n": own.size} for cell, own in known.items()}


def is_observed(rows: pd.DataFrame) -> bool:
    """Whether the rows of a table have the columns of what observing costs."""
    return "observe_n" in rows
