"""Every registered task: what a perfect model says scores 1, nothing scores 0, and the task says what it is.

LongBench and RULER's questions are real rows where the test data are present; LongBench-E has made rows, and the rest
is generated. Essays come from the cache.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.models.assets import asset_folder
from tasks import load_tasks
from tasks.base import Sample, Task, TaskError, TaskOptions
from tests.task_data import Words

TASKS = load_tasks()
MADE_ANSWERS = {
    "passage_count": "12",
    "passage_retrieval_en": "Paragraph 2",
    "trec": "City",
    "lcc": "x = call(12)",
    "repobench-p": "return self.size",
}
NOT_CODE = ("`", "#", "//")


def made_row(dataset: str, number: int) -> dict[str, Any]:
    return {
        "input": f"What is item {number}?",
        "context": f"Paragraph 1: nothing.\nParagraph 2: item {number} is here.",
        "answers": [MADE_ANSWERS.get(dataset, f"the old town of item {number}. It is not a city")],
        "length": 3999 + number,
        "dataset": dataset,
        "language": "en",
        "all_classes": ["City", "Person"] if dataset == "trec" else None,
        "_id": f"made{number}",
    }


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real rows, made ones for LongBench-E, and two made rows with one context."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "longbench").mkdir()
    for path in (shared_data / "longbench").glob("*.jsonl"):
        (folder / "longbench" / path.name).symlink_to(path)
    for name in [n.removeprefix("longbench_e/") for n in TASKS if n.startswith("longbench_e/")]:
        rows = "".join(json.dumps(made_row(name, number)) + "\n" for number in (1, 2))
        (folder / "longbench" / f"{name}_e.jsonl").write_text(rows)
    real = (folder / "longbench" / "qasper.jsonl").read_text(encoding="utf-8")
    (folder / "longbench" / "qasper.jsonl").unlink()
    shared = [made_row("qasper", number) | {"context": "One text."} for number in (3, 4)]
    with (folder / "longbench" / "qasper.jsonl").open("w", encoding="utf-8") as file:
        file.write(real + "".join(json.dumps(row) + "\n" for row in shared))
    (folder / "ruler").symlink_to(shared_data / "ruler")
    return folder


def options(name: str, folder: Path | None) -> TaskOptions:
    def asset(wanted: str) -> Path:
        if not asset_folder(wanted).is_dir():
            pytest.skip(f"{wanted} is not in the cache; run `harness fetch {wanted}`")
        return asset_folder(wanted)

    return TaskOptions(
        tokenizer=Words(),
        max_tokens=10**6,
        lengths=(8192 if name.startswith("multiquery") else 2048,),
        limit=20 if name.startswith("longbench") else 3,
        data_dir=folder,
        fetch=asset,
    )


def gold(task: Task, sample: Sample) -> str:
    """What a perfect model says: the reference, or all answers where that is None."""
    reference = task.reference(sample)
    return ", ".join(sample.answers) if reference is None else reference


def out_of_reach(name: str, sample: Sample) -> bool:
    """Lines of code with a mark of comments: LongBench's metric passes over them, whatever the reference is."""
    return name.endswith(("/lcc", "/repobench-p")) and any(mark in sample.answers[0] for mark in NOT_CODE)


def needs_data(name: str) -> bool:
    return name.startswith(("longbench", "multiquery/longbench", "multiquery/qa", "ruler/qa"))


@pytest.mark.parametrize("name", TASKS)
def test_gold_scores_1_and_nothing_scores_0(name: str, request: pytest.FixtureRequest) -> None:
    task = TASKS[name]
    folder = request.getfixturevalue("data") if needs_data(name) else None
    samples = list(task.samples(options(name, folder)))
    assert samples
    for sample in samples:
        score = task.score(sample, gold(task, sample))["score"]
        if out_of_reach(name, sample):
            assert score < 1, sample.id
        else:
            assert 0.999 <= score <= 1, (sample.id, gold(task, sample))
        assert task.score(sample, "")["score"] == 0, sample.id


def test_references_with_a_comment_cannot_score_1(data: Path) -> None:
    """Nor do they in the official script: its metric takes the first line without `, # or //."""
    for name in ("longbench/lcc", "longbench/repobench-p"):
        task = TASKS[name]
        samples = list(task.samples(options(name, data)))
        marked = [sample for sample in samples if out_of_reach(name, sample)]
        assert len(marked) < len(samples) / 2
        for sample in marked:
            assert task.score(sample, sample.answers[0])["score"] == 0.0
    made = Sample("s", "", "", ("x = 1  # one",), 64)
    assert TASKS["longbench/lcc"].score(made, "x = 1  # one")["score"] == 0.0
    assert TASKS["longbench/lcc"].score(made, "x = 1")["score"] == 0.59  # 2 * 5 / 17, the best there is


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_is(name: str) -> None:
    about = TASKS[name].about
    for field in (about.source, about.revision, about.licence, about.metric):
        assert isinstance(field, str) and field.strip()
    assert about.samples > 0


@pytest.mark.parametrize("name", [name for name in TASKS if needs_data(name)])
def test_missing_data_is_one_clear_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        list(TASKS[name].samples(options(name, tmp_path)))
    assert "harness data fetch" in str(caught.value)
    assert "\n" not in str(caught.value)
