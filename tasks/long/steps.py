"""Metrics of answers that take many steps, one a line, each behind its number, down to a last line `0. END`."""

from collections.abc import Mapping


def step_metrics(prediction: str, reference: str) -> Mapping[str, float]:
    """Return `score`, `right` and `ended` of an answer, each in [0, 1].

    score: share of the steps before the first line that is not the step that belongs there. right: share of steps
    whose number first stands before the right text, wherever the line is. ended: 1 when the last line is the
    reference's, and no token limit or blank line came before it. Case, blanks and marks at a line's end do not count.

    reference: the rest of a line whose number the answer prefix gave, then the other lines; both texts begin there.
    """
    number = reference.count("\n")  # numbers go down to 1 before the end
    wanted, said = (_lines(f"{number}. {text}") for text in (reference, prediction))
    steps, end = wanted[:-1], wanted[-1]
    until = next((at for at, step in enumerate(steps) if said[at : at + 1] != [step]), len(steps))
    first: dict[str, str] = {}
    for line in said:
        first.setdefault(line.partition(".")[0], line)
    right = sum(first.get(step.partition(".")[0]) == step for step in steps)
    return {"score": until / len(steps), "right": right / len(steps), "ended": float(said[-1] == end)}


def _lines(text: str) -> list[str]:
    lines = (" ".join(line.lower().split()).rstrip(" .,;") for line in text.splitlines())
    return [line for line in lines if line]
