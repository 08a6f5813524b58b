"""A table in words: who may be first or last follows its rank intervals, and nobody is named inside the noise."""

from harness.records.record import Record
from leaderboards.stats.aggregate import Table
from leaderboards.tables.board import to_markdown, to_terminal
from leaderboards.tables.verdicts import MethodName, tightest_and_widest, uncompressed, verdicts
from tests.leaderboards.pages.test_page import pretend
from tests.pretend import cell, only

FULL = cell("fullkv", "full", [0.9, 1.0] * 10, nll=1.0, kv_bytes=400)
NOISE = [0.0, 1.0] * 10


def low(method: str, score: float, budget: str = "64", **changes: object) -> list[Record]:
    """A cell whose scores lie 0.05 around `score`, by turns."""
    return cell(method, budget, [score - 0.05, score + 0.05] * 10, **changes)


def said(table: Table, budget: str = "64") -> str:
    (found,) = [verdict for verdict in verdicts(table) if verdict.budget == budget]
    return "".join(found.said)


def test_the_one_method_that_ranks_first_is_best_at_its_cost() -> None:
    two = FULL + low("a", 0.7) + low("b", 0.5)
    table = only(two)
    (verdict,) = verdicts(table)
    assert said(table) == "a is best, 70.0 ± 2.0, told apart from the other method."
    assert verdict.won and verdict.cost == "25.0 % of the full cache, 0.00 MiB"
    assert [part for part in verdict.said if isinstance(part, MethodName)] == ["a"]
    assert ["".join(words) for words in uncompressed(table)] == ["fullkv without compression: 95.0 ± 2.0."]
    assert said(only(two + low("c", 0.3))).endswith("told apart from all 2 other methods.")


def test_those_that_are_not_told_apart_are_named_together() -> None:
    twins = [r for m in "abcdef" for r in low(m, 0.7)]
    assert said(only(twins)) == "Not told apart: a 70.0, b 70.0, c 70.0, d 70.0 and 2 more."
    assert said(only(twins[:40] + low("z", 0.1))).endswith("b 70.0. The other method is surely not first.")
    assert said(only(twins[:40] + low("y", 0.1) + low("z", 0.1))).endswith(" 2 others are surely not first.")


def test_a_leader_that_is_not_told_apart_from_all_is_not_called_best() -> None:
    table = only(low("a", 0.7) + low("b", 0.5) + low("c", 0.3))
    table.rows["mark"] = ["=", "", ""]
    assert said(table) == "a is first, 70.0 ± 2.0, but not told apart from every other method."


def test_nothing_is_compared_with_nothing() -> None:
    assert said(only(low("a", 0.7) + low("b", 0.9, over_budget=True))).startswith("Nothing to compare: ")
    lacking = [
        r for m in "ab" for r in cell(m, "64", [None if m == "a" else 1.0, None if m == "b" else 1.0, *[0.5] * 20])
    ]
    assert said(only(lacking)) == "No ranking: no method is complete."
    overspent = cell("fat", "64", [1.0] * 3, over_budget=True)
    assert said(only(lacking + overspent)) == "No ranking: no method is complete."


def test_named_are_those_whose_rank_may_be_first() -> None:
    table = only(pretend(("a", "b", "c", "d"), n=24))
    for verdict in verdicts(table):
        rows = table.rows[table.rows["budget"] == verdict.budget]
        named = {part for part in verdict.said if isinstance(part, MethodName)}
        assert named == set(rows["method"][rows["rank_low"] == 1])
        assert verdict.won == (len(named) == 1 and int(rows["rank_high"].min()) == 1)


def test_the_terminal_says_it_of_the_tightest_and_the_widest_budget() -> None:
    records = FULL + low("a", 0.7, nll=1.5) + low("b", 0.5, nll=1.25) + low("c", 0.3, nll=2.0)
    records += low("a", 0.8, "128", kv_bytes=200) + low("b", 0.8, "128", kv_bytes=200)
    records += [r for m, score in (("a", 0.1), ("b", 0.2)) for r in low(m, score, "0.5", kv_bytes=300)]
    table = only(records)
    full, tight, wide = tightest_and_widest(table)
    assert full == "fullkv without compression: 95.0 ± 2.0."
    assert tight == (
        "Budget 64 (25.0 % of the full cache, 0.00 MiB): a is best, 70.0 ± 2.0, told apart from all 2 other methods. "
        "Against the full cache, with 95% intervals: -25.0 [-25.0, -25.0] points, NLL +0.500 [+0.500, +0.500]. "
        "c lost most, told apart from every other method: -65.0 [-65.0, -65.0] points, NLL +1.000 [+1.000, +1.000]."
    )
    assert wide.startswith("Budget 0.5 (75.0 % of the full cache, 0.00 MiB): b is best")
    text, page = to_terminal([table]), to_markdown([table], title="b")
    heading, first, *_ = text.splitlines()
    assert heading.startswith("tiny, float32") and first == full
    assert "lost most" in text and "lost most" not in page


def test_the_terminal_names_neither_winner_nor_loser_inside_the_noise() -> None:
    noisy, close = cell("a", "64", NOISE), [*NOISE[:-1], 0.0]
    (line,) = tightest_and_widest(only(noisy + cell("b", "64", close)))
    assert line.endswith("Not told apart: a 50.0, b 45.0. Nothing is told apart at this budget.")
    (line,) = tightest_and_widest(only(low("z", 0.9) + noisy + cell("b", "64", close)))
    assert "z is best" in line and line.endswith("May have lost most: a, b.")
    fullkv = cell("fullkv", "full", [1.0] * 20, kv_bytes=400)
    (_, line) = tightest_and_widest(only(fullkv + noisy + cell("b", "64", close)))
    assert ": -55.0 to -50.0 [-75.0, -30.0] points." in line
    (_, few) = tightest_and_widest(only(fullkv[:3] + cell("a", "64", [0.5] * 3) + cell("b", "64", [0.4] * 3)))
    assert few.endswith("Highest mean: a 50.0, of 2 methods; not ranked.")
    assert tightest_and_widest(only(cell("a", "64", [None] * 3))) == []
    assert tightest_and_widest(only(FULL)) == []
