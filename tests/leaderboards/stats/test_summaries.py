"""The protocols' averages against values computed by hand."""

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.records.record import Record
from leaderboards.stats.aggregate import Table
from leaderboards.stats.bootstrap import RESAMPLES, SEED, task_counts
from leaderboards.stats.summaries import BANDS, BY_LENGTH, CHINESE, ENGLISH, NEEDLES, RULER, band_of
from tasks import load_tasks
from tasks.longbench import DATASETS
from tests.pretend import only, record

ENGLISH_SETS = [name for names in ENGLISH.values() for name in names]


def scored(task: str, scores: Sequence[float | None], *, method: str = "snapkv", **changes: Any) -> list[Record]:
    budget = "full" if method == "fullkv" else "64"
    return [record(method, budget, f"{task}/{i}", score, task=task, **changes) for i, score in enumerate(scores)]


def found(table: Table, summary: str, *, method: str = "snapkv") -> dict[str, Mapping[str, Any]]:
    """Column to its row, in the order of the table."""
    rows = table.summaries[(table.summaries["summary"] == summary) & (table.summaries["method"] == method)]
    return {row["column"]: row for row in rows.to_dict("records")}


def means(table: Table, summary: str, *, method: str = "snapkv") -> dict[str, float]:
    return {column: pytest.approx(row["mean"]) for column, row in found(table, summary, method=method).items()}


def test_the_names_are_those_of_the_tasks() -> None:
    for code, categories in (("en", ENGLISH), ("zh", CHINESE)):
        wanted = {(d.name, d.category) for d in DATASETS if d.language in (code, "code")}
        kinds = {kind: {c for name, c in wanted if name in names} for kind, names in categories.items()}
        assert {name for name, _ in wanted} == {name for names in categories.values() for name in names}
        assert all(len(kind) == 1 for kind in kinds.values())
        assert len(set.union(*kinds.values())) == 6
    assert {d.name for d in DATASETS if d.samples_e is not None} == BY_LENGTH
    assert {f"ruler/{name}" for name in RULER} == {name for name in load_tasks() if name.rpartition("/")[0] == "ruler"}
    assert {name for name in RULER if name.startswith("niah")} == NEEDLES
    assert (len(ENGLISH_SETS), len(BY_LENGTH), len(RULER), len(NEEDLES)) == (16, 13, 13, 8)


def test_gpt_3_5_averages_to_the_published_44_0() -> None:
    """The README's category means of GPT-3.5-Turbo-16k; the six give its Avg, whatever the datasets in each."""
    published = dict(zip(ENGLISH, (39.8, 38.7, 26.5, 67.1, 54.1, 37.8), strict=True))
    records = []
    for kind, names in ENGLISH.items():
        for name, shift in zip(names, {2: (-5.0, 5.0), 3: (-5.0, 1.0, 4.0)}[len(names)], strict=True):
            records += scored(f"longbench/{name}", [(published[kind] + shift) / 100] * 2)
    table = only(records)
    plain = sum(published[kind] * len(names) for kind, names in ENGLISH.items()) / 16
    assert means(table, "longbench/en") == {**published, "Avg": pytest.approx(44.0), "16": pytest.approx(plain)}
    assert round(found(table, "longbench/en")["Avg"]["mean"], 1) == 44.0
    assert abs(plain - 44.0) > 0.1  # the two averages are not the same number
    assert found(table, "longbench/en")["16"]["tasks_present"] == 16
    assert set(table.summaries["summary"]) == {"longbench/en"}


def test_a_dataset_weighs_the_same_whatever_its_samples_and_missing_ones_are_told() -> None:
    records = scored("longbench/qasper", [1.0] * 6) + scored("longbench/narrativeqa", [0.0, 0.5])
    records += scored("longbench/lcc", [0.2])
    table = only(records)
    averages = {"Avg": (62.5 + 20) / 2, "16": (100 + 25 + 20) / 3}
    assert means(table, "longbench/en") == {"single-doc QA": (100 + 25) / 2, "code": 20, **averages}
    counts = {c: (r["tasks_present"], r["tasks_expected"]) for c, r in found(table, "longbench/en").items()}
    assert counts == {"single-doc QA": (2, 3), "code": (1, 2), "Avg": (3, 16), "16": (3, 16)}
    assert found(table, "longbench/en")["16"]["n"] == 9


def test_chinese_counts_the_code_datasets_too_and_variants_stay_apart() -> None:
    records = scored("longbench/dureader", [0.1, 0.3]) + scored("longbench/lcc", [0.6])
    records += scored("longbench/kvpress/lcc", [1.0])
    table = only(records)
    assert means(table, "longbench/zh") == {"multi-doc QA": 20, "code": 60, "Avg": 40}
    assert found(table, "longbench/zh")["Avg"]["tasks_expected"] == 7
    assert means(table, "longbench/en") == {"code": 60, "Avg": 60, "16": 60}
    assert means(table, "longbench/kvpress/en") == {"code": 100, "Avg": 100, "16": 100}
    titles = {"LongBench averages, English", "LongBench averages, Chinese", "LongBench (kvpress) averages, English"}
    assert set(table.summaries["title"]) == titles


def test_avg_has_the_interval_of_the_mean_of_category_means() -> None:
    """Three datasets of one category and two of another: weights 1/6 and 1/4, against numpy on the same draws."""
    names = ["2wikimqa", "hotpotqa", "musique", "lcc", "repobench-p"]
    generator, order = np.random.default_rng(3), sorted(range(12), key=str)
    scores = {name: generator.random(12).round(3) for name in names}
    table = only([r for name in names for r in scored(f"longbench/{name}", scores[name].tolist())])
    counts = [task_counts(SEED, f"longbench/{name}", 12, RESAMPLES) for name in names]
    draws = [n @ (100 * scores[name][order]) / 12 for name, n in zip(names, counts, strict=True)]
    multi, code = np.mean(draws[:3], axis=0), np.mean(draws[3:], axis=0)
    for column, expected in (("Avg", (multi + code) / 2), ("16", np.mean(draws, axis=0)), ("code", code)):
        row = found(table, "longbench/en")[column]
        assert [row["low"], row["high"]] == pytest.approx(np.quantile(expected, [0.025, 0.975]).tolist(), abs=1e-6)
        assert row["low"] < row["mean"] < row["high"]


def test_longbench_e_by_length() -> None:
    parts = [("qasper", "0-4k", 0.0), ("qasper", "0-4k", 1.0), ("qasper", "8k+", 0.4), ("lcc", "0-4k", 0.8)]
    records = [
        record("snapkv", "64", str(i), score, task=f"longbench_e/{name}", meta={"length_bin": size})
        for i, (name, size, score) in enumerate([*parts, ("lcc", "4-8k", 0.3)])
    ]
    table = only(records)
    assert means(table, "longbench_e") == {"0-4k": (50 + 80) / 2, "4-8k": 30, "8k+": 40}
    assert [r["tasks_present"] for r in found(table, "longbench_e").values()] == [2, 1, 1]
    assert {r["tasks_expected"] for r in found(table, "longbench_e").values()} == {13}
    for meta in ({}, {"length_bin": ["8k+"]}):
        lost = only([*records, *scored("longbench_e/trec", [0.5], meta=meta)])
        assert means(lost, "longbench_e")["unknown"] == 50


def test_ruler_by_length_in_the_order_of_numbers() -> None:
    records = []
    for length, score in ((16384, 0.2), (4096, 0.9), (131072, 0.1)):
        for i, name in enumerate(sorted(RULER) if length == 4096 else ["vt", "cwe"]):
            made = scored(f"ruler/{name}", [score + (0.1 if i == 0 else 0.0)] * (i + 1), meta={"length": length})
            records += [r.model_copy(update={"sample_id": f"{length}/{r.sample_id}"}) for r in made]
    table = only([*records, *scored("multiquery/vt", [0.0], meta={"length": 4096})])
    assert list(found(table, "ruler")) == ["4096", "16384", "131072"]
    assert means(table, "ruler") == {"4096": (100 + 12 * 90) / 13, "16384": (30 + 20) / 2, "131072": (20 + 10) / 2}
    assert [r["tasks_present"] for r in found(table, "ruler").values()] == [13, 2, 2]


def test_bands_of_depth() -> None:
    depths = {0: "0-20", 19.9: "0-20", 20: "20-40", 56: "40-60", 60: "60-80", 80: "80-100", 100: "80-100"}
    assert {depth: band_of(depth) for depth in depths} == depths
    assert {band_of(depth) for depth in (None, True, "50", [1, 2], -1, 101, math.nan)} == {""}
    assert only(scored("niah/kamradt", [0.5], meta={"depth": -1})).summaries.empty


def test_scores_and_needles_by_depth() -> None:
    def at(task: str, depth: int, score: float, *kept: int) -> Record:
        needles: dict[str, Any] = {"needle_tokens": 4, "needle_kept": (kept,)} if kept else {}
        return record("snapkv", "64", f"{depth}", score, task=task, meta={"depth": depth, "length": 4096}, **needles)

    records = [at("niah/kamradt", 0, 0.2, 4, 4), at("niah/kamradt", 11, 0.4, 0, 0), at("niah/snapkv", 11, 1.0, 2, 0)]
    records += [at("niah/snapkv", 100, 0.5), at("ruler/niah_single_1", 50, 0.6, 1, 1), at("ruler/qa_1", 50, 0.0)]
    table = only(records)
    assert means(table, "niah/depth") == {"0-20": (30 + 100) / 2, "80-100": 50, "needle %": (50 + 25) / 2}
    assert means(table, "niah/needle") == {"0-20": (50 + 25) / 2}
    assert means(table, "ruler/depth") == {"40-60": 60, "needle %": 25}
    depth = found(table, "niah/depth")
    assert (depth["80-100"]["tasks_expected"], depth["0-20"]["n_expected"], depth["needle %"]["n_expected"]) == (
        1,
        3,
        3,
    )


def test_incomplete_cells_say_so() -> None:
    full = scored("longbench/lcc", [1.0] * 3, method="h2o") + scored("longbench/trec", [1.0] * 3, method="h2o")
    lacking = scored("longbench/lcc", [1.0, None, None]) + scored("longbench/trec", [None] * 3)
    table = only(full + lacking)
    whole, part = (found(table, "longbench/en", method=m) for m in ("h2o", "snapkv"))
    names = ("n", "n_expected", "tasks_present", "flags")
    assert [whole["Avg"][name] for name in names] == [6, 6, 2, "few"]
    assert [part["Avg"][name] for name in names] == [1, 6, 1, "incomplete failed few"]
    assert [part["few-shot"][name] for name in names] == [0, 3, 0, "incomplete failed"]
    assert math.isnan(part["few-shot"]["mean"])


def test_overspending_is_flagged() -> None:
    records = scored("longbench/lcc", [1.0] * 10) + scored("longbench/trec", [1.0] * 10, over_budget=True)
    rows = found(only(records), "longbench/en")
    assert [rows[c]["flags"] for c in ("code", "few-shot", "Avg")] == ["", "over_budget", "over_budget"]


def test_other_tasks_have_no_summary_and_order_does_not_matter() -> None:
    assert only(scored("stdlib/next_line", [1.0]) + scored("multiquery/qasper", [0.5])).summaries.empty
    generator, records, meta = Random(1), list[Record](), {"depth": 44, "length": 1024}
    for method in ("fullkv", "snapkv", "h2o"):
        for task in ("longbench/lcc", "longbench/trec", "niah/kamradt", "ruler/niah_single_1"):
            records += scored(task, [generator.random() for _ in range(12)], method=method, meta=meta)
    one = only(records).summaries
    generator.shuffle(records)
    pd.testing.assert_frame_equal(one, only(records).summaries)
    assert list(dict.fromkeys(one["summary"])) == ["longbench/en", "ruler", "niah/depth", "ruler/depth"]
    assert set(found(only(records), "niah/depth")) <= set(BANDS)


def asked(method: str, budget: str, kept: Mapping[str, Sequence[int]]) -> list[Record]:
    """Questions about the orders of contexts, one for each place; kept: of each place, by context."""
    return [
        record(
            method,
            budget,
            f"{number}/{place}",
            float(own),
            task="instructions/obey",
            metrics={"score": float(own), place: float(own)},
            meta={"group": f"text {number}"},
        )
        for place, column in kept.items()
        for number, own in enumerate(column)
    ]


def test_metrics_beside_the_score_and_the_bias_of_a_place() -> None:
    full = {"first": [1] * 8, "middle": [1] * 8, "last": [1] * 6 + [0] * 2}
    snap = {"last": [1, 1] + [0] * 6, "first": [1] * 7 + [0], "middle": [0] * 8}
    table = only([*asked("fullkv", "full", full), *asked("snapkv", "64", snap)])
    assert means(table, "instructions/obey/beside") == {
        "first": 87.5,
        "middle": 0.0,
        "last": 25.0,
        "first - last": 62.5,
        "more than fullkv's": 62.5 - 25.0,
    }
    assert list(found(table, "instructions/obey/beside")) == [*full, "first - last", "more than fullkv's"]
    bias = found(table, "instructions/obey/beside")["first - last"]
    differences = np.array(snap["first"]) - np.array(snap["last"])  # of each context, of which the interval is
    redrawn = task_counts(SEED, "instructions/obey", 8, RESAMPLES) @ (100 * differences / 8)
    assert (bias["low"], bias["high"]) == pytest.approx(np.quantile(redrawn, [0.025, 0.975]))
    assert (bias["n"], bias["n_expected"], bias["flags"]) == (16, 16, "few")


def test_turns_stand_in_their_order_and_tasks_without_other_metrics_are_left_out() -> None:
    turns = {f"turn{number}": 1 / number for number in (1, 10, 2)}
    records = scored("turns/facts", [0.5] * 3, metrics={"score": 0.5, **turns})
    table = only([*records, *scored("graded/keys_all", [0.5] * 3)])
    assert means(table, "turns/facts/beside") == {"turn1": 100.0, "turn2": 50.0, "turn10": 10.0}
    assert list(found(table, "turns/facts/beside")) == ["turn1", "turn2", "turn10"]
    assert set(table.summaries["summary"]) == {"turns/facts/beside"}
