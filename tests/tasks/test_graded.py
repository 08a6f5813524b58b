"""Graded tasks: their dials, wordings and scores, and the calibrations that set them."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tasks import load_tasks
from tasks.base import TASKS, Grades, Sample, TaskError, TaskOptions
from tasks.graded import scores
from tasks.graded.family import GradedTask
from tasks.graded.settings import PACKAGED, find_grades, load_calibration
from tasks.instructions import RULES
from tests.overlap import overlaps, prompt
from tests.task_data import Words, tokens

load_tasks()
GRADED = [task for task in TASKS.values() if isinstance(task, GradedTask)]
NAMES = [task.name for task in GRADED]
BY_NAME = dict(zip(NAMES, GRADED, strict=True))
CALIBRATION: dict[str, Any] = {
    "model": "made",
    "model_revision": "abc",
    "low": 50,
    "high": 95,
    "seed": 1,
    "corpus": "made",
    "tasks": [
        {"task": "graded/keys_all", "length": 1024, "dial": "numbers", "scale": [1, 2, 3], "chosen": 2}
        | {"tried": [{"setting": 2, "score": 70.0, "error": 5.0, "n": 16}]},
        {"task": "graded/keys_all", "length": 2048, "dial": "numbers", "scale": [1], "tried": [], "chosen": None},
    ],
}


@pytest.fixture(scope="module")
def drawn(small_pool: Path) -> TaskOptions:
    return TaskOptions(
        tokenizer=Words(), max_tokens=9000, lengths=(1024,), limit=2, seed=3, fetch=small_pool.__truediv__
    )


def samples(task: GradedTask, options: TaskOptions, setting: int | None = None, **changes: Any) -> list[Sample]:
    if setting is not None:
        grades = Grades({task.name: dict.fromkeys(options.lengths, setting)}, {})
        options = replace(options, grades=grades)
    return [*task.samples(replace(options, **changes))]


def test_there_are_twelve_tasks_in_five_families() -> None:
    assert len(NAMES) >= 12
    assert len({name.removeprefix("graded/").partition("_")[0] for name in NAMES}) >= 5


@pytest.mark.parametrize("task", GRADED, ids=NAMES)
def test_every_setting_hides_its_statements_and_its_gold_scores_1(task: GradedTask, drawn: TaskOptions) -> None:
    for setting in task.kind.dial.scale:
        for sample in samples(task, drawn, setting):
            assert task.score(sample, task.reference(sample)) == {"score": 1.0}
            assert task.score(sample, "") == {"score": 0.0} == task.score(sample, "something else entirely")
            assert all(needle in sample.context for needle in sample.meta["needles"]) and sample.meta["needles"]
            assert not any(needle in sample.question for needle in sample.meta["needles"])
            assert sample.meta["setting"] == setting and sample.stop == ("\n",)
            assert len(drawn.tokenizer.encode(f" {task.reference(sample)}")) < sample.max_new_tokens
            assert 900 < tokens(sample, drawn.tokenizer) + task.kind.generation <= 1024


@pytest.mark.parametrize("task", GRADED, ids=NAMES)
def test_a_dial_turned_up_hides_or_asks_more(task: GradedTask) -> None:
    scale, made = task.kind.dial.scale, [task.kind.make(setting, Random(5)) for setting in task.kind.dial.scale]
    assert list(scale) == sorted(set(scale)) and len(scale) >= 5
    sizes = [(len(puzzle.statements), sum(map(len, puzzle.answers)), _alike(puzzle.statements)) for puzzle in made]
    assert any(column == sorted(set(column)) for column in map(list, zip(*sizes, strict=True)))


def _alike(statements: tuple[str, ...]) -> int:
    """Characters that all statements begin with."""
    return next((at for at, letters in enumerate(zip(*statements, strict=False)) if len(set(letters)) > 1), 0)


@pytest.mark.parametrize("task", GRADED, ids=NAMES)
def test_a_sample_is_the_same_at_every_limit_and_has_its_own_text(task: GradedTask, drawn: TaskOptions) -> None:
    made = samples(task, drawn, limit=3)
    assert samples(task, drawn, limit=1) == made[:1]
    assert len({sample.meta["group"] for sample in made}) == 3
    assert len({sample.answers for sample in made}) > 1
    assert all(found.share < 0.1 for found in overlaps([prompt(task.name, sample) for sample in made])[:1])


def test_no_two_tasks_share_text_nor_does_calibration(drawn: TaskOptions) -> None:
    prompts = [prompt(task.name, sample) for task in GRADED for sample in samples(task, drawn, limit=1)]
    assert all(found.share < 0.1 for found in overlaps(prompts)[:1])
    task, aside = GRADED[0], replace(drawn, calibrates=True)
    documents = [
        {
            document.partition(":")[0]
            for sample in samples(task, options)
            for document in sample.meta["group"].split("+")
        }
        for options in (drawn, aside)
    ]
    assert not documents[0] & documents[1]


def test_scores_take_the_first_line_and_give_part_for_a_part() -> None:
    assert scores.leads(" The plum.\nMelon", ["plum"]) == 1 and scores.leads("Not the plum", ["plum"]) == 0
    assert scores.leading_digits(" 12395", ["12345"]) == 0.6 and scores.leading_digits("none", ["12"]) == 0
    assert scores.leading_digits("1234567", ["12345"]) == 1
    assert scores.listed_in_any_order("y and x", ["x", "y", "z", "w"]) == 0.5
    assert scores.listed_in_any_order("x, y, p", ["p", "q"]) == 0  # no more guesses than answers
    assert scores.listed_in_order("y, x, z", ["x", "y", "z"]) == pytest.approx(2 / 3)
    assert scores.listed_in_order("x, y\nz", ["x", "y", "z"]) == pytest.approx(2 / 3)


def test_a_calibration_sets_the_dial_and_is_named(tmp_path: Path, drawn: TaskOptions) -> None:
    path = tmp_path / "made.json"
    path.write_text(json.dumps(CALIBRATION))
    task, grades = TASKS["graded/keys_all"], find_grades(str(path), "abc")
    assert grades is not None
    asked = replace(drawn, lengths=(1024, 2048), grades=grades, limit=1)
    assert task.fitting(asked) == (1024,) and TASKS["graded/keys_owned"].fitting(asked) == ()
    said = task.provenance(asked)
    assert said["settings"] == {"1024": 2, "2048": 3} and said["not_calibrated"] == [2048]
    assert said["calibration"]["sha256"] == load_calibration(path)[1]
    assert [len(sample.answers) for sample in task.samples(asked)] == [2, 3]
    assert task.fitting(drawn) == (1024,) and task.provenance(drawn)["not_calibrated"] == [1024]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_revision": "other"}, "was made for made of revision other, this model is abc; calibrate for it"),
        ({"low": "x"}, "is damaged: field 'low': .* got 'x'; calibrate again"),
        ({"tasks": [{**CALIBRATION["tasks"][0], "chosen": 3}]}, "setting 3 was never tried"),
    ],
)
def test_an_unsound_calibration_is_refused_in_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    path.write_text(json.dumps({**CALIBRATION, **change}))
    with pytest.raises(TaskError, match=message) as error:
        find_grades(str(path), "abc")
    assert "\n" not in str(error.value)


def test_a_calibration_that_is_not_there_and_a_setting_that_no_dial_has(drawn: TaskOptions) -> None:
    with pytest.raises(TaskError, match="no calibration at 'nowhere'; make it with `harness calibrate-tasks`"):
        find_grades("nowhere", "abc")
    with pytest.raises(TaskError, match="numbers 5 at 1024 tokens is no setting; the dial has 1, 2, 3"):
        samples(BY_NAME["graded/keys_all"], drawn, 5)
    assert find_grades(None, "no such revision") is None


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.json")), ids=lambda path: path.stem)
def test_packaged_calibrations_are_of_todays_dials(path: Path) -> None:
    calibration, sha256 = load_calibration(path)
    grades = find_grades(None, calibration.model_revision)
    assert grades is not None and grades == find_grades(path.stem, calibration.model_revision)
    assert grades.said["sha256"] == sha256 and grades.settings
    for graded in calibration.tasks:
        dial = BY_NAME[graded.task].kind.dial
        assert (graded.dial, graded.scale) == (dial.name, dial.scale)
        chosen = [tried for tried in graded.tried if tried.setting == graded.chosen]
        assert all(calibration.low <= tried.score <= calibration.high and tried.error > 0 for tried in chosen)
    assert {kept.rule for kept in calibration.rules} == {rule.name for rule in RULES}
    assert grades.rules == tuple(kept.rule for kept in calibration.rules if kept.score >= calibration.low)
