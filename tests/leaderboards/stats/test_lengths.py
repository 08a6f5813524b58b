"""Long outputs on a board: lengths, ends and costs against the full cache's, by hand."""

import math
from pathlib import Path

import pytest

from harness.records.record import Record
from leaderboards.stats.aggregate import Table
from leaderboards.tables.board import to_markdown, write_board
from leaderboards.tables.sections import sections
from tests.pretend import MIB, cell, only, record

TITLE = "Long outputs"


def answers(method: str, budget: str, tokens: list[int], **changes: object) -> list[Record]:
    """An answer of so many tokens for each sample, in a cache of 100 bytes a token; every other one ended."""
    return [
        record(
            method,
            budget,
            str(i),
            0.5,
            **{
                **{"metrics": {"score": 0.5, "right": 0.75, "ended": float(i % 2 == 0)}, "token_ids": (7,) * count},
                **{"byte_steps": 100 * count, "stored_bytes_end": MIB, **changes},
            },
        )
        for i, count in enumerate(tokens)
    ]


def found(table: Table, method: str) -> dict[str, float]:
    (own,) = table.lengths[table.lengths.method == method].to_dict("records")
    return {str(name): value for name, value in own.items()}


def test_inflation_is_the_geometric_mean_over_tasks_of_the_ratio_of_mean_lengths() -> None:
    full = [*answers("fullkv", "full", [10, 30] * 5), *answers("fullkv", "full", [50] * 10, task="ruler/vt")]
    own = [*answers("a", "64", [40, 40] * 5, byte_steps=900), *answers("a", "64", [200] * 10, task="ruler/vt")]
    table = only([*full, *own])
    row = found(table, "a")
    assert row["inflation_mean"] == pytest.approx(math.sqrt(2 * 4))  # 40 over 20, 200 over 50
    assert row["cost_mean"] == pytest.approx(math.sqrt(900 / 2000 * 4))
    assert row["inflation_low"] < row["inflation_mean"] < row["inflation_high"]
    assert {name: row[name] for name in ("ended", "until", "right", "stored_bytes_end", "n")} == pytest.approx(
        {"ended": 50, "until": 50, "right": 75, "stored_bytes_end": MIB, "n": 20}
    )
    assert found(table, "fullkv")["inflation_mean"] == 1 and math.isnan(found(table, "fullkv")["inflation_low"])


def test_an_interval_redraws_contexts_and_needs_their_names() -> None:
    full, lengths = answers("fullkv", "full", [10] * 20), [10, 30] * 10
    apart = found(only([*full, *answers("a", "64", lengths)]), "a")
    named = [{"meta": {"group": f"text {i // 10}"}} for i in range(20)]  # two contexts are as good as two samples
    two = [
        r.model_copy(update=more)
        for records in (full, answers("a", "64", lengths))
        for r, more in zip(records, named, strict=True)
    ]
    unnamed = [r.model_copy(update={"meta": {}}) for r in (*full, *answers("a", "64", lengths))]
    assert apart["inflation_mean"] == pytest.approx(2)
    assert 1.4 < apart["inflation_low"] < 1.7 < 2.3 < apart["inflation_high"] < 2.6
    assert math.isnan(found(only(two), "a")["inflation_low"])
    assert math.isnan(found(only(unnamed), "a")["inflation_low"])


def test_only_prompts_of_both_count_and_an_empty_answer_is_one_token() -> None:
    full = answers("fullkv", "full", [10] * 8)
    table = only([*full, *answers("a", "64", [0] * 4), *cell("a", "64", [None] * 8, task="ruler/vt")])
    assert found(table, "a")["inflation_mean"] == pytest.approx(0.1) and found(table, "a")["n"] == 4
    assert only(answers("a", "64", [10] * 8)).lengths.empty  # without fullkv
    plain = [*cell("fullkv", "full", [1.0] * 8), *cell("a", "64", [1.0] * 8)]
    assert only(plain).lengths.empty and TITLE not in sections(only(plain))


def test_records_that_know_no_byte_steps_have_no_cost() -> None:
    old = [*answers("fullkv", "full", [10] * 8), *answers("a", "64", [20] * 8, byte_steps=None)]
    row = found(only(old), "a")
    assert row["inflation_mean"] == pytest.approx(2) and math.isnan(row["cost_mean"])


def test_the_board_has_a_section_and_a_file_of_them(tmp_path: Path) -> None:
    table = only([*answers("fullkv", "full", [10] * 20), *answers("a", "64", [15, 25] * 10)])
    rows = sections(table)[TITLE].set_index("method")
    assert rows.loc["fullkv", "length / fullkv"] == "1.00"
    assert rows.loc["a", "length / fullkv"].startswith("2.00 [1.") and rows.loc["a", "ended %"] == "50.0"
    assert rows.loc["a", "end MiB"] == "1.00"
    page = to_markdown([table], title="b")
    assert "### Long outputs" in page and "- long outputs: of tasks that tell" in page
    names = [path.name for path in write_board([table], tmp_path, "b")]
    assert "b.lengths.csv" in names
    assert "inflation_mean" in (tmp_path / "b.lengths.csv").read_text()
