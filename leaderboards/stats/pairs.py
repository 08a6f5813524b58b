"""A method of its own budget against each other one that was run at what it kept of each prompt.

Both hold as many bytes on every prompt, so the difference is of what they keep. It is paired as all differences are
(`leaderboards.stats.bootstrap`): per sample, on the samples that both have, mean of task means, 95 % per comparison and
not corrected for their number. A prompt of which nothing was dropped has no pair.
"""

from typing import Any

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from harness.records.spec import AS, OWN
from leaderboards.stats.grid import Grid
from leaderboards.stats.stored import is_stored, share

PAIRED = {"score_points": "score", "nll_nats": "nll"}
"""Columns of a difference to what it is of."""
COLUMNS = ["method", "rival", "n", "kept_percent", "rival_percent", "score_points_own", "score_points_rival"]
COLUMNS += [f"{name}_vs_rival_{part}" for name in PAIRED for part in ("mean", "low", "high", "n")]


def pairs(grid: Grid) -> pd.DataFrame:
    """One row per method of its own budget and rival, columns as `COLUMNS`: percent are of the full cache's bytes."""
    order = sorted(grid.cells)
    found = [(own, rival) for own in order if own[1] == OWN for rival in order if rival[1] == AS + own[0]]
    grid.prepare((own, what, rival) for own, rival in found for what in PAIRED.values())
    return pd.DataFrame([_row(grid, *pair) for pair in found], columns=COLUMNS)


def _row(grid: Grid, own: CellKey, rival: CellKey) -> dict[str, Any]:
    both = ~np.isnan(grid.values(own, "score") - grid.values(rival, "score"))
    row: dict[str, Any] = {"method": own[0], "rival": rival[0], "n": int(both.sum())}
    bytes_of = "stored_bytes" if is_stored(grid) else "kv_bytes"
    for cell, percent, score in ((own, "kept", "own"), (rival, "rival", "rival")):
        kept, full = (grid.values(cell, what)[both] for what in (bytes_of, "full_bytes"))
        row[f"{percent}_percent"] = 100 * share(kept, full)
        row[f"score_points_{score}"] = grid.bootstrap.mean(np.where(both, grid.values(cell, "score"), np.nan))
    for name, what in PAIRED.items():
        told = grid.estimate(own, what, minus=rival)._asdict()
        row |= {f"{name}_vs_rival_{part}": value for part, value in told.items()}
    return row
