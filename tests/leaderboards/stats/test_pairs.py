"""Methods of their own budget on boards: in no budget's rank, at the bytes they used, paired with others at these."""

import math
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.records.record import Record
from leaderboards.pages.charts import charts, methods_of
from leaderboards.stats.aggregate import Table, aggregate
from leaderboards.stats.comparable import budget_order
from leaderboards.tables.board import to_csv, to_markdown, to_terminal
from leaderboards.tables.picture import write_picture
from leaderboards.tables.sections import PAIRS, sections
from leaderboards.tables.verdicts import uncompressed, verdicts
from tests.pretend import cell, measured, only, row

N = 24
CONTEXTS = [{"meta": {"group": str(i)}} for i in range(N)]


def at(method: str, budget: str, scores: list[float | None], stored: int, **changes: object) -> list[Record]:
    records = cell(method, budget, scores, stored_bytes=stored, asked_bytes=stored, kv_bytes=stored, **changes)
    return [r.model_copy(update=CONTEXTS[i]) for i, r in enumerate(records)]


def every() -> list[Record]:
    near = [0.6 + 0.01 * (i % 3) for i in range(N)]
    return [
        *at("fullkv", "full", [0.9] * N, 400, nll=1.0),
        *at("gvote", "own", [0.8] * N, 120, nll=1.25),
        *at("snapkv", "=gvote", [*near[:-1], None], 122, nll=1.5),
        *at("adakv", "=gvote", [0.8] * N, 122, nll=1.25),
        *at("snapkv", "64", [0.3] * N, 60, nll=2.0),
        *at("adakv", "64", [0.2] * N, 60, nll=2.5),
    ]


@pytest.fixture(scope="module")
def table() -> Table:
    return only(every())


def test_it_is_compared_with_each_other_at_what_it_kept_on_the_samples_of_both(table: Table) -> None:
    adakv, snapkv = table.pairs.to_dict("records")
    assert (adakv["method"], adakv["rival"], adakv["n"]) == ("gvote", "adakv", N)
    assert [adakv[f"score_points_vs_rival_{part}"] for part in ("mean", "low", "high")] == [0, 0, 0]
    assert (snapkv["rival"], snapkv["n"], snapkv["kept_percent"], snapkv["rival_percent"]) == (
        "snapkv",
        N - 1,
        30,
        30.5,
    )
    assert snapkv["score_points_own"] == pytest.approx(80)
    gain = snapkv["score_points_vs_rival_mean"]
    assert gain == pytest.approx(80 - snapkv["score_points_rival"]) == pytest.approx(19, abs=0.1)
    assert 18 < snapkv["score_points_vs_rival_low"] < gain < snapkv["score_points_vs_rival_high"] < 20
    assert snapkv["nll_nats_vs_rival_mean"] == pytest.approx(-0.25)


def test_it_has_no_rank_and_others_have_theirs_at_its_budget(table: Table) -> None:
    gvote = row(table, "gvote", "own")
    assert math.isnan(gvote["rank_low"]) and gvote["mark"] == gvote["best_other"] == ""
    assert [v.budget for v in verdicts(table)] == ["64", "=gvote"]
    assert row(table, "adakv", "64")["rank_low"] == 2 and row(table, "snapkv", "64")["rank_high"] == 1
    assert "gvote" not in set(table.floors["method"]) and table.ranking.eligible["score"].why == ""
    with pytest.raises(HarnessError, match="no method 'gvote' with a budget"):
        aggregate(every(), subject="gvote")


def test_baselines_of_its_row_are_taken_at_what_it_kept(table: Table) -> None:
    gvote = row(table, "gvote", "own")
    assert gvote["score_points_vs_snapkv_n"] == N - 1 and gvote["score_points_vs_snapkv_mean"] == pytest.approx(
        19, abs=0.1
    )
    assert gvote["score_points_vs_fullkv_mean"] == pytest.approx(-10)


def test_pages_show_it_beside_the_full_cache_and_its_pairs_in_a_table(table: Table) -> None:
    frame = sections(table)[PAIRS].set_index("against")
    assert frame.loc["snapkv", "Δ score"].startswith("+19.0 [") and frame.loc["adakv", "its %"] == "30.5"
    said = ["".join(words) for words in uncompressed(table)]
    assert said[0].startswith("fullkv without compression") and said[1].startswith("gvote at its own budget (30.0 % of")
    for text in (to_markdown([table], title="t"), to_terminal([table])):
        assert PAIRS in text and "Its row has no rank" in " ".join(text.split())
    assert "'=gvote" in to_csv([table])  # no formula for a spreadsheet
    assert sorted(["=gvote", "64", "own", "0.5", "full"], key=budget_order) == ["full", "own", "64", "0.5", "=gvote"]


def test_pictures_have_it_at_the_bytes_that_it_used(table: Table, tmp_path: Path) -> None:
    assert methods_of(table) == ["adakv", "gvote", "snapkv"]
    found = charts(table, salt="t")
    assert found is not None
    against, by_budget = found.charts
    assert "gvote at own: score 80.0" in against.svg and "gvote at own" not in by_budget.svg
    assert "gvote" in write_picture([table], tmp_path, "board").read_text()


def test_it_is_on_the_front_of_bytes() -> None:
    timed = {"measured": measured()}
    found = only([*at("gvote", "own", [0.9] * N, 100, **timed), *at("a", "64", [0.1] * N, 120, **timed)])
    assert row(found, "gvote", "own")["front_bytes"] == "*" and row(found, "a", "64")["front_bytes"] == ""


def test_a_board_without_one_has_no_such_table() -> None:
    plain = only([*at("fullkv", "full", [0.9] * N, 400), *at("a", "64", [0.5] * N, 60)])
    assert (
        plain.pairs.empty and PAIRS not in sections(plain) and "own: the budget" not in to_markdown([plain], title="t")
    )
