"""Caches that were sent to another process: bytes and seconds to the first token, beside sending the text.

On a link of B bytes a second the first token comes `cache_s + sent / B` after the sender has read the context, or
`text_s + text / B`, so the cache is there first on a link faster than `(sent - text) / (text_s - cache_s)`; on none
where the receiver reads the text as fast as it takes the cache. Seconds are medians: a shared machine has outliers.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from harness.records.record import CellKey
from leaderboards.stats.bootstrap import Array
from leaderboards.stats.grid import Grid

PARTS = ("send_s", "receive_s", "ask_s")
"""What the time to the first token by the cache is the sum of."""
COLUMNS = ["budget", "method", "score_points_mean", "sent_bytes_mean", "text_bytes_mean"]
COLUMNS += [*(f"{name}_median" for name in (*PARTS, "cache_s", "text_s")), "link_bytes_per_s"]
COLUMNS += ["depends_n", "control_n", "n"]


def relayed(grid: Grid, order: Sequence[CellKey]) -> pd.DataFrame:
    """One row per cell, in order, with `COLUMNS`; none where nothing was sent.

    score: mean of task means, 0-100, over what was sent. link_bytes_per_s: NaN where no link is fast enough.
    depends_n: controls whose answer was another one, of control_n. n: samples.
    """
    return pd.DataFrame(list(_rows(grid, order)), columns=COLUMNS)


def _rows(grid: Grid, order: Sequence[CellKey]) -> Iterator[Mapping[str, object]]:
    for cell in order:
        sent, text = (grid.values(cell, what) for what in ("sent_bytes", "text_bytes"))
        there = ~np.isnan(sent)
        if not there.any():
            continue
        seconds = {name: grid.values(cell, name)[there] for name in (*PARTS, "text_s")}
        seconds["cache_s"] = np.sum([seconds[name] for name in PARTS], axis=0)
        medians = {f"{name}_median": _median(values) for name, values in seconds.items()}
        more, saved = (sent - text)[there].mean(), medians["text_s_median"] - medians["cache_s_median"]
        depends = grid.values(cell, "depends")
        yield {
            **{"budget": cell[1], "method": cell[0], **medians},
            "score_points_mean": grid.bootstrap.mean(np.where(there, grid.values(cell, "score"), np.nan)),
            "sent_bytes_mean": float(sent[there].mean()),
            "text_bytes_mean": float(text[there].mean()),
            "link_bytes_per_s": max(0.0, float(more / saved)) if saved > 0 else np.nan,
            "depends_n": int(np.nansum(depends)),
            "control_n": int((~np.isnan(depends)).sum()),
            "n": int(there.sum()),
        }


def _median(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else np.nan
