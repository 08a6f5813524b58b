"""`harness calibrate-tasks`, and runs that use what it found."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from harness.compiler.grade import Grader, search
from harness.plan.sweep import PlannedSample
from tasks.graded.settings import load_calibration
from tests.task_data import write_pool
from tests.tiny_run import TINY, call, manifest, only

CALIBRATE = ("calibrate-tasks", *TINY, "--lengths", "1024", "--samples", "8")
RUN = (
    "run",
    *TINY,
    "--methods",
    "fullkv",
    "--lengths",
    "1024",
    "--limit",
    "1",
    "--max-new-tokens",
    "2",
    "--observe",
    0,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(autouse=True)
def _small_pool(pool: Path, monkeypatch: pytest.MonkeyPatch, _no_pictures: None) -> None:
    for module in ("names", "sweep"):
        monkeypatch.setattr(f"harness.plan.{module}.find_asset", pool.__truediv__)


def steady(*means: float) -> Callable[[int, int], Sequence[float]]:
    """Scores of these means, which vary by a point."""
    return lambda setting, count: [means[setting] + (0.01, -0.01)[at % 2] for at in range(count)]


@pytest.mark.parametrize(
    ("means", "chosen", "tried"),
    [
        ((1.0, 0.9, 0.7, 0.3, 0.1), 2, [2]),
        ((1.0, 1.0, 1.0, 0.8, 0.1), 3, [2, 3]),
        ((0.9, 0.8, 0.1, 0.1, 0.1), 0, [0, 2]),
        ((1.0, 1.0, 1.0, 1.0, 1.0), None, [2, 3, 4]),
        ((1.0, 1.0, 0.4, 0.0, 0.0), None, [0, 1, 2]),
        ((1.0, 1.0, 0.55, 0.0, 0.0), 2, [0, 1, 2]),
    ],
)
def test_the_search_ends_near_the_aim_or_says_that_nothing_qualifies(
    means: tuple[float, ...], chosen: int | None, tried: list[int]
) -> None:
    found, seen = search(range(len(means)), steady(*means), 16)
    assert (found, [one.setting for one in seen]) == (chosen, tried)
    assert [one.n for one in seen if one.setting == chosen] == ([] if chosen is None else [16])
    assert all(one.score == pytest.approx(100 * means[one.setting]) for one in seen)


def test_a_score_that_never_varies_does_not_qualify() -> None:
    chosen, seen = search(range(3), lambda setting, count: [(1.0, 0.75, 0.5)[setting]] * count, 16)
    assert chosen is None and [one.setting for one in seen] == [1, 2]


@pytest.mark.parametrize(("near", "tried"), [(3, [3]), (4, [3, 4]), (1, [1, 2, 3])])
def test_the_search_begins_where_another_length_ended(near: int, tried: list[int]) -> None:
    found, seen = search(range(5), steady(1.0, 1.0, 1.0, 0.8, 0.1), 16, near)
    assert (found, [one.setting for one in seen]) == (3, tried)


def test_a_setting_that_leaves_the_range_on_all_prompts_gives_way_to_the_next_nearest() -> None:
    def scores(setting: int, count: int) -> list[float]:
        half, rest = {0: (1.0, 1.0), 1: (0.92, 0.92), 2: (0.7, 0.1)}.get(setting, (0.0, 0.0))
        return ([half, half - 0.01] * 4 + [rest] * 8)[:count]

    chosen, seen = search(range(5), scores, 16)
    assert chosen is None and [(one.setting, one.n) for one in seen] == [(2, 16)]


def test_a_calibration_is_written_and_a_repeated_one_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (*CALIBRATE, "--tasks", "graded/keys_all,graded/copying_words", "--out", tmp_path)
    assert call(*asked) == 0
    assert "graded/keys_all at 1024: no numbers qualifies: 1 0" in capsys.readouterr().out
    calibration, _ = load_calibration(tmp_path / "tiny.json")
    assert [(one.task, one.length, one.chosen) for one in calibration.tasks] == [
        ("graded/keys_all", 1024, None),
        ("graded/copying_words", 1024, None),
    ]
    assert calibration.seed == 1000 and calibration.command[:2] == ("harness", "calibrate-tasks")
    monkeypatch.delattr(Grader, "_score")
    assert call(*asked) == 0
    assert load_calibration(tmp_path / "tiny.json")[0].tasks == calibration.tasks


def test_rules_that_the_full_cache_keeps_are_those_that_runs_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["opening", "count", "format", "capitals"]

    def score(_: Grader, planned: PlannedSample) -> float:
        return float(planned.sample.meta["rule"] in kept)

    monkeypatch.setattr(Grader, "_score", score)
    assert call(*CALIBRATE, "--tasks", "instructions/obey", "--out", tmp_path) == 0
    assert "rule count: kept by the full cache in 100.0 +- 0.0 % of 8 prompts" in capsys.readouterr().out
    path, out = tmp_path / "tiny.json", tmp_path / "run"
    assert call(*RUN, "--limit", "24", "--tasks", "instructions", "--graded", path, "--out", out) == 0
    provenance = manifest(out)["spec"]["tasks"][0]["provenance"]
    assert provenance["rules"] == kept
    assert provenance["calibration"]["sha256"] == load_calibration(path)[1]
    lines = (only(out) / "records.jsonl").read_text().splitlines()
    obeyed = [one for one in map(json.loads, lines) if one["task"] == "instructions/obey"]
    assert {one["meta"]["rule"] for one in obeyed} == set(kept)


def test_with_too_few_rules_the_family_leaves_the_task_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Grader, "_score", lambda *_: 0.0)
    assert call(*CALIBRATE, "--tasks", "instructions/obey", "--out", tmp_path) == 0
    with caplog.at_level(logging.WARNING):
        assert call(*RUN, "--tasks", "instructions", "--graded", tmp_path / "tiny.json", "--out", tmp_path / "r") == 0
    assert [task["name"] for task in manifest(tmp_path / "r")["spec"]["tasks"]] == ["instructions/secret"]
    assert "instructions/obey is left out at 1024 tokens" in " ".join(caplog.messages)


def test_a_run_takes_the_settings_that_it_names_and_leaves_out_what_did_not_qualify(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*CALIBRATE, "--tasks", "graded/keys_all", "--out", tmp_path) == 0
    path = tmp_path / "tiny.json"
    assert call(*RUN, "--tasks", "graded", "--graded", path, "--out", tmp_path / "none") == 2
    assert "no task is left: none has a setting that qualified at these lengths" in capsys.readouterr().err
    said = json.loads(path.read_text())
    said["tasks"][0]["chosen"] = said["tasks"][0]["tried"][0]["setting"]
    path.write_text(json.dumps(said))
    with caplog.at_level(logging.WARNING):
        assert call(*RUN, "--tasks", "graded", "--graded", path, "--out", tmp_path / "family") == 0
    assert "graded/keys_owned is left out at 1024 tokens: no setting of it qualified there" in caplog.messages
    (task,) = manifest(tmp_path / "family")["spec"]["tasks"]
    assert task["name"] == "graded/keys_all" and task["provenance"]["not_calibrated"] == []
    assert task["provenance"]["calibration"]["sha256"] == load_calibration(path)[1]
    assert call(*RUN, "--tasks", "graded/keys_all", "--out", tmp_path / "named") == 0
    (other,) = manifest(tmp_path / "named")["spec"]["tasks"]
    assert other["provenance"]["not_calibrated"] == [1024] and other["provenance"]["calibration"] == "none"


def test_a_run_with_settings_of_its_own_is_verified_at_the_lengths_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(_: Grader, planned: PlannedSample) -> float:
        return (planned.sample.meta["length"] == 512) * (0.5 if planned.sample.id.endswith("0") else 0.75)

    monkeypatch.setattr(Grader, "_score", score)
    lengths = ("--lengths", "512,1024")
    assert call(*CALIBRATE, *lengths, "--tasks", "graded/keys_all", "--out", tmp_path) == 0
    out = tmp_path / "run"
    assert call(*RUN, *lengths, "--tasks", "graded", "--graded", tmp_path / "tiny.json", "--out", out) == 0
    assert call("submit", only(out), "--out", tmp_path / "run.zip") == 0
    assert call("verify", tmp_path / "run.zip") == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ("--tasks", "stdlib"),
            "stdlib/next_line has nothing to calibrate; tasks that have: --tasks graded,instr",
        ),
        (("--samples", "2"), "samples"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    asked: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*CALIBRATE, *asked, "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
