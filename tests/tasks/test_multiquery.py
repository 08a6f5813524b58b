"""Several questions over one context: what they share, what they ask, and that one compression serves them all."""

from collections import defaultdict
from pathlib import Path

import pytest

from harness.cli import main
from harness.records.run_folder import find_runs, load_run
from tasks import load_tasks
from tasks.base import TASKS, Sample, TaskError
from tasks.longbench import DATASETS, SINGLE
from tests.task_data import Options, longbench_row, tokens, write_rows

load_tasks()
GENERATED = ("niah", "qa_1", "qa_2")


def groups(samples: list[Sample]) -> list[list[Sample]]:
    found = defaultdict(list)
    for sample in samples:
        found[sample.id.rpartition("/")[0] if sample.id[0].isdigit() else sample.meta["group"]].append(sample)
    return list(found.values())


@pytest.mark.parametrize("name", GENERATED)
def test_four_questions_share_a_context_that_answers_them(name: str, options: Options) -> None:
    task, asked = TASKS[f"multiquery/{name}"], options(lengths=(2048,), limit=12)
    samples = list(task.samples(asked))
    assert len(samples) == len({sample.id for sample in samples}) == 12
    for group in groups(samples):
        shared = group[0].id.removesuffix("/0")
        assert [sample.id for sample in group] == [f"{shared}/{i}" for i in range(4)]
        assert len({sample.meta["group"] for sample in group}) == 1
        assert len({sample.context for sample in group}) == 1
        assert len({sample.question for sample in group}) == len({sample.answers for sample in group}) == 4
        for sample in group:
            assert any(answer in sample.context for answer in sample.answers)
            assert tokens(sample, asked.tokenizer) + sample.max_new_tokens <= 2048
            assert "asked" not in sample.meta and "prompt_tokens" not in sample.meta
            assert task.score(sample, f"It is {sample.answers[0]}.")["score"] == 1
            assert task.score(sample, group[0].answers[0])["score"] == (sample is group[0])


def test_a_key_is_asked_for_in_the_singular(options: Options) -> None:
    sample = next(TASKS["multiquery/niah"].samples(options(lengths=(1024,), limit=1)))
    key = sample.meta["needles"][0].split(" for ")[1].split(" is: ")[0]
    assert sample.meta["needles"] == [f"One of the special magic numbers for {key} is: {sample.answers[0]}."]
    assert sample.context.count(sample.meta["needles"][0]) == 1
    assert sample.question == f"What is the special magic number for {key} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"


@pytest.mark.parametrize("name", GENERATED)
def test_a_limit_counts_questions_of_each_length_and_draws_a_prefix(name: str, options: Options) -> None:
    task = TASKS[f"multiquery/{name}"]
    few = list(task.samples(options(lengths=(2048, 1536), limit=6)))
    many = list(task.samples(options(lengths=(1536, 2048), limit=8)))
    assert [sample.meta["length"] for sample in few] == [2048] * 6 + [1536] * 6
    assert {sample.id: sample for sample in few}.items() <= {sample.id: sample for sample in many}.items()


def longbench(folder: Path, *rows: tuple[str, str]) -> Path:
    """Files of the single-document QA sets: qasper with (context, question) rows, the others with one row."""
    for dataset in [dataset for dataset in DATASETS if dataset.category == SINGLE]:
        given = rows if dataset.name == "qasper" and rows else [("alone", "Who?")]
        made = [
            longbench_row(dataset, i, context=context, input=question, answers=["gold"])
            for i, (context, question) in enumerate(given)
        ]
        write_rows(folder, dataset.name, made)
    return folder


def test_rows_of_one_document_are_asked_together(options: Options, tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(3000))
    rows = [("short text", "Who?"), (words, "Which of them?"), ("short text", "Where?"), (words, "What " * 30)]
    data = longbench(tmp_path, *rows, ("x", "y"))
    task = TASKS["multiquery/longbench"]
    asked = options(data_dir=data, max_tokens=2048)
    whole, cut = sorted(groups(list(task.samples(asked))), key=lambda group: len(group[0].context))
    assert {sample.id for sample in whole} == {"qasper/id0", "qasper/id2"}
    assert {sample.id for sample in cut} == {"qasper/id1", "qasper/id3"}
    assert [sample.meta["truncated"] for sample in (*whole, *cut)] == [False, False, True, True]
    for group in (whole, cut):
        assert group[0].context == group[1].context
        assert group[0].context.startswith("You are given a scientific article")
        for sample in group:
            assert tokens(sample, asked.tokenizer) + sample.max_new_tokens <= 2048
            assert task.score(sample, "gold") == {"score": 1.0}
    assert "Who?" in whole[0].question + whole[1].question
    assert len(list(task.samples(options(data_dir=data, max_tokens=2048, limit=3)))) == 3
    read = {name: said["rows"] for name, said in task.provenance(asked).items()}
    assert read == {"narrativeqa": 1, "qasper": 5, "multifieldqa_en": 1, "multifieldqa_zh": 1}
    with pytest.raises(TaskError, match="no two rows of narrativeqa.* share a document"):
        task.samples(options(data_dir=longbench(tmp_path)))


def test_a_run_prefills_each_context_once(tmp_path: Path) -> None:
    text = "The town of Ash lies by the river. " * 12
    data = longbench(tmp_path, (text, "Which town?"), (text, "Which river?"), (text + "!", "a"), (text + "!", "b"))
    run = ["run", "--model", "tiny", "--dtype", "float32", "--device", "cpu", "--methods", "fullkv,snapkv", "--budgets"]
    run += ["64", "--tasks", "multiquery/longbench", "--data-dir", str(data), "--max-new-tokens", "4"]
    assert main([*run, "--query", "aware", "--out", str(tmp_path / "aware")]) == 2
    assert main([*run, "--out", str(tmp_path / "runs")]) == 0
    (folder,) = find_runs(tmp_path / "runs")
    _, records = load_run(folder)
    assert [record.status for record in records] == ["ok"] * 8
    for group in {record.meta["group"] for record in records}:
        own = [record for record in records if record.meta["group"] == group]
        assert len(own) == 4
        assert len({record.prefill_s for record in own}) == 1
        assert len({(record.method, record.kept_slots, record.kv_bytes) for record in own}) == 2
    assert len({record.prefill_s for record in records}) == 2
