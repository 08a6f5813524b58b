"""A subject against the strongest other method of each task family: by hand, by an independent bootstrap, by CLI."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.errors import HarnessError
from harness.records.record import Record
from leaderboards.stats.aggregate import Table, aggregate
from leaderboards.stats.subject import ALL, COLUMNS, bare_name, family_of
from tasks import load_tasks
from tests.pretend import cell, only, record, row

SINGLE, KAMRADT, VT = "ruler/niah_single_1", "niah/kamradt", "ruler/vt"


def scored(
    method: str,
    task: str,
    nlls: Sequence[float | None],
    *,
    scores: Sequence[float] = (),
    budget: str = "64",
    **more: Any,
) -> list[Record]:
    """One record per NLL; its score is 0.5 unless given."""
    budget = "full" if method == "fullkv" else budget
    given = scores or [0.5] * len(nlls)
    made = zip(cell(method, budget, given, task=task, **more), nlls, strict=True)
    return [r.model_copy(update={"nll": nll}) for r, nll in made]


def found(table: Table, family: str, *, measure: str = "nll", budget: str = "64") -> Mapping[str, Any]:
    rows = table.rivals
    (one,) = rows[(rows.family == family) & (rows.measure == measure) & (rows.budget == budget)].to_dict("records")
    return {str(name): value for name, value in one.items()}


def small() -> list[Record]:
    """Two families, two rivals; `near` is the better one on needles, `far` on tracking, by NLL; by score `far`."""
    cells: dict[str, tuple[list[float], list[float]]] = {  # NLLs and scores: two of SINGLE, one of KAMRADT, two of VT
        "fullkv": ([0.0, 1.0, 0.5, 1.0, 1.0], [0.5] * 5),
        "mine": ([1.0, 2.0, 0.5, 3.0, 2.0], [1.0, 0.0, 1.0, 0.5, 0.5]),
        "near": ([2.0, 2.0, 1.5, 9.0, 9.0], [0.0, 0.0, 0.0, 0.5, 0.5]),
        "far@p": ([0.0, 0.0, 9.0, 2.0, 2.0], [0.0, 1.0, 0.0, 1.0, 0.5]),
    }
    tasks = {SINGLE: slice(0, 2), KAMRADT: slice(2, 3), VT: slice(3, 5)}
    made = [scored(m, t, n[at], scores=s[at]) for m, (n, s) in cells.items() for t, at in tasks.items()]
    return [r for some in made for r in some]


def test_means_rival_and_ratio_by_hand() -> None:
    table = only(small(), subject="mine")
    assert list(table.rivals) == COLUMNS
    needles, tracking, every = (found(table, family) for family in ("needles", "tracking", ALL))
    assert (needles["rival"], needles["tasks"], needles["n"]) == ("near", 2, 3)
    expected = {"subject_mean": (1.5 + 0.5) / 2, "rival_mean": (2.0 + 1.5) / 2, "gain": (0.5 + 1.0) / 2}
    expected |= {"subject_loss": (1.0 + 0.0) / 2, "rival_loss": ((2.0 + 1.0) / 2 + 1.0) / 2, "loss_ratio": 0.5 / 1.25}
    assert {name: needles[name] for name in expected} == pytest.approx(expected)
    assert [tracking[name] for name in ("rival", "gain", "loss_ratio")] == ["far@p", *map(pytest.approx, (-0.5, 1.5))]
    assert every["gain"] == pytest.approx((0.75 - 0.5) / 2)
    assert every["loss_ratio"] == pytest.approx((0.5 + 1.5) / (1.25 + 1.0))
    assert (every["tasks"], every["n"], every["verdict"]) == (3, 5, "too few contexts")
    assert all(math.isnan(one[end]) for one in (needles, tracking, every) for end in ("low", "high"))


def test_the_score_has_its_own_rival_in_points() -> None:
    table = only(small(), subject="mine")
    needles, tracking = (found(table, family, measure="score") for family in ("needles", "tracking"))
    assert (needles["rival"], needles["gain"]) == ("far@p", pytest.approx((50 + 100) / 2 - 25))
    assert (tracking["rival"], tracking["gain"]) == ("far@p", pytest.approx(50 - 75))
    assert math.isnan(needles["loss_ratio"])
    assert found(table, ALL, measure="score")["gain"] == pytest.approx((50 - 25) / 2)


def test_only_samples_that_both_have_are_paired() -> None:
    """The subject lacks one sample, which the rival was good at; it is incomplete and not judged."""
    records = scored("mine", VT, [2.0] * 8) + scored("other", VT, [3.0] * 8 + [-90.0])
    records += [record("mine", "64", "8", None, task=VT)]
    told = found(only(records, subject="mine"), "tracking")
    assert (told["n"], told["rival_mean"], told["gain"], told["low"]) == (8, 3.0, 1.0, 1.0)
    assert told["verdict"] == "incomplete"


def test_verdicts_say_what_the_interval_says() -> None:
    spread = [0.0, 1.0] * 10

    def verdict(shift: float, **more: Any) -> str:
        mine = scored("mine", VT, [v + shift for v in spread], **more)
        return str(found(only(mine + scored("other", VT, spread[::-1]), subject="mine"), "tracking")["verdict"])

    assert [verdict(s) for s in (-5.0, 0.0, 5.0)] == ["better", "not told apart", "worse"]
    assert verdict(-5.0, over_budget=True) == "over budget"
    same = only(scored("mine", VT, spread) + scored("other", VT, spread), subject="mine")
    assert found(same, "tracking")["verdict"] == "not told apart"
    assert found(same, "tracking")["low"] == found(same, "tracking")["high"] == 0


def test_presets_of_the_subject_are_no_rivals() -> None:
    others = ("mine@window", "mine@window[beta=2]", "mine[beta=2]", "mine")
    records = [r for i, m in enumerate(others) for r in scored(m, VT, [float(i)] * 6)]
    records += scored("miner", VT, [50.0] * 6)
    for subject in others:
        assert found(only(records, subject=subject), "tracking")["rival"] == "miner"
    alone = only([r for r in records if r.method != "miner"], subject="mine").rivals
    assert set(zip(alone.verdict, alone.family, alone.gain.isna(), strict=True)) == {("no rival", "tracking", True)}
    assert bare_name("a@b[c=d@e]") == bare_name("a[c=d@e]") == "a"


def test_incomplete_overspending_and_unbudgeted_methods_are_no_rivals() -> None:
    records = scored("mine", VT, [5.0] * 6) + scored("fair", VT, [6.0] * 6) + scored("fullkv", VT, [0.0] * 6)
    records += [*scored("fat", VT, [1.0] * 6)[:-1], record("fat", "64", "5", 0.5, task=VT, nll=1.0, over_budget=True)]
    records += [*scored("broken", VT, [1.0] * 6)[:-1], record("broken", "64", "5", None, task=VT)]
    records += scored("short", VT, [1.0] * 5)
    records += scored("elsewhere", VT, [1.0] * 6, budget="128")
    table = only(records, subject="mine")
    assert found(table, "tracking")["rival"] == "fair"
    assert set(table.rivals["budget"]) == {"64"}
    assert found(table, "tracking")["subject_loss"] == 5


def test_unknown_subjects_are_refused_and_none_gives_nothing() -> None:
    with pytest.raises(HarnessError, match=r"no method 'mien' with a budget .* with one: far@p, mine, near$"):
        aggregate(small(), subject="mien")
    with pytest.raises(HarnessError, match="'fullkv' with a budget"):
        aggregate(small(), subject="fullkv")
    table = only(small())
    assert table.rivals.empty
    assert list(table.rivals) == COLUMNS
    two = aggregate([*small(), *(r.model_copy(update={"seed": 7, "method": "x"}) for r in small())], subject="mine")
    assert sorted(t.rivals.empty for t in two) == [False, True]


def test_families() -> None:
    families = {name: family_of(name) for name in [*load_tasks(), "prose"]}
    assert families["niah/passkey"] == families["ruler/niah_single_3"] == "needles"
    assert {n for n, f in families.items() if f == "multi-key"} == {
        *(f"ruler/niah_multikey_{i}" for i in (1, 2, 3)), "ruler/niah_multivalue", "ruler/niah_multiquery"
    }  # fmt: skip
    assert {n for n, f in families.items() if f == "tracking"} == {VT}
    others = {"ruler/cwe": "ruler", "longbench/kvpress/qasper": "longbench/kvpress", "prose": "prose"}
    assert {name: families[name] for name in others} == others


Samples = dict[str, list[tuple[float, str | None]]]


def naive(families: Sequence[Samples], resamples: int) -> np.ndarray:
    """[resamples]: mean over families of the mean over redrawn tasks of the mean over redrawn groups; loops alone."""
    generator = np.random.default_rng(12345)

    def clusters(values: list[tuple[float, str | None]]) -> list[list[float]]:
        groups: dict[Any, list[float]] = {}
        for i, (value, group) in enumerate(values):
            groups.setdefault(i if group is None else group, []).append(value)
        return list(groups.values())

    def redrawn(tasks: list[list[list[float]]]) -> float:
        drawn = [tasks[i] for i in generator.integers(len(tasks), size=len(tasks))]
        picked = [np.concatenate([g[i] for i in generator.integers(len(g), size=len(g))]) for g in drawn]
        return float(np.mean([p.mean() for p in picked]))

    members = [[clusters(values) for values in samples.values()] for samples in families]
    return np.array([np.mean([redrawn(tasks) for tasks in members]) for _ in range(resamples)])


def test_intervals_agree_with_a_plain_hierarchical_bootstrap() -> None:
    """Three tasks of unequal size and spread, groups of unequal size in one; another family of one task."""
    generator = np.random.default_rng(5)

    def of(mean: float, spread: float, n: int) -> list[tuple[float, str | None]]:
        return [(value, None) for value in generator.normal(mean, spread, n).tolist()]

    needles: Samples = {SINGLE: of(0.5, 1.0, 20), KAMRADT: of(1.5, 2.0, 26), "niah/passkey": of(-0.5, 0.3, 8)}
    needles[KAMRADT] = [(v, f"g{i % 7 if i < 20 else 0}") for i, (v, _) in enumerate(needles[KAMRADT])]
    tracking: Samples = {VT: of(1.0, 1.0, 12)}
    records = []
    for task, values in (needles | tracking).items():
        for i, (value, group) in enumerate(values):
            for method, nll in (("mine", 9.0 - value), ("other", 9.0)):
                records.append(record(method, "64", str(i), 0.5, task=task, nll=nll, meta={"group": group}))
    table = only(records, subject="mine", resamples=6000)
    for family, parts in (("needles", [needles]), ("tracking", [tracking]), (ALL, [needles, tracking])):
        gain = found(table, family)
        low, high = np.quantile(naive(parts, 6000), [0.025, 0.975])
        assert [gain["low"], gain["high"]] == pytest.approx([low, high], abs=0.05 * (high - low)), family
        means = [np.mean([np.mean([v for v, _ in values]) for values in part.values()]) for part in parts]
        assert gain["gain"] == pytest.approx(np.mean(means))
    # redrawing tasks must matter here: the samples alone give a much narrower interval
    alone, needle = row(table, "mine", "64"), found(table, "needles")
    width = alone["nll_nats_vs_best_high"] - alone["nll_nats_vs_best_low"]
    assert needle["high"] - needle["low"] > 1.5 * width


def test_no_interval_where_it_would_mean_nothing() -> None:
    def interval(*sizes: int, group: Callable[[int], str | None] = lambda i: None) -> tuple[float, float]:
        records = []
        for t, size in enumerate(sizes):
            for method, nll in (("mine", 1.0), ("other", 2.0)):
                made = scored(method, f"niah/{t}", [nll + i for i in range(size)])
                records += [r.model_copy(update={"meta": {"group": group(int(r.sample_id))}}) for r in made]
        gain = found(only(records, subject="mine"), "needles")
        assert gain["gain"] == 1
        return gain["low"], gain["high"]

    assert interval(6) == interval(3, 3) == (1.0, 1.0)
    assert interval(12, group=lambda i: "a" if i < 6 else None) == (1.0, 1.0)  # by the samples drawn, not by all
    for nothing in (interval(5), interval(8, 1), interval(2, 3), interval(12, group=lambda i: str(i % 5))):
        assert all(map(math.isnan, nothing))


def test_all_families_need_an_interval_in_each() -> None:
    records = [r for m, n in (("mine", 1.0), ("other", 2.0)) for r in scored(m, VT, [n] * 20)]
    assert found(only(records, subject="mine"), ALL)["low"] == 1
    records += [r for m, n in (("mine", 1.0), ("other", 2.0)) for r in scored(m, SINGLE, [n] * 5)]
    tracking, every = (found(only(records, subject="mine"), family) for family in ("tracking", ALL))
    assert tracking["low"] == 1
    assert math.isnan(every["low"]) and every["verdict"] == "too few contexts"


def test_budgets_and_families_are_in_order_and_seeded() -> None:
    generator = np.random.default_rng(1)
    records = []
    for names in product(("mine", "other"), ("longbench/qasper", VT, "a/b", SINGLE), ("128", "64", "0.25")):
        records += scored(*names[:2], generator.random(8).tolist(), budget=names[2])
    rivals = only(records, subject="mine").rivals
    assert list(dict.fromkeys(rivals["budget"])) == ["64", "128", "0.25"]
    assert list(dict.fromkeys(rivals["family"])) == ["needles", "tracking", "a", "longbench", ALL]
    pd.testing.assert_frame_equal(rivals, only(records[::-1], subject="mine").rivals)
    assert not rivals["low"].equals(only(records, subject="mine", seed=1).rivals["low"])
