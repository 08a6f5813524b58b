"""Metrics of the evaluation tasks: pure functions of a prediction and a reference, all in [0, 1].

Sources: LongBench's metrics.py (github.com/THUDM/LongBench@2e00731), RULER's scripts/eval/synthetic/constants.py
(github.com/NVIDIA/RULER@c3f5e3b), needle-in-a-haystack as in github.com/Zefan-Cai/KVCache-Factory@c97f9d7.
Written from what these compute; the differences that can change a number are named at the function.
"""

import logging
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from tasks.base import TaskError

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)
CHINESE_PUNCTUATION = PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
CONTROL = re.compile(r"[\x00-\x1f]")
NUMBER = re.compile(r"\d+")
NOT_CODE = ("`", "#", "//")


def token_f1(prediction: str, reference: str) -> float:
    """Return F1 of the tokens in common, without case, punctuation and articles (SQuAD, Rajpurkar et al. 2016).

    LongBench `qa_f1_score`.
    """
    return _f1(_squad_tokens(prediction), _squad_tokens(reference))


def token_f1_zh(prediction: str, reference: str) -> float:
    """Return the F1 of the jieba words in common, without case, punctuation and blanks. LongBench `qa_f1_zh_score`."""
    return _f1(_chinese_tokens(prediction), _chinese_tokens(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """Return F of the distinct words in summary-level longest common subsequences; 0 for nothing but full stops.

    LongBench `rouge_score`: equal to the `rouge` package 1.0.1 in every bit, about forty times as fast on long texts.
    Sentences end at full stops, words at blanks; a blank sentence is one empty word. The package fills a table of the
    longest common subsequence for every pair of sentences (Lin 2004), walks one path back through it, and counts the
    distinct words on all paths. Here a row of the table is one integer, whose bits say in which columns the subsequence
    grows (Hyyro 2004), and the walk reads its turns from them.

    Difference: nothing recurses. The package needs a frame a word and runs out of stack in a sentence of about a
    thousand, which LongBench's metrics.py scores 0; here a score cannot depend on how deep the caller stands.
    """
    said, wanted = _sentences(prediction), _sentences(reference)
    if not said or not wanted:
        return 0.0
    columns = [(_columns(words), len(words)) for words in said]
    common = {word for words in wanted for places, width in columns for word in _subsequence(words, places, width)}
    precision = len(common) / len(set().union(*said))
    recall = len(common) / len(set().union(*wanted))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, reference: str) -> float:
    """Return ROUGE-L f over jieba words. LongBench `rouge_zh_score`."""
    return rouge_l(" ".join(_jieba_cut(prediction)), " ".join(_jieba_cut(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """Return 1 / (class names that the prediction holds) when the reference is one of them, else 0.

    Names that are part of the reference's own name are not counted. LongBench `classification_score`, which skips every
    second of such names when two follow each other; no class of trec or lsht is part of another, so this never shows.
    """
    found = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1.0 / len(found) if reference in found else 0.0


def count(prediction: str, reference: str) -> float:
    """Return the share of numbers in the prediction that equal the reference, else 0. LongBench `count_score`."""
    numbers = NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """Return `count` against the number in a reference such as `Paragraph 7`. LongBench `retrieval_score`.

    Raises TaskError when the reference names no paragraph.
    """
    return count(prediction, _paragraph(reference, "Paragraph "))


def retrieval_zh(prediction: str, reference: str) -> float:
    """Return `count` against the number in a reference such as `段落7`. LongBench `retrieval_zh_score`.

    Raises TaskError when the reference names no paragraph.
    """
    return count(prediction, _paragraph(reference, "段落"))


def code_similarity(prediction: str, reference: str) -> float:
    """Similarity of the first line that is code, in whole percent: 2 * common characters in order / both lengths.

    Lines with a backtick, `#` or `//` are passed over. LongBench `code_sim_score`: `fuzz.ratio` of fuzzywuzzy, as it is
    with python-Levenshtein installed (KVCache-Factory requires it). Without that package fuzzywuzzy falls back on
    difflib, which finds fewer characters in common and scores lower.
    """
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in NOT_CODE)), "")
    return round(fuzz.ratio(line, reference)) / 100


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the share of the references that the prediction holds, in any case. RULER `string_match_all`."""
    found = _found(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """Return 1 when the prediction holds any of the references, in any case. RULER `string_match_part`."""
    return float(any(_found(prediction, references)))


def keyword_recall(prediction: str, needle: str) -> float:
    """Return the share of the needle's words in the prediction, split at blanks, in lower case; punctuation counts.

    The heat map of KVCache-Factory's scripts_needle/visualize.py.
    """
    keywords = set(needle.lower().split())
    if not keywords:
        raise TaskError("the needle has no words to look for")
    return len(keywords & set(prediction.lower().split())) / len(keywords)


def first_line(prediction: str) -> str:
    """Return the first line that is not empty: all that LongBench's eval.py scores of a few-shot answer."""
    return prediction.lstrip("\n").split("\n")[0]


def _squad_tokens(text: str) -> list[str]:
    bare = "".join(char for char in text.lower() if char not in PUNCTUATION)
    return ARTICLES.sub(" ", bare).split()


def _chinese_tokens(text: str) -> list[str]:
    words = (word.lower() for word in _jieba_cut(text))
    bare = ("".join(c for c in word if c not in CHINESE_PUNCTUATION and not c.isspace()) for word in words)
    return [word for word in bare if word]


def _jieba_cut(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text, cut_all=False))


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def _paragraph(reference: str, label: str) -> str:
    match = re.search(rf"{label}(\d+)", reference)
    if match is None:
        raise TaskError(f"reference {reference!r} names no paragraph; expected {label!r} and a number")
    return match.group(1)


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    if not references:
        raise TaskError("nothing to look for: the sample has no references")
    text = CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [bool(reference.strip()) and reference.lower() in text for reference in references]


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _columns(words: Sequence[str]) -> dict[str, int]:
    """Where each word stands: bit j is set for word j."""
    places: dict[str, int] = {}
    for at, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << at
    return places


def _subsequence(words: Sequence[str], places: Mapping[str, int], width: int) -> list[str]:
    """Words of the one longest common subsequence that the package finds, last first.

    Bit j of a row is clear where the table's entry j + 1 is one more than entry j. At a word that is not the same, the
    package goes up where the entry above is larger than the entry to the left, which is where the bit is clear, and
    else to the left: so the next stop in a row is its last match or clear bit.
    """
    matches = [places.get(word, 0) for word in words]
    if not any(matches):
        return []
    full = (1 << width) - 1
    row, rows = full, []
    for match in matches:
        same = row & match
        row = (row + same | row - same) & full if same else row
        rows.append(row)
    found: list[str] = []
    left = full
    for word, match, row in zip(reversed(words), reversed(matches), reversed(rows), strict=True):
        stop = ((match | ~row) & left).bit_length()
        if not stop:
            break
        left = (1 << stop) - 1
        if match >> stop - 1 & 1:
            found.append(word)
            left >>= 1
    return found
