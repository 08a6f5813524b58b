"""A puzzle: statements that are hidden in a text, what is asked of them, and the one dial that makes it harder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Puzzle:
    """One puzzle, without the text that hides it.

    statements: sentences to hide, each a line of its own. needed: those of them that the answer takes. ordered: whether
    they stay in this order; otherwise they are scattered, a single needed one at the place that the sample says.
    """

    statements: tuple[str, ...]
    needed: tuple[str, ...]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    ordered: bool = False


@dataclass(frozen=True)
class Dial:
    """What makes a task harder. scale: its settings, easiest first."""

    name: str
    scale: tuple[int, ...]

    @property
    def middle(self) -> int:
        """The setting of a model that nobody calibrated the task for."""
        return self.scale[(len(self.scale) - 1) // 2]


@dataclass(frozen=True)
class Kind:
    """A task's wording. generation: tokens that every setting's answer fits. make: (setting, draw) to a puzzle."""

    name: str
    dial: Dial
    generation: int
    metric: Callable[[str, Sequence[str]], float]
    intro: str
    make: Callable[[int, Random], Puzzle]
