"""LongBench beside lm-eval 0.4.13 and fuzzywuzzy as installed: where they agree, and each known place that differs.

The differences are those of lm-eval from the official protocols, or named at our function. A test of one shows both
values, so that a release of lm-eval that changes is noticed. Nothing here downloads; no index of tasks is built.
"""

import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import load_tasks, scoring
from tasks.base import Sample, TaskOptions
from tests.task_data import prompt, read_rows
from tests.upstream import Chars, task_file

fuzz = pytest.importorskip("fuzzywuzzy.fuzz", reason="fuzzywuzzy is not installed; pip install '.[dev]'")
theirs = pytest.importorskip("lm_eval.tasks.longbench.metrics")
TASKS = load_tasks()
LONGBENCH = sorted(n.removeprefix("longbench/") for n in TASKS if re.fullmatch(r"longbench/[^/]+", n))
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")
WORDS = ("the", "a cat", "an", "Cat.", "dog", "7", "17", "Paragraph 7", "段落7", "北京", "大学。", "x = 1", "!")
text = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join) | st.text(max_size=30)
SAME: tuple[tuple[Callable[[str, str], float], Callable[[str, str], float]], ...] = (
    (scoring.token_f1, theirs.qa_f1_score),
    (scoring.token_f1_zh, theirs.qa_f1_zh_score),
    (scoring.rouge_l, theirs.rouge_score),
    (scoring.rouge_l_zh, theirs.rouge_zh_score),
    (scoring.count, theirs.count_score),
)


@settings(max_examples=80, deadline=None)
@given(text, text)
def test_metrics_that_are_the_same(prediction: str, reference: str) -> None:
    for ours, other in SAME:
        assert ours(prediction, reference) == pytest.approx(other(prediction, reference), abs=1e-12), ours


@settings(max_examples=60, deadline=None)
@given(text, st.integers(1, 30))
def test_retrieval_is_the_same(prediction: str, paragraph: int) -> None:
    english, chinese = f"Paragraph {paragraph}", f"段落{paragraph}"
    assert scoring.retrieval(prediction, english) == theirs.retrieval_score(prediction, english)
    assert scoring.retrieval_zh(prediction, chinese) == theirs.retrieval_zh_score(prediction, chinese)


line = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.lists(line | st.just("# x"), min_size=1, max_size=4).map("\n".join), line)
def test_code_similarity_is_the_same_without_blank_lines(prediction: str, reference: str) -> None:
    assert scoring.code_similarity(prediction, reference) == theirs.code_sim_score(prediction, reference)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(("City", "Person", "Date", "noise")), max_size=5).map(" ".join))
def test_classification_is_the_same_where_no_name_is_part_of_another(prediction: str) -> None:
    classes = ["City", "Person", "Date", "Number of something"]
    for gold in classes:
        expected = theirs.classification_score(prediction, gold, all_classes=classes)
        assert scoring.classification(prediction, gold, classes) == expected


def their_score(name: str) -> Callable[..., dict[str, float]]:
    return getattr(theirs, task_file("longbench", name)["process_results"].removeprefix("metrics."))


@pytest.mark.parametrize("name", LONGBENCH)
def test_real_answers_score_the_same(name: str, shared_data: Path) -> None:
    """Each row's own answer, its first half, and the answers of other rows, without blanks around prose."""
    task = TASKS[f"longbench/{name}"]
    rows = {row["_id"]: row for row in read_rows(shared_data, name)}
    samples = list(islice(task.samples(TaskOptions(tokenizer=Chars(), max_tokens=10**9, data_dir=shared_data)), 2))
    score = their_score(name)
    code = score is theirs.get_code_sim_with_score
    gold = [sample.answers[0] if code else sample.answers[0].strip() for sample in samples]
    assert samples
    for sample, own in zip(samples, gold, strict=True):
        for prediction in (*gold, own[: len(own) // 2].rstrip(), f"{own} {gold[0]}"):
            expected = score(rows[sample.id], [prediction])["score"]
            assert task.score(sample, prediction)["score"] == pytest.approx(expected, abs=1e-12), prediction


def scored(name: str, prediction: str, *answers: str, classes: Sequence[str] = ()) -> tuple[float, float]:
    """(our score, lm-eval's) of one prediction."""
    sample = Sample("s", "", "", answers, 64, meta={"all_classes": list(classes)})
    doc = {"answers": list(answers), "all_classes": list(classes)}
    ours = TASKS[f"longbench/{name}"].score(sample, prediction)["score"]
    return ours, their_score(name)(doc, [prediction])["score"]


@pytest.mark.parametrize(
    ("prediction", "both"),
    [
        ("\n  \nx = 1", (0.57, 1.0)),  # the official metric takes the line of blanks: 2 * 2 / 7
        ("# first\n\nx = 1", (0.0, 1.0)),
        ("\n\nx = 1", (1.0, 1.0)),
    ],
)
def test_code_lines_that_are_blank(prediction: str, both: tuple[float, float]) -> None:
    assert scored("lcc", prediction, "x = 1") == both


def test_only_the_first_line_of_a_few_shot_answer_counts() -> None:
    """lm-eval scores what `until` leaves of the prediction, and nothing is left of one that begins with a newline."""
    assert scored("trec", "City\nPerson", "City", classes=("City", "Person")) == (1.0, 0.5)
    assert scored("trec", " \nCity", "City", classes=("City", "Person")) == (0.0, 1.0)
    for name in LONGBENCH:
        assert task_file("longbench", name)["generation_kwargs"]["until"] == (["\n"] if name in FEW_SHOT else [])
    assert scored("trec", "\nCity", "City", classes=("City",))[0] == 1.0
    assert scored("trec", "", "City", classes=("City",))[1] == 0.0  # what stands before that newline


def test_blanks_around_a_prediction() -> None:
    """Lm-eval strips them; to the official metric, what follows the last full stop is a sentence of one empty word."""
    ours, other = scored("multi_news", "a b c. ", "a b c.")
    assert ours == pytest.approx(6 / 7, abs=1e-6)  # 3 of 4 words against 3 of 3
    assert other == pytest.approx(1.0, abs=1e-6)


def test_class_names_that_are_part_of_the_gold_name() -> None:
    """Lm-eval, like the official script, forgets every second of them; no class of trec or lsht is of this kind."""
    classes = ("Other", "location", "Other location")
    assert scored("trec", "Other location", "Other location", classes=classes) == (1.0, 0.5)


def test_no_class_of_the_real_rows_is_part_of_another(shared_data: Path) -> None:
    for name in ("trec", "lsht"):
        classes = {c for row in read_rows(shared_data, name) for c in row["all_classes"]}
        assert len(classes) >= 24
        assert not [(a, b) for a in classes for b in classes if a != b and a in b]


@pytest.mark.parametrize("name", LONGBENCH)
def test_prompts_and_lengths_of_longbench(name: str, shared_data: Path) -> None:
    """Six templates lack white space; the others render to the official prompt, and all generation lengths agree."""
    content, row = task_file("longbench", name), read_rows(shared_data, name)[0]
    fields = {"context": row["context"], "question": row["input"], "input": row["input"]}
    rendered = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: fields[match[1]], content["doc_to_text"])
    options = TaskOptions(tokenizer=Chars(), max_tokens=10**9, data_dir=shared_data)
    sample = next(sample for sample in TASKS[f"longbench/{name}"].samples(options) if sample.id == row["_id"])
    ours = prompt(sample)
    if name in ("lcc", "repobench-p"):
        rendered += "\n"
    elif name in ("passage_count", "passage_retrieval_en"):
        rendered += " "
    elif name in ("triviaqa", "samsum"):
        head, tail = rendered[: -len(row["input"]) - 1], row["input"]
        assert rendered == f"{head}\n{tail}"
        rendered = f"{head}\n\n{tail}"
    assert ours == rendered
    assert content["generation_kwargs"]["max_gen_toks"] == sample.max_new_tokens


def test_fuzzywuzzy_is_installed_with_levenshtein() -> None:
    assert fuzz.SequenceMatcher.__module__ == "fuzzywuzzy.StringMatcher"


def test_every_rounding_is_fuzzywuzzy_rounding() -> None:
    """All shares with up to 60 common characters and 80 others, so every half percent too."""
    for common in range(61):
        for others in range(1, 81):
            one, other = "a" * common + "b" * others, "a" * common
            assert scoring.code_similarity(one, other) == fuzz.ratio(one, other) / 100, (common, others)
    assert scoring.code_similarity("", "") == fuzz.ratio("", "") / 100 == 1.0
