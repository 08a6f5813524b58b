"""Metrics against values computed by hand, against the packages they stand for, and over arbitrary text."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import scoring
from tasks.base import TaskError

Metric = Callable[[str, Any], float]
PLAIN: tuple[Metric, ...] = (
    scoring.token_f1,
    scoring.token_f1_zh,
    scoring.rouge_l,
    scoring.rouge_l_zh,
    scoring.count,
    scoring.code_similarity,
)


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "expected"),
    [
        (scoring.token_f1, "The Eiffel Tower!", "eiffel tower", 1.0),
        (scoring.token_f1, "in Paris, France", "Paris", 2 * (1 / 3) / (1 + 1 / 3)),
        (scoring.token_f1, "a b b", "b b c", 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # "a" is an article: b b against b b c
        (scoring.token_f1, "London", "Paris", 0.0),
        (scoring.token_f1, "the", "the", 0.0),  # nothing is left of either
        (scoring.token_f1, "", "Paris", 0.0),
        # jieba: 北京 | 是 | 中国 | 的 | 首都 | 。 against 中国 | 首都: precision 2/5, recall 1
        (scoring.token_f1_zh, "北京是中国的首都。", "中国，首都", 4 / 7),
        (scoring.token_f1_zh, "1377年。", "1377年", 1.0),
        (scoring.token_f1_zh, "。！", "。！", 0.0),
        # longest common subsequence "the cat on the mat"; the package counts distinct words: 4 of 5 and 4 of 5
        (scoring.rouge_l, "the cat lay on the mat", "the cat sat on the mat", 0.8),
        (scoring.rouge_l, "a b c d", "c d", 2 * 0.5 / 1.5),
        *((scoring.rouge_l, text, "a b", 0.0) for text in ("", "...", "x y")),
        # "c" of the first sentence and "a b" of the second: 3 distinct words of 4 said and 3 wanted
        (scoring.rouge_l, "c x. a b", "a b c", 2 * 0.75 / 1.75),
        (scoring.rouge_l, "a. ", "a", 2 * 0.5 / 1.5),  # a sentence of blanks is one empty word: 1 of 2 words
        # of two paths as long the package goes left first: "a" for "x a" and "b" for "x b"; going up, "x" for both
        (scoring.rouge_l, "a b x", "x a. x b", 2 / 3),
        (scoring.rouge_l_zh, "我喜欢北京", "我喜欢上海", 2 / 3),  # 我 | 喜欢 | 北京 against 我 | 喜欢 | 上海
        (scoring.rouge_l_zh, "", "我喜欢上海", 0.0),
        (scoring.count, "There are 7, maybe 8.", "7", 0.5),
        (scoring.count, "17", "7", 0.0),
        (scoring.retrieval, "Paragraph 3", "Paragraph 3", 1.0),
        (scoring.retrieval, "3 or 4 or 3", "Paragraph 3", 2 / 3),
        (scoring.retrieval_zh, "答案是段落12", "段落12", 1.0),
        (scoring.retrieval_zh, "段落1", "段落12", 0.0),
        (scoring.code_similarity, "```python\n# comment\nx = 1\ny = 2", "x = 1", 1.0),
        (scoring.code_similarity, "\n\nreturn x\nmore", "return x", 1.0),
        (scoring.code_similarity, "abcd", "abxd", 0.75),  # 2 * 3 / 8
        (scoring.code_similarity, "abc", "ab", 0.8),
        (scoring.code_similarity, "abc", "abxyzw", 0.44),  # 2 * 2 / 9 = 44.4 %, rounded as fuzzywuzzy does
        (scoring.code_similarity, "ab", "a", 0.67),  # 2 * 1 / 3 = 66.7 %
        (scoring.code_similarity, "# only a comment", "x", 0.0),
        (scoring.string_match_all, "It is ALPHA and beta.", ["alpha", "beta", "gamma", "delta"], 0.5),
        (scoring.string_match_all, "a\tb", ["a\nb"], 1.0),  # control characters are newlines
        (scoring.string_match_part, "It is ALPHA.", ["alpha", "beta"], 1.0),
        (scoring.string_match_part, "neither", ["alpha", "beta"], 0.0),
        (scoring.keyword_recall, "Sit. in the Park", "sit in the park on", 3 / 5),  # punctuation counts
    ],
)
def test_by_hand(metric: Metric, prediction: str, reference: Any, expected: float) -> None:
    assert metric(prediction, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "reference", "says"),
    [
        (scoring.retrieval, "three", "names no paragraph"),
        (scoring.string_match_all, [], "no references"),
        (scoring.keyword_recall, " ", "no words to look for"),
    ],
)
def test_a_reference_that_holds_nothing_is_refused(metric: Metric, reference: Any, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        metric("3", reference)


def package_rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L of the `rouge` package, as LongBench's metrics.py takes it, with all the stack it wants."""
    from rouge import Rouge

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + len(prediction) + len(reference))
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores([prediction], [reference], avg=True)["rouge-l"]["f"])
    except ValueError:
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


few_words = st.lists(st.sampled_from(("a", "b", "c", "d", ".", ". ", "\n", "..")), max_size=40).map(" ".join)
dense = st.text("ab c.", max_size=60)


@settings(max_examples=150, deadline=None)
@given(few_words | dense | st.text(max_size=40), few_words | dense | st.text(max_size=40))
def test_rouge_l_is_the_package_bit_for_bit(prediction: str, reference: str) -> None:
    assert scoring.rouge_l(prediction, reference) == package_rouge_l(prediction, reference)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=70, max_size=140), st.lists(st.integers(0, 25), min_size=70, max_size=140))
def test_rouge_l_is_the_package_beyond_one_machine_word(one: list[int], other: list[int]) -> None:
    prediction, reference = (" ".join(map(str, words)) for words in (one, other))
    assert scoring.rouge_l(prediction, reference) == package_rouge_l(prediction, reference)


def test_rouge_l_of_a_long_sentence_is_not_bound_by_the_stack() -> None:
    from rouge import Rouge

    long = "end " + " ".join(f"w{i}" for i in range(1100))
    assert scoring.rouge_l(long, "end") == pytest.approx(2 / 1102, abs=1e-6)
    with pytest.raises(RecursionError):
        Rouge(metrics=["rouge-l"]).get_scores(long, "end")


def test_classification_shares_the_point_and_drops_parts_of_the_gold_name() -> None:
    classes = ["City", "Country", "Other location", "location"]
    assert scoring.classification("Other location", "Other location", classes) == 1.0
    assert scoring.classification("City or Country", "City", classes) == 0.5
    assert scoring.classification("Country", "City", classes) == 0.0
    assert scoring.classification("", "City", classes) == 0.0


def test_first_line() -> None:
    assert scoring.first_line("\n\nPerson\nmore") == "Person"
    assert scoring.first_line("") == ""


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_every_metric_is_a_share(prediction: str, reference: str) -> None:
    for metric in PLAIN:
        assert 0.0 <= metric(prediction, reference) <= 1.0, metric
