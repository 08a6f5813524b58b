"""The smallest cache that keeps a share of the full cache's score, by hand and by a plain loop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.records.record import Record
from leaderboards.stats.aggregate import Table
from leaderboards.stats.floors import reached
from leaderboards.tables.sections import sections
from tests.pretend import cell, only

TITLE = "Smallest cache that keeps {} % of fullkv, in % of its bytes"


def curve(method: str, scores: dict[int, float], **changes: object) -> list[Record]:
    """20 contexts of one score at each budget, whose bytes are a hundredth of the full cache's for each slot."""
    full = cell("fullkv", "full", [0.8] * 20, kv_bytes=10_000, full_bytes=10_000, **changes)
    return full + [
        record
        for budget, score in scores.items()
        for record in cell(method, str(budget), [score] * 20, kv_bytes=100 * budget, full_bytes=10_000, **changes)
    ]


def found(table: Table, floor: int) -> dict[str, float]:
    rows = table.floors[table.floors.floor == floor]
    assert len(rows) == 1
    return dict(rows.iloc[0])


def test_the_floor_is_reached_between_two_budgets_by_the_logarithm_of_bytes() -> None:
    table = only(curve("a", {4: 0.56, 16: 0.80}))  # 70 % and 100 % of the full cache's 80 points
    own = found(table, 95)
    assert own["percent"] == pytest.approx(math.exp(math.log(4) + (0.95 - 0.7) / 0.3 * math.log(4)))
    assert own["low"] == own["high"] == pytest.approx(own["percent"])  # all contexts alike
    assert (own["smallest"], own["largest"]) == pytest.approx((4, 16))
    assert (own["tasks"], own["n"], own["family"]) == (1, 20, "niah")


def test_what_no_budget_or_the_smallest_reaches_is_only_bounded() -> None:
    frames = sections(only([*curve("low", {4: 0.1, 16: 0.4}), *curve("high", {8: 0.79, 16: 0.8})[20:]]))
    rows = frames[TITLE.format(95)].set_index("method")["niah"]
    assert rows.to_dict() == {"high": "≤8.0 [≤8.0, ≤8.0]", "low": ">16.0 [>16.0, >16.0]"}
    assert frames[TITLE.format(99)].set_index("method")["niah"]["high"] == "9.2 [9.2, 9.2]"  # 8 * 2 ** 0.2


def test_tasks_that_the_full_cache_fails_and_contexts_without_names_say_nothing() -> None:
    failed = curve("a", {4: 0.1}, task="ruler/vt")
    low = [r.model_copy(update={"metrics": {"score": r.metrics["score"] / 8}}) for r in failed]
    assert only(low).floors.empty
    unnamed = [r.model_copy(update={"meta": {}}) for r in curve("a", {4: 0.56, 16: 0.8})]
    own = found(only(unnamed), 95)
    assert own["percent"] > 4 and math.isnan(own["low"])
    assert only(cell("a", "64", [1.0] * 6)).floors.empty  # without fullkv


@given(
    st.lists(st.floats(0, 1.2), min_size=1, max_size=5),
    st.sampled_from([0.5, 0.95]),
)
def test_a_curve_is_walked_from_its_smallest_budget(shares: list[float], floor: float) -> None:
    whole, sizes = [*shares, 1.0], np.log(np.linspace(0.1, 1, len(shares) + 1))
    at = reached(np.array([whole]), sizes, floor)[0]
    i = next(i for i, share in enumerate(whole) if share >= floor)
    if i == 0:
        assert at == sizes[0]
    else:
        way = (floor - whole[i - 1]) / (whole[i] - whole[i - 1])
        assert at == pytest.approx(sizes[i - 1] + way * (sizes[i] - sizes[i - 1]))
