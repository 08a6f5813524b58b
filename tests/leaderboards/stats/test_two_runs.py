"""Two runs side by side: what is paired with what, what surely differs, and which settings are named."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.spec import MethodSpec, ModelSpec, TaskSpec
from leaderboards.stats.paired import ALL
from leaderboards.stats.two_runs import Row, Run, TwoRuns, compare_runs
from leaderboards.tables.two_runs import to_csv, to_json, to_terminal
from tests.pretend import manifest, record

TASKS = ("niah", "vt")
METHODS = ("a", "b")


def run(edit: Callable[[Record], Mapping[str, Any]] = lambda r: {}, *, n: int = 8, **changes: Any) -> Run:
    """Two methods on two tasks; scores .25, .5 and .75 in turn."""
    told = manifest(**{"tasks": tuple(TaskSpec(name=task, protocol="own") for task in TASKS), **changes})
    made = [
        record(
            method, "64", str(i), (1 + i % 3) / 4, run_id=told.run_id, task=task, nll=1.0 + i / 7, token_ids=(i, 2, 3)
        )
        for method, task, i in itertools.product(METHODS, TASKS, range(n))
    ]
    made = [r.model_copy(update={"prompt_sha256": f"{r.task}{r.sample_id}", **dict(edit(r))}) for r in made]
    return told, made


def nll_of(r: Record) -> float:
    assert r.nll is not None
    return r.nll


def row(found: TwoRuns, method: str, task: str) -> Row:
    (one,) = [row for row in found.rows if (row.method, row.task) == (method, task)]
    return one


def told(first: Run, second: Run) -> str:
    return to_terminal(compare_runs(first, second), (first[0], second[0]), width=1000)


def test_equal_runs_differ_in_nothing() -> None:
    found = compare_runs(run(), run())
    assert [s for s in found.settings if s.differs] == [] and found.only == ()
    assert [(r.method, r.task, r.n, r.outputs) for r in found.rows] == [
        (method, task, n, 0) for method in METHODS for task, n in ((TASKS[0], 8), (TASKS[1], 8), (ALL, 16))
    ]
    assert {(p.difference[:3], p.sure) for r in found.rows for p in (r.score, r.nll)} == {((0, 0, 0), False)}
    assert (found.tokens, found.behind) == (3 * 32, 0)


def test_what_surely_differs_is_marked_and_the_rest_is_not() -> None:
    def worse(r: Record) -> dict[str, Any]:
        if r.method == "a":
            return {"metrics": {"score": r.metrics["score"] - 0.25}, "token_ids": (*r.token_ids[:2], 9, 9)}
        return {"nll": nll_of(r) + 0.5} if r.task == "vt" and r.sample_id in "012" else {}

    found = compare_runs(run(), run(worse))
    one = row(found, "a", "niah")
    assert (one.score.first - one.score.second, *one.score.difference[:3]) == pytest.approx((25, -25, -25, -25))
    assert (one.score.corrected_p, one.score.sure, one.outputs) == (2 * 2.0**-7, True, 8)
    assert row(found, "a", ALL).score.sure and row(found, "a", ALL).outputs == 16
    other = row(found, "b", "vt")
    assert (other.nll.difference.mean, other.nll.sure, other.score.sure) == (pytest.approx(1.5 / 8), False, False)
    assert (found.tokens, found.behind) == (16 * 3 + 16 * 4, 16 * 2)
    text = told(run(), run(worse))
    assert "16 of 32 outputs differ; 32 of their 112 tokens come at or after the first difference" in text
    assert "-25.0 [-25.0, -25.0] *" in text and "3 of 12 differences are sure (*)" in text


def test_both_directions_are_found() -> None:
    better = compare_runs(run(), run(lambda r: {"nll": nll_of(r) - 0.5}))
    assert all(r.nll.sure and r.nll.difference.mean == pytest.approx(-0.5) for r in better.rows)


def test_samples_of_one_context_count_once() -> None:
    def grouped(r: Record) -> dict[str, Any]:
        return {"meta": {"group": "one" if int(r.sample_id) < 4 else "two"}}

    found = compare_runs(run(grouped), run(lambda r: {**grouped(r), "nll": nll_of(r) + 1}))
    assert not row(found, "a", "niah").nll.sure and math.isnan(row(found, "a", "niah").nll.difference.low)


def test_contexts_that_nobody_names_are_told() -> None:
    def unnamed(r: Record) -> dict[str, Any]:
        return {"meta": {}} if r.task == "vt" else {}

    assert compare_runs(run(unnamed), run(unnamed)).unnamed == 8
    assert "8 prompts do not name the context" in told(run(unnamed), run(unnamed))
    assert "do not name" not in told(run(), run())


def test_only_equal_prompts_that_are_ok_in_both_are_paired() -> None:
    def other(r: Record) -> dict[str, Any]:
        if r.task == "vt":
            return {"prompt_sha256": "another", "metrics": {"score": 0.0}}
        changed = {"0": {"prompt_sha256": "x"}, "1": {"status": "failed", "metrics": {}, "nll": None}}
        return changed.get(r.sample_id, {"kv_bytes": 200})

    found = compare_runs(run(), run(other))
    assert (row(found, "a", "niah").n, row(found, "a", "niah").score.difference.n) == (6, 6)
    alone = row(found, "a", "vt")
    assert (alone.n, alone.score.first, alone.score.second) == (0, pytest.approx(46.875), 0)
    assert math.isnan(alone.score.difference.mean) and not alone.score.sure
    assert found.only == (
        "niah: 7 prompts in common, of 8 in the first and 8 in the second",
        "vt: 0 prompts in common, of 8 in the first and 8 in the second",
    )
    assert "kept bytes differ in 2 of 4 rows, most for a at 64 on niah: 0.000 | 0.000 MiB a prompt" in told(
        run(), run(other)
    )


def test_what_one_run_has_alone_is_listed() -> None:
    first, second = run(), run()
    fewer = first[0], [r for r in first[1] if r.method == "a"]
    rest = second[0], [r for r in second[1] if r.task == "vt" and (r.method, r.sample_id) != ("a", "0")]
    found = compare_runs(fewer, rest)
    assert found.only[:2] == ("only in the first: task niah", "only in the second: b at 64")
    assert [(r.method, r.task, r.n) for r in found.rows] == [("a", "vt", 7)]


def test_settings_that_differ_are_named_and_those_of_one_run_alone_are_not() -> None:
    def of(dtype: str, name: str, recent: int, only: str, **more: Any) -> Run:
        methods = [
            MethodSpec(label="a", name="a", params={"recent": recent}),
            MethodSpec(label=only, name=only, params={"x": 1}),
        ]
        model = ModelSpec(name="tiny", revision="r0", dtype=dtype, device="cpu")
        machine = {"processor": name, "cores": 2}
        return run(lambda r: {"accelerator": name}, model=model, methods=tuple(methods), machine=machine, **more)

    first = of("float32", "Xeon", 16, "b", git_commit="c0ffee", versions={"torch": "2.13", "numpy": "2"})
    second = of("bfloat16", "EPYC", 32, "c", git_commit="beef", versions={"torch": "2.14", "numpy": "2"}, seed=7)
    differ = {s.name: (s.first, s.second) for s in compare_runs(first, second).settings if s.differs}
    assert differ == {
        "dtype": ("float32", "bfloat16"), "processor": ("Xeon", "EPYC"), "commit": ("c0ffee", "beef"),
        "seed": ("42", "7"), "methods": ("a, b", "a, c"), "a recent": ("16", "32"),
        "version of torch": ("2.13", "2.14"),
    }  # fmt: skip
    text = told(first, second)
    assert text.index("dtype: float32 | bfloat16") < text.index("processor: Xeon | EPYC") < text.index("method ")
    assert "the same: model tiny, revision r0" in text


def test_files_say_what_the_table_says() -> None:
    first, second = run(), run(lambda r: {"nll": None if r.task == "vt" else nll_of(r) + 1})
    found = compare_runs(first, second)
    values = json.loads(to_json(found, (first[0], second[0])))
    vt = next(r for r in values["rows"] if (r["method"], r["task"]) == ("a", "vt"))
    assert (vt["nll"]["first"], vt["nll"]["sure"], vt["score"]["difference"]["mean"]) == (None, False, 0)
    assert values["runs"] == [first[0].run_id, second[0].run_id]
    lines = to_csv(found).splitlines()
    assert lines[0].startswith(
        "budget,method,task,n,score_points_first,score_points_second,score_points_difference_mean"
    )
    assert len(lines) == 1 + len(found.rows) and lines[1].startswith("64,a,niah,8,46.875,46.875,0,0,0,8,1,False,")


def test_runs_without_a_row_in_common_are_refused() -> None:
    first, second = run(), run()
    pairs: list[tuple[Run, Run, str]] = [
        (
            (first[0], [r for r in first[1] if r.method == "a"]),
            (second[0], [r for r in second[1] if r.method == "b"]),
            "in common",
        ),
        (first, (second[0], []), "no records in run"),
    ]
    for one, other, says in pairs:
        with pytest.raises(HarnessError, match=says):
            compare_runs(one, other)


def test_equal_runs_with_noise_have_a_mark_in_5_percent_of_the_comparisons_at_most() -> None:
    marked = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        first, second = (run(lambda r, own=generator: {"nll": own.normal()}) for _ in range(2))
        marked += any(r.nll.sure for r in compare_runs(first, second).rows)
    assert marked <= 8  # 3 are expected at most; more than 8 would have a chance below .003


def test_the_order_of_records_does_not_matter() -> None:
    first, second = run(), run(lambda r: {"nll": nll_of(r) + int(r.sample_id) / 9})
    turned: tuple[RunManifest, list[Record]] = second[0], list(reversed(second[1]))
    assert told(first, second) == told(first, turned)
