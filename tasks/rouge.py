"""ROUGE-L of a summary, equal to the `rouge` package 1.0.1 in every bit, and about forty times as fast on long ones.

The package (LongBench's `rouge_score`) fills a table of the longest common subsequence for every pair of sentences
(Lin 2004), walks one path back through it, and counts the distinct words on all paths. Here a row of the table is one
integer, whose bits say in which columns the subsequence grows (Hyyro 2004), and the walk reads its turns from them.

Difference: nothing recurses. The package needs a frame a word and runs out of stack in a sentence of about a thousand,
which LongBench's metrics.py scores 0; here a score cannot depend on how deep the caller stands.
"""

from collections.abc import Iterable, Mapping, Sequence


def rouge_l(prediction: str, reference: str) -> float:
    """Return F of the distinct words in summary-level longest common subsequences; 0 for nothing but full stops.

    Sentences end at full stops, words at blanks; a blank sentence is one empty word, as in the package.
    """
    said, wanted = _sentences(prediction), _sentences(reference)
    if not said or not wanted:
        return 0.0
    columns = [(_columns(words), len(words)) for words in said]
    common: set[str] = set()
    for words in wanted:
        for places, width in columns:
            common.update(_subsequence(words, places, width))
    precision = len(common) / _distinct(said)
    recall = len(common) / _distinct(wanted)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _distinct(sentences: Iterable[Iterable[str]]) -> int:
    return len({word for words in sentences for word in words})


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
