"""Metrics of graded tasks: functions of a prediction and the answers, in [0, 1]. Only the first line counts."""

import re
from collections.abc import Sequence

from tasks.scoring import first_line

WORD = re.compile(r"\w+")


def leads(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 when the prediction begins with the one answer, but for an article, and 0 otherwise."""
    said, wanted = _words(prediction), _words(answers[0])
    return float(said[: len(wanted)] == wanted)


def leading_digits(prediction: str, answers: Sequence[str]) -> float:
    """Return how much of the one answer, a number, the first number said begins with."""
    said = next(iter(re.findall(r"\d+", first_line(prediction))), "")
    right = next((at for at, (a, b) in enumerate(zip(said, answers[0], strict=False)) if a != b), len(said))
    return min(right, len(answers[0])) / len(answers[0])


def listed_in_any_order(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers among as many words as there are answers, each counted once."""
    said = set(list(dict.fromkeys(_words(prediction)))[: len(answers)])
    return sum(answer.lower() in said for answer in answers) / len(answers)


def listed_in_order(prediction: str, answers: Sequence[str]) -> float:
    """Return the longest run of answers, gaps allowed, that the first words said have in order; as a share of all."""
    said = _words(prediction)[: len(answers)]
    wanted = [answer.lower() for answer in answers]
    row = [0] * (len(wanted) + 1)
    for word in said:
        last = row
        row = [0]
        for at, answer in enumerate(wanted):
            row.append(last[at] + 1 if word == answer else max(last[at + 1], row[at]))
    return row[-1] / len(wanted)


def _words(text: str) -> list[str]:
    """The first line's words in lower case, without articles and `and`."""
    return [word for word in WORD.findall(first_line(text).lower()) if word not in ("a", "an", "the", "and")]
