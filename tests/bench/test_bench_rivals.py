"""A subject against its rivals on a large board: 90 cells, 100 samples, 2,000 resamples; goal: under 5 seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from leaderboards.stats.grid import Grid
from leaderboards.stats.subject import compare
from tests.leaderboards.stats.test_subject import scored

pytestmark = pytest.mark.bench


def test_a_large_board(note: Callable[..., None]) -> None:
    generator = np.random.default_rng(1)
    records = [
        r
        for m in ("mine", *(f"m{i}" for i in range(14)))
        for budget in ("32", "64", "128", "256", "512", "1024")
        for t in range(10)
        for r in scored(m, f"{'niah' if t < 5 else 'longbench'}/{t}", generator.random(10).tolist(), budget=budget)
    ]
    grid = Grid(records, seed=0, resamples=2000)
    begin = time.perf_counter()
    rivals = compare(grid, "mine")
    note("rivals of 90 cells, 100 samples: seconds", [time.perf_counter() - begin], ("<=", 5))
    assert len(rivals) == 6 * 2 * 3
