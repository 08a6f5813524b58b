"""Metrics against values computed by hand, against the packages they stand for, and over arbitrary text."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import scoring
from tasks.base import TaskError

PLAIN: tuple[Callable[[str, str], float], ...] = (
    scoring.token_f1,
    scoring.token_f1_zh,
    scoring.rouge_l,
    scoring.rouge_l_zh,
    scoring.count,
    scoring.code_similarity,
)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("in Paris, France", "Paris", 2 * (1 / 3) / (1 + 1 / 3)),
        ("a b b", "b b c", 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # "a" is an article: b b against b b c
        ("London", "Paris", 0.0),
        ("the", "the", 0.0),  # nothing is left of either
        ("", "Paris", 0.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert scoring.token_f1(prediction, reference) == pytest.approx(expected)


def test_token_f1_zh_counts_words_without_punctuation() -> None:
    # jieba: 北京 | 是 | 中国 | 的 | 首都 | 。 against 中国 | 首都: precision 2/5, recall 1
    assert scoring.token_f1_zh("北京是中国的首都。", "中国，首都") == pytest.approx(4 / 7)
    assert scoring.token_f1_zh("1377年。", "1377年") == 1.0
    assert scoring.token_f1_zh("。！", "。！") == 0.0


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the cat on the mat"; the package counts distinct words: 4 of 5 and 4 of 5
    assert scoring.rouge_l("the cat lay on the mat", "the cat sat on the mat") == pytest.approx(0.8, abs=1e-6)
    assert scoring.rouge_l("a b c d", "c d") == pytest.approx(2 * 0.5 / 1.5, abs=1e-6)
    assert [scoring.rouge_l(text, "a b") for text in ("", "...", "x y")] == [0.0, 0.0, 0.0]


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


def test_rouge_l_by_hand_over_sentences_and_ties() -> None:
    # "c" of the first sentence and "a b" of the second: 3 distinct words of 4 said and 3 wanted
    assert scoring.rouge_l("c x. a b", "a b c") == pytest.approx(2 * 0.75 / 1.75, abs=1e-6)
    # a sentence of blanks is one empty word: 1 of 2 words
    assert scoring.rouge_l("a. ", "a") == pytest.approx(2 * 0.5 / 1.5, abs=1e-6)
    # of two paths as long the package goes left first: "a" for "x a" and "b" for "x b"; going up, "x" for both
    assert scoring.rouge_l("a b x", "x a. x b") == pytest.approx(2 / 3, abs=1e-6)


def test_rouge_l_of_a_long_sentence_is_not_bound_by_the_stack() -> None:
    from rouge import Rouge

    long = "end " + " ".join(f"w{i}" for i in range(1100))
    assert scoring.rouge_l(long, "end") == pytest.approx(2 / 1102, abs=1e-6)
    with pytest.raises(RecursionError):
        Rouge(metrics=["rouge-l"]).get_scores(long, "end")


def test_rouge_l_zh_is_over_words() -> None:
    # 我 | 喜欢 | 北京 against 我 | 喜欢 | 上海
    assert scoring.rouge_l_zh("我喜欢北京", "我喜欢上海") == pytest.approx(2 / 3, abs=1e-6)
    assert scoring.rouge_l_zh("", "我喜欢上海") == 0.0


def test_classification_shares_the_point_and_drops_parts_of_the_gold_name() -> None:
    classes = ["City", "Country", "Other location", "location"]
    assert scoring.classification("Other location", "Other location", classes) == 1.0
    assert scoring.classification("City or Country", "City", classes) == 0.5
    assert scoring.classification("Country", "City", classes) == 0.0
    assert scoring.classification("", "City", classes) == 0.0


def test_count_and_retrieval_share_the_point_over_numbers() -> None:
    assert scoring.count("There are 7, maybe 8.", "7") == 0.5
    assert scoring.count("17", "7") == 0.0
    assert scoring.retrieval("Paragraph 3", "Paragraph 3") == 1.0
    assert scoring.retrieval("3 or 4 or 3", "Paragraph 3") == pytest.approx(2 / 3)
    assert scoring.retrieval_zh("答案是段落12", "段落12") == 1.0
    assert scoring.retrieval_zh("段落1", "段落12") == 0.0
    with pytest.raises(TaskError, match="names no paragraph"):
        scoring.retrieval("3", "three")


def test_code_similarity_takes_the_first_line_of_code() -> None:
    assert scoring.code_similarity("```python\n# comment\nx = 1\ny = 2", "x = 1") == 1.0
    assert scoring.code_similarity("\n\nreturn x\nmore", "return x") == 1.0
    assert scoring.code_similarity("abcd", "abxd") == 0.75  # 2 * 3 / 8
    assert scoring.code_similarity("abc", "ab") == 0.8
    assert scoring.code_similarity("abc", "abxyzw") == 0.44  # 2 * 2 / 9 = 44.4 %, rounded as fuzzywuzzy does
    assert scoring.code_similarity("ab", "a") == 0.67  # 2 * 1 / 3 = 66.7 %
    assert scoring.code_similarity("# only a comment", "x") == 0.0


def test_string_match_in_any_case_with_control_characters_as_newlines() -> None:
    assert scoring.string_match_all("It is ALPHA and beta.", ["alpha", "beta", "gamma", "delta"]) == 0.5
    assert scoring.string_match_part("It is ALPHA.", ["alpha", "beta"]) == 1.0
    assert scoring.string_match_part("neither", ["alpha", "beta"]) == 0.0
    assert scoring.string_match_all("a\tb", ["a\nb"]) == 1.0
    with pytest.raises(TaskError, match="no references"):
        scoring.string_match_all("text", [])


def test_niah_scores_of_the_two_known_answers() -> None:
    """A perfect continuation, and a wrong one that shares its end."""
    keywords = "eat a sandwich and sit in Dolores Park on a sunny day."
    right, wrong = "eat a sandwich and sit in Dolores Park on a sunny day.", "go to the beach on a sunny day."
    assert scoring.keyword_recall(right, keywords) == 1.0
    assert scoring.keyword_recall(wrong, keywords) == pytest.approx(4 / 11)


def test_first_line() -> None:
    assert scoring.first_line("\n\nPerson\nmore") == "Person"
    assert scoring.first_line("") == ""


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_every_metric_is_a_share(prediction: str, reference: str) -> None:
    for metric in PLAIN:
        assert 0.0 <= metric(prediction, reference) <= 1.0, metric


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_overlap_metrics_do_not_depend_on_the_order_of_arguments(one: str, other: str) -> None:
    assert scoring.token_f1(one, other) == scoring.token_f1(other, one)
    assert scoring.token_f1_zh(one, other) == scoring.token_f1_zh(other, one)


@given(st.lists(st.sampled_from(["red", "green", "blue", "grey"]), min_size=1, max_size=6))
def test_more_references_found_never_score_less(words: list[str]) -> None:
    shares = [scoring.string_match_all(" ".join(words[:n]), words) for n in range(len(words) + 1)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8), st.integers(0, 99))
def test_count_is_the_share_of_numbers(numbers: list[int], gold: int) -> None:
    text = " and ".join(map(str, numbers))
    assert scoring.count(text, str(gold)) == pytest.approx(numbers.count(gold) / len(numbers))
