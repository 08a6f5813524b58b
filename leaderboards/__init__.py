"""Records in, tables out. `leaderboards.tables.board.write_board` turns run folders into pages; no torch, no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


def load(results: str | Path) -> pd.DataFrame:
    """Every record of a run folder, or of a folder of them, as one row: see `leaderboards.tables.frame.load`."""
    from leaderboards.tables.frame import load as load_frame

    return load_frame(results)
