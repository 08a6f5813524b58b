"""Tail failures against hand-computed values and plain loops; ranks and tails on a page."""

import math
from random import Random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaderboards.stats.aggregate import aggregate
from leaderboards.tables.board import main_frame
from leaderboards.tables.sections import sections
from tests.leaderboards.tables.test_board import board
from tests.pretend import cell, only, record, row


def test_broken_counts_what_fullkv_had_right() -> None:
    """fullkv: right four times, the fifth wrong, the sixth failed. Half of the maximum is right."""
    records = [
        *cell("fullkv", "full", [1.0, 0.5, 1.0, 1.0, 0.49, None]),
        *cell("a", "64", [1.0, 0.0, 0.49, None, 0.0, 0.0]),
        *cell("b", "64", [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]),
        *cell("c", "64", [None] * 6),
    ]
    expected = {"a": (200 / 3, 2, 3), "b": (0, 0, 4), "c": (math.nan, 0, 0), "fullkv": (math.nan, math.nan, 0)}
    rows = only(records).rows.set_index("method")
    for method, own in expected.items():
        found = [rows.loc[method, name] for name in ("broken_percent_mean", "n_broken", "broken_percent_n")]
        assert found == pytest.approx(own, nan_ok=True)


def test_broken_is_a_mean_of_task_means_with_an_interval() -> None:
    records = cell("fullkv", "full", [1.0] * 20) + cell("fullkv", "full", [1.0] * 10, task="vt")
    records += cell("a", "64", [1.0] * 20) + cell("a", "64", [0.0, 1.0] * 5, task="vt")
    found = row(only(records), "a", "64")
    assert found["broken_percent_mean"] == 25
    error = math.sqrt(50 * 50 / 10) / 2  # of the redraws: the first task has no spread
    assert found["broken_percent_high"] - found["broken_percent_low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_without_fullkv_nothing_is_broken() -> None:
    table = only(cell("a", "64", [1.0] * 6))
    assert math.isnan(row(table, "a", "64")["n_broken"])
    assert "Tail failures" not in sections(table)
    losses = only(cell("a", "64", [1.0] * 6, nll=2.0))
    found = row(losses, "a", "64")
    assert found["nll_worst_nats_mean"] == 2 and math.isnan(found["nll_worst_nats_vs_fullkv_mean"])
    assert "Tail failures" in sections(losses)


def test_worst_decile_by_hand() -> None:
    """Eleven samples: the two worst; one sample: itself. fullkv lacks the very worst one."""
    losses = [0.1, 3.0, 0.2, 5.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    records = [record("a", "64", f"{i:02}", 1.0, nll=loss) for i, loss in enumerate(losses)]
    records += [record("fullkv", "full", f"{i:02}", 1.0, nll=None if i == 3 else 1.0) for i in range(11)]
    records += cell("a", "64", [1.0], nll=1.5, task="vt") + cell("fullkv", "full", [1.0], nll=1.25, task="vt")
    found = row(only(records), "a", "64")
    assert (found["nll_worst_nats_mean"], found["nll_worst_nats_n"]) == (((3 + 5) / 2 + 1.5) / 2, 3)
    assert found["nll_worst_nats_vs_fullkv_mean"] == pytest.approx((2.0 + 0.25) / 2)
    assert found["nll_worst_nats_vs_fullkv_n"] == 2
    assert math.isnan(row(only(records), "fullkv", "full")["nll_worst_nats_vs_fullkv_mean"])


def naive(own: dict[tuple[str, str], float], full: dict[tuple[str, str], float]) -> tuple[float, float]:
    """(mean NLL of the worst tenth, difference to fullkv's), one task and one sample at a time."""
    tails, losses = [], []
    for task in sorted({task for task, _ in own}):
        ranked = sorted((-nll, sample) for (t, sample), nll in own.items() if t == task)
        chosen = ranked[: -(-len(ranked) // 10)]
        tails.append(sum(-nll for nll, _ in chosen) / len(chosen))
        both = [-nll - full[task, sample] for nll, sample in chosen if (task, sample) in full]
        losses += [sum(both) / len(both)] if both else []
    return sum(tails) / len(tails), sum(losses) / len(losses) if losses else math.nan


NLL = st.sampled_from([None, 0.5, 1.0, 1.5, 2.0, 4.0])


@settings(max_examples=15, deadline=None)
@given(st.lists(NLL, min_size=29, max_size=29), st.lists(NLL, min_size=30, max_size=30), st.integers(0, 2**31))
def test_worst_decile_is_what_a_loop_finds_in_any_order(mine: list[float], fullkv: list[float], s: int) -> None:
    places = [(task, f"{i:02}") for task, n in (("niah", 24), ("vt", 6)) for i in range(n)]
    losses = {("a", "64"): [1.0, *mine], ("fullkv", "full"): fullkv}
    records = [
        record(*cell, sample, 1.0, task=task, nll=nll)
        for cell, own in losses.items()
        for (task, sample), nll in zip(places, own, strict=True)
    ]
    one = only(records, resamples=50)
    Random(s).shuffle(records)
    pd.testing.assert_frame_equal(one.rows, only(records, resamples=50).rows)
    found = row(one, "a", "64")
    known = [{place: nll for place, nll in zip(places, own, strict=True) if nll is not None} for own in losses.values()]
    tail, loss = naive(*known)
    assert found["nll_worst_nats_mean"] == pytest.approx(tail)
    assert found["nll_worst_nats_vs_fullkv_mean"] == pytest.approx(loss, nan_ok=True)


def test_ranks_and_tails_say_what_the_records_say() -> None:
    """Two methods per budget, 20 points apart give or take 10: each has its place; fullkv is always right."""
    table = aggregate(board(n=24))[0]
    main = {(r["budget"], r["method"]): r["rank"] for r in main_frame(table).to_dict("records")}
    assert main == {
        ("full", "fullkv"): "-", ("64", "snapkv"): "1", ("64", "compilerkv@paper"): "2",
        ("128", "snapkv"): "1", ("128", "h2o"): "2",
    }  # fmt: skip
    ranks, tails = (
        {(r["budget"], r["method"]): r for r in sections(table)[title].to_dict("records")}
        for title in ("Ranks and best others", "Tail failures")
    )
    assert ranks["64", "compilerkv@paper"]["best other"] == "snapkv"
    assert ranks["64", "compilerkv@paper"]["Δ best other"].startswith("-40.0 [-")
    assert ranks["64", "compilerkv@paper"]["ΔNLL best other"] == "+0.250 [+0.250, +0.250]"
    assert ranks["64", "compilerkv@paper"]["over tasks"] == "-"  # two tasks
    h2o = tails["128", "h2o"]  # 20, 15 and 10 points
    assert (h2o["broken %"], h2o["broken"], h2o["n worst"]) == ("100.0 [100.0, 100.0]", "48 of 48", "6")
    assert (h2o["NLL worst 10%"], h2o["Δ fullkv"]) == ("1.500", "+0.500")
    assert tails["full", "fullkv"]["broken %"] == "-"
