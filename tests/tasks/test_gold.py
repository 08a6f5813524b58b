"""Every registered task: what a perfect model says scores 1, nothing scores 0, and the task says what it is.

LongBench and RULER's questions are real rows where the test data are present; LongBench-E has made rows, and the rest
is generated. Essays come from the cache.
"""

from pathlib import Path

import pytest

from harness.models.assets import asset_folder
from tasks import load_tasks
from tasks.base import Sample, TaskError, TaskOptions
from tasks.longbench import DATASETS
from tests.task_data import Words, longbench_row, read_rows, write_rows

TASKS = load_tasks()


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real rows, made ones for LongBench-E, and two made rows with one context."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "longbench").mkdir()
    for path in (shared_data / "longbench").glob("*.jsonl"):
        (folder / "longbench" / path.name).symlink_to(path)
    datasets = {dataset.name: dataset for dataset in DATASETS}
    for dataset in [dataset for dataset in DATASETS if dataset.samples_e]:
        made = [longbench_row(dataset, number, length=3999 + number) for number in (1, 2)]
        write_rows(folder / "longbench", f"{dataset.name}_e", made)
    (folder / "longbench" / "qasper.jsonl").unlink()
    shared = [longbench_row(datasets["qasper"], number, context="One text.") for number in (3, 4)]
    write_rows(folder / "longbench", "qasper", [*read_rows(shared_data, "qasper"), *shared])
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
        lengths=(8192 if name.startswith(("multiquery", "relay")) else 2048,),
        limit=20 if name.startswith("longbench") else 3,
        data_dir=folder,
        fetch=asset,
    )


def out_of_reach(name: str, sample: Sample) -> bool:
    """Lines of code with a mark of comments: LongBench's metric passes over them, whatever the reference is."""
    return name.endswith(("/lcc", "/repobench-p")) and any(mark in sample.answers[0] for mark in ("`", "#", "//"))


def needs_data(name: str) -> bool:
    return name.startswith(("longbench", "multiquery/longbench", "multiquery/qa", "relay/qa", "ruler/qa"))


@pytest.mark.parametrize("name", TASKS)
def test_gold_scores_1_and_nothing_scores_0(name: str, request: pytest.FixtureRequest) -> None:
    task = TASKS[name]
    folder = request.getfixturevalue("data") if needs_data(name) else None
    samples = list(task.samples(options(name, folder)))
    assert samples
    for sample in samples:
        reference = "\n".join(sample.answers) if sample.turns else task.reference(sample)
        assert reference is not None
        score = task.score(sample, reference)["score"]
        if out_of_reach(name, sample):
            assert score == 0, sample.id
        else:
            assert 0.999 <= score <= 1, (sample.id, reference)
        assert task.score(sample, "")["score"] == 0, sample.id
    assert sum(out_of_reach(name, sample) for sample in samples) < len(samples) / 2


def test_references_with_a_comment_cannot_score_1() -> None:
    """Nor do they in the official script: its metric takes the first line without `, # or //."""
    made = Sample("s", "", "", ("x = 1  # one",), 64)
    scores = [TASKS["longbench/lcc"].score(made, said)["score"] for said in ("x = 1  # one", "x = 1")]
    assert scores == [0.0, 0.59]  # 2 * 5 / 17, the best there is


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
