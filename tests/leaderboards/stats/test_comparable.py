"""Which records share a table, and which one of several stands for a cell."""

from typing import Any

import pytest

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.spec import MethodSpec, ModelSpec, TaskSpec
from leaderboards.pages.ranking import ranking
from leaderboards.stats.aggregate import aggregate
from leaderboards.stats.comparable import is_own
from leaderboards.tables.board import heading, to_csv
from tasks import load_tasks
from tests.pretend import cell, manifest, only, row


@pytest.mark.parametrize(
    "change",
    [
        {"model": "big"},
        {"dtype": "bfloat16"},
        {"accelerator": "EPYC"},
        {"query": "agnostic"},
        {"first_token": "prefill"},
        {"seed": 1},
    ],
)
def test_axes_are_never_mixed(change: dict[str, Any]) -> None:
    tables = aggregate(cell("a", "64", [1.0] * 8) + cell("a", "64", [0.0] * 8, run_id="run2", **change))
    assert sorted(t.rows.score_points_mean[0] for t in tables) == [0, 100]
    assert [t.axes for t in tables] == sorted(t.axes for t in tables)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks": (TaskSpec(name="niah", protocol="classical"),)}, "niah protocol classical"),
        ({"max_tokens": 512}, "max_tokens 512"),
        ({"nll_tokens": 8}, "nll_tokens 8"),
        ({"model": ModelSpec(name="tiny", revision="r1", dtype="float32", device="cpu")}, "tiny revision r1"),
    ],
)
def test_settings_of_the_runs_are_axes_where_they_differ(change: dict[str, Any], says: str) -> None:
    runs = [manifest(), manifest(**change)]
    records = [r for m, s in zip(runs, (1.0, 0.0), strict=True) for r in cell("a", "64", [s] * 8, run_id=m.run_id)]
    tables = aggregate(records, manifests=runs)
    assert len(tables) == 2
    assert any(says in t.axes.settings for t in tables)


def test_records_of_one_run_on_two_processors_never_share_a_table() -> None:
    """Those that nothing ran count where most of their run did."""
    on = {"Xeon": cell("a", "64", [1.0] * 8), "EPYC": cell("a", "64", [0.0] * 6, task="other")}
    records = [r.model_copy(update={"accelerator": name}) for name, some in on.items() for r in some]
    failed = cell("b", "64", [None] * 3)
    tables = aggregate([*failed, *records])
    assert [t.axes.processor for t in tables] == ["EPYC", "Xeon"]
    assert [list(t.rows.method) for t in tables] == [["a"], ["a", "b"]]


def test_a_processor_is_named_by_its_record_and_else_by_its_manifest() -> None:
    def of(device: str, **machine: Any) -> str:
        model = ModelSpec(name="tiny", revision="r0", dtype="float32", device=device)
        told = manifest(model=model, machine=machine)
        return aggregate(cell("a", "64", [1.0], run_id=told.run_id), manifests=[told])[0].axes.processor

    assert of("cpu", processor="Xeon", accelerators=["H100"]) == "Xeon"
    assert of("cuda:1", processor="Xeon", accelerators=["H100", "H100"]) == "H100 (cuda)"
    assert of("mps", processor="M2", accelerators=[]) == "M2 (mps)"
    assert of("cpu") == aggregate(cell("a", "64", [1.0]))[0].axes.processor == "unknown processor"


def test_runs_that_add_methods_budgets_or_tasks_share_a_table() -> None:
    other = {"methods": (MethodSpec(label="b", name="b"),)}, {"tasks": (TaskSpec(name="ruler/vt", protocol="own"),)}
    runs = [manifest(), *(manifest(**change) for change in other)]
    records = [r for m, name in zip(runs, "abc", strict=True) for r in cell(name, "64", [1.0] * 8, run_id=m.run_id)]
    assert len(aggregate(records, manifests=runs)) == 1


def test_one_sample_id_with_two_prompts_is_refused() -> None:
    records = cell("a", "64", [1.0], prompt_sha256="x") + cell("b", "64", [1.0], prompt_sha256="y", run_id="run2")
    with pytest.raises(HarnessError, match="not the same prompt in runs run1 and run2"):
        aggregate(records)


def test_a_cell_of_two_runs_is_used_once_and_ok_goes_first() -> None:
    table = only(cell("a", "64", [None, 1.0]) + cell("a", "64", [0.5, 0.0], run_id="run2"))
    found = row(table, "a", "64")
    assert (found["n_ok"], found["score_points_mean"]) == (2, 75)  # 0.5 of run2, 1.0 of run1
    assert (table.duplicates, table.run_ids) == (2, ("run1", "run2"))


PROTOCOLS = {
    "ruler/vt": "official",
    "niah/passkey": "passkey",
    "longbench/kvpress/lcc": "kvpress",
    "graded/keys_all": "graded",
    "prose/long": "prose",
}


def _mixed(*tasks: str) -> tuple[list[Record], list[RunManifest]]:
    """Records of these tasks, of which those of our own have 0 and the others 100 points."""
    specs = tuple(TaskSpec(name=name, protocol=PROTOCOLS[name]) for name in tasks)
    run = manifest(tasks=specs)
    scores = {name: 0.0 if PROTOCOLS[name] == name.partition("/")[0] else 1.0 for name in tasks}
    return [r for name in tasks for r in cell("a", "64", [scores[name]] * 8, task=name, run_id=run.run_id)], [run]


def test_own_tasks_are_never_averaged_with_official_ones() -> None:
    records, runs = _mixed(*PROTOCOLS)
    official, own = aggregate(records, manifests=runs)
    assert (official.axes.division, own.axes.division) == ("official tasks", "own tasks")
    assert set(official.tasks.task) == {"ruler/vt", "niah/passkey", "longbench/kvpress/lcc"}
    assert (row(official, "a", "64")["score_points_mean"], row(own, "a", "64")["score_points_mean"]) == (100, 0)
    assert heading(own).endswith(", own tasks")
    csv = to_csv([official, own])
    assert csv.count("official tasks") == csv.count("own tasks") == 1
    found = ranking([official, own], {})
    assert [r["cells"]["Division"].shown for r in found["rows"]] == ["official tasks", "own tasks"]
    assert "Division" in [column.name for column in found["columns"]]


def test_tasks_of_one_kind_and_runs_without_a_manifest_share_a_table() -> None:
    for tasks in (("ruler/vt", "niah/passkey"), ("graded/keys_all", "prose/long")):
        records, runs = _mixed(*tasks)
        table = only(records, manifests=runs)
        assert table.axes.division == "" and "division" not in to_csv([table])
        assert "Division" not in [column.name for column in ranking([table], {})["columns"]]
    assert only(_mixed(*PROTOCOLS)[0]).axes.division == ""


def test_every_task_of_the_project_is_official_or_names_its_family() -> None:
    kinds: dict[str, set[bool]] = {}
    for name, one in load_tasks().items():
        kinds.setdefault(name.partition("/")[0], set()).add(is_own(TaskSpec(name=name, protocol=one.protocol)))
    published = {"ruler", "niah", "longbench", "longbench_e"}
    assert {family for family, found in kinds.items() if found != {family not in published}} == set()
