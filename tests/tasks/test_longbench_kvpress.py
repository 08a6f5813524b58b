"""kvpress's form of LongBench: where each template is split, what is generated and scored, and what is cut."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.base import TASKS, Sample, TaskError, find_tasks
from tasks.longbench import DATASETS, Dataset, LongBench, official_template
from tasks.longbench_kvpress import KvpressLongBench, cut_end, parts
from tests.task_data import longbench_row, read_rows, tokens, write_rows
from tests.tasks.test_longbench import BY_NAME, options

# Read from kvpress's create_huggingface_dataset.py: (end of the context template, start of the question template, its
# end, answer prefix of every row).
PASSAGES = ("any other words.\n\n", "Question: {input}\n", "Question: {input}\n", "Answer:")
SPLITS = {
    "narrativeqa": ("any explanation.\n\n", "Question: {input}\n\n", "Question: {input}\n\n", "Answer:"),
    "qasper": ("any explanation.\n\n", "Question: {input}\n\n", "Question: {input}\n\n", "Answer:"),
    "multifieldqa_en": PASSAGES,
    "multifieldqa_zh": ("不要输出任何其他字词。\n\n", "问题：{input}\n", "问题：{input}\n", "回答："),
    "hotpotqa": PASSAGES,
    "2wikimqa": PASSAGES,
    "musique": PASSAGES,
    "dureader": ("请基于上述文章回答下面的问题。\n\n", "问题：{input}\n", "问题：{input}\n", "回答："),
    "gov_report": ("Report:\n{context}\n\n", "Now, write", " the report.\n\n", "Summary:"),
    "qmsum": ("one or more sentences.\n\n", "Query: {input}\n", "Query: {input}\n", "Answer:"),
    "multi_news": ("News:\n{context}\n\n", "Now, write", " all the news.\n\n", "Summary:"),
    "vcsum": ("会议记录：\n{context}\n\n", "", "", "会议总结："),
    "trec": ("questions.\n\n{context}\n", "{input}", "{input}", "Type:"),
    "triviaqa": ("examples.\n\n{context}\n\n", "{input}", "{input}", "Answer:"),
    "samsum": ("examples.\n\n{context}\n\n", "{input}", "{input}", "Summary:"),
    "lsht": ("\n\n{context}\n", "{input}", "{input}", ""),
    "passage_count": ("in total?\n\n{context}\n\n", "Please enter", "2, 3, and so on.\n\n", "The final answer is: "),
    "passage_retrieval_en": ("an abstract.\n\n", "{input}\n\nPlease", '"Paragraph 2", etc.\n\n', "The answer is: "),
    "passage_retrieval_zh": ("下面是一个摘要\n\n", "{input}\n\n请输入", "等格式\n\n", "答案是："),
    "lcc": ("below. \n{context}", "{input}", "{input}", "Next line of code:\n"),
    "repobench-p": ("below. \n{context}", "{input}", "{input}", "Next line of code:\n"),
}


def made(folder: Path, name: str, *changes: dict[str, Any], **asked: Any) -> list[Sample]:
    """Samples of made rows, one for each set of changes."""
    write_rows(folder, name, [longbench_row(BY_NAME[name], number, **own) for number, own in enumerate(changes)])
    return list(KvpressLongBench(BY_NAME[name]).samples(options(folder, **asked)))


def test_it_is_a_variant_of_21_tasks() -> None:
    variant = find_tasks(["longbench/kvpress"])
    assert [task.name for task in variant] == [f"longbench/kvpress/{d.name}" for d in DATASETS]
    assert {(task.protocol, task.query) for task in variant} == {("kvpress", "agnostic")}
    assert not any(task in find_tasks(["longbench"]) for task in variant)
    assert TASKS["longbench/kvpress/lcc"].about.samples == 500


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.name)
def test_the_split_is_that_of_kvpress(dataset: Dataset, tmp_path: Path) -> None:
    """What kvpress's builder makes of a row, worked out from its templates."""
    context_end, question_start, question_end, prefix = SPLITS[dataset.name]
    cue = prefix if dataset.name in ("trec", "triviaqa", "samsum") else ""
    (sample,) = made(tmp_path, dataset.name, {"input": f"line\nlast\n{cue}", "context": "A {input} B"})
    template = official_template(dataset)
    assert "".join(parts(template)) == template
    assert sample.context.endswith(context_end.replace("{context}", "A {input} B"))
    assert sample.context.startswith(template.split("{context}")[0] + "A {input} B")
    assert sample.question.startswith(question_start.replace("{input}", "line\nlast\n"))
    assert sample.question.endswith(question_end.replace("{input}", "line\nlast\n"))
    assert sample.answer_prefix == prefix
    assert (sample.chat, sample.stop, sample.min_new_tokens) == (True, (), 0)
    assert sample.max_new_tokens == dataset.max_new_tokens + 20


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.name)
def test_real_rows_join_to_the_official_prompt(dataset: Dataset, shared_data: Path) -> None:
    """But for rows whose cue is followed by a blank: kvpress does not take it off, so it comes twice."""
    checksums = json.loads((shared_data / "longbench_prompt_sha256.json").read_text(encoding="utf-8"))
    rows = {row["_id"]: row for row in read_rows(shared_data, dataset.name)}
    samples = list(KvpressLongBench(dataset).samples(options(shared_data)))
    assert {sample.id for sample in samples} == set(rows)
    for sample in samples:
        given = rows[sample.id]["input"]
        twice = dataset.name in ("trec", "triviaqa", "samsum") and not given.endswith(sample.answer_prefix)
        joined = sample.context + sample.question + ("" if twice else sample.answer_prefix)
        assert hashlib.sha256(joined.encode()).hexdigest() == checksums[sample.id]["sha256"]
        assert sample.answers == tuple(rows[sample.id]["answers"])


def test_the_cue_of_a_row_is_taken_off_only_at_its_very_end(tmp_path: Path) -> None:
    exact, blank = made(tmp_path, "triviaqa", {"input": "Q?\nAnswer:"}, {"input": "Q?\nAnswer:\n"})
    assert (exact.question, blank.question) == ("Q?\n", "Q?\nAnswer:\n")
    assert exact.answer_prefix == blank.answer_prefix == "Answer:"


def test_samples_of_one_context_follow_each_other(tmp_path: Path) -> None:
    samples = made(tmp_path, "qasper", *({"context": text} for text in ("one", "two", "one", "three", "two")))
    assert [sample.id for sample in samples] == ["id0", "id2", "id1", "id4", "id3"]
    assert samples[0].meta["group"] == samples[1].meta["group"] != samples[2].meta["group"]


def test_a_limit_draws_the_rows_that_the_official_task_draws(tmp_path: Path) -> None:
    drawn = made(tmp_path, "qasper", *({"context": f"text {n}", "length": n} for n in range(30)), limit=6)
    official = LongBench(BY_NAME["qasper"]).samples(options(tmp_path, limit=6))
    assert [sample.id for sample in drawn] == [sample.id for sample in official]


def test_scores_differ_from_the_official_in_leading_blanks_alone() -> None:
    """calculate_metrics.py strips every blank before a few-shot answer, eval.py newlines alone."""
    sample = Sample("s", "", "", ("City",), 84, meta={"all_classes": ["City", "Person"]})
    trec = KvpressLongBench(BY_NAME["trec"])
    assert [task.score(sample, " \n City\nPerson")["score"] for task in (trec, trec.official)] == [1.0, 0.0]
    code = Sample("s", "", "", ("    return x",), 84)
    assert KvpressLongBench(BY_NAME["lcc"]).score(code, "    return x")["score"] == 1.0


words = st.lists(st.sampled_from(["alpha", "beta", " ", "\n", "."]), min_size=1, max_size=200).map("".join)


@settings(max_examples=60, deadline=None)
@given(words, words, st.integers(1, 400))
def test_a_long_context_loses_its_end(context: str, question: str, room: int) -> None:
    opts = options()
    tokenizer, prefix = opts.tokenizer, "Answer:"
    total = len(tokenizer.encode(context)) + len(tokenizer.encode(question)) + 2
    joined = len(tokenizer.encode(context + question)) + 2  # a word at the seam may join with the next
    try:
        kept = cut_end(context, question, prefix, options=opts, room=room)
    except TaskError:
        assert room <= len(tokenizer.encode(question)) + 2 + 1
        return
    assert context.startswith(kept)
    assert len(tokenizer.encode(kept + question)) + 2 <= room
    assert (kept == context) is (joined <= room)
    if kept != context:
        assert len(tokenizer.encode(kept)) >= len(tokenizer.encode(context)) - (total - room)


def test_truncation_leaves_room_for_question_template_and_generation(tmp_path: Path) -> None:
    """Of 300 tokens 84 are generated and 7 are the template's."""
    long = {"context": "word " * 1000, "input": "(Who?) Type:"}
    (sample,) = made(tmp_path, "trec", long, max_tokens=300)
    assert tokens(sample, options().tokenizer) == 300 - 84
    assert sample.meta["truncated"] is True
    assert sample.context.startswith("Please determine")
    with pytest.raises(TaskError, match="90 tokens leave no room for a context; raise max_tokens"):
        made(tmp_path, "trec", long, max_tokens=90)


def test_provenance_lists_what_differs(tmp_path: Path) -> None:
    made(tmp_path, "lcc", {})
    said = KvpressLongBench(BY_NAME["lcc"]).provenance(options(tmp_path))
    assert (len(said["differs_from_official"]), len(said["deviations"])) == (9, 4)
    assert (said["file"], said["rows"]) == ("lcc.jsonl", 1)
