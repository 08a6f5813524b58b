"""Kinds of methods at the same bytes: who is of a kind at a budget, which half it is chosen by, and what for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from harness.records.record import Record
from leaderboards.stats.aggregate import Table, aggregate
from leaderboards.stats.frontiers import COLUMNS
from leaderboards.tables.board import to_markdown
from tests.pretend import cell

N = 24
EVEN = [sorted(map(str, range(N))).index(str(i)) % 2 == 0 for i in range(N)]  # samples are in the order of their ids
KINDS = {"few": ["near", "far"], "one": ["alone"], "codes": ["big", "small"]}


def at(method: str, nlls: Sequence[float], *, budget: str = "64", stored: int = 100, **changes: Any) -> list[Record]:
    sizes = {"stored_bytes": stored, "kv_bytes": stored, "asked_bytes": 100, "full_bytes": 400}
    made = cell(method, budget, [0.5] * len(nlls), **sizes, **changes)
    return [
        r.model_copy(update={"nll": nll, "meta": {"group": str(i)}})
        for i, (r, nll) in enumerate(zip(made, nlls, strict=True))
    ]


def every() -> list[Record]:
    """`near` is best on even contexts and worst on odd ones, `far` is always in between; `big` holds too much."""
    return [
        *at("near", [1.0 if even else 9.0 for even in EVEN]),
        *at("far", [2.0] * N),
        *at("alone", [2.5 + 0.01 * (i % 3) for i in range(N)]),
        *at("big", [0.1] * N, budget="full", stored=101),
        *at("small", [1.5] * N, budget="full", stored=60),
    ]


def told(table: Table, kind: str, measure: str = "nll") -> Mapping[Any, Any]:
    rows = table.frontiers
    (one,) = rows[(rows.kind == kind) & (rows.measure == measure)].to_dict("records")
    return one


@pytest.fixture(scope="module")
def table() -> Table:
    (made,) = aggregate(every(), frontiers=KINDS)
    return made


def test_the_choice_of_one_half_counts_on_the_other(table: Table) -> None:
    """Even contexts choose `near`, which is worst on the odd ones; odd ones choose `far`."""
    few = told(table, "few")
    assert list(table.frontiers) == COLUMNS
    assert (few["chosen"], few["n"], few["mean"]) == ("near, far", N, pytest.approx((9.0 + 2.0) / 2))
    assert few["against"] == few["verdict"] == "" and np.isnan(few["gain"])


def test_gains_are_paired_and_have_an_interval_and_a_verdict(table: Table) -> None:
    alone = told(table, "one")
    assert (alone["against"], alone["verdict"]) == ("few", "better")
    assert alone["low"] < alone["gain"] < alone["high"]
    assert alone["gain"] == pytest.approx((9.0 + 2.0) / 2 - 2.51)
    assert told(table, "one", "score")["verdict"] == "not told apart"
    (few,) = aggregate([r for r in every() if int(r.meta["group"]) < 19], frontiers=KINDS)
    assert told(few, "one")["verdict"] == "too few contexts"


def test_a_method_without_a_budget_counts_where_it_holds_no_more(table: Table) -> None:
    codes = told(table, "codes")
    assert (codes["chosen"], codes["percent"], codes["mean"]) == ("small", pytest.approx(15.0), 1.5)
    (without,) = aggregate([r for r in every() if r.method != "small"], frontiers=KINDS)
    assert "codes" not in set(without.frontiers["kind"])


def test_what_is_incomplete_or_over_its_bytes_stands_for_no_kind() -> None:
    over = [r.model_copy(update={"over_budget": r.method == "near"}) for r in every()]
    (table,) = aggregate(over, frontiers=KINDS)
    assert told(table, "few")["chosen"] == "far"
    lacking = [r for r in every() if r.method != "far" or r.meta["group"] != "3"]
    (table,) = aggregate(lacking, frontiers=KINDS)
    assert told(table, "few")["chosen"] == "near"


def test_a_kind_of_many_equal_methods_is_not_favoured() -> None:
    """Thirty methods of the same worth against one: chosen where they are compared, their best would look better."""
    random, gains, naive = np.random.default_rng(5), list[float](), list[float]()
    for _ in range(30):
        nlls = {f"m{i}": random.normal(3.0, 1.0, N).tolist() for i in range(31)}
        records = [r for name, own in nlls.items() for r in at(name, own)]
        (table,) = aggregate(records, frontiers={"one": ["m0"], "many": [f"m{i}" for i in range(1, 31)]}, resamples=50)
        gains.append(told(table, "many")["gain"])
        naive.append(np.mean(nlls["m0"]) - min(np.mean(own) for own in list(nlls.values())[1:]))
    assert abs(np.mean(gains)) < 3 * np.std(gains) / np.sqrt(len(gains)) < 0.2
    assert np.mean(naive) > 0.3


def test_the_page_has_a_table_of_each_measure(table: Table) -> None:
    page = to_markdown([table], title="board")
    assert "### Kinds of methods at the same bytes: NLL, nats per token" in page and "| near, far |" in page
    assert "Kinds of methods" not in to_markdown(aggregate(every()), title="board")
