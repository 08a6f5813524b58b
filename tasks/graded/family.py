"""A graded task: a puzzle whose statements are hidden in a text of the pool, at the setting that a run names.

Prompts fill a length as RULER's do (`tasks.ruler.family`). Every sample has a span of the pool to itself, whatever
`--contexts` says; calibration draws from the documents put aside for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tasks.base import About, Sample, TaskError, TaskOptions
from tasks.graded.puzzle import Kind, Puzzle
from tasks.pool import Spans, pool_facts, pool_spans
from tasks.ruler.family import LEAST_SPAN, DrawnText, FittedPrompt, RulerTask, SamplePlan, room

SAMPLES = 30  # of each length when no limit is given, or as many as there is text for
LEAST_WORDS = 20
SPARE_TOKENS = 12  # to generate beyond the answer's own
STEP = 8  # what the tokens to generate are rounded up to


class HiddenPuzzle(DrawnText):
    """Draws the prompts of a task. Units: words of the text. settings: by length."""

    def __init__(self, kind: Kind, settings: Mapping[int, int], spans: Spans) -> None:
        self.kind, self.settings, self.spans, self.generation = kind, settings, spans, kind.generation
        self._spans = spans

    def units(self, length: int, index: int) -> int:
        return self._spans.at(length, index).words

    def least(self, length: int, index: int) -> int:
        return LEAST_WORDS

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        setting = self.settings.get(plan.length, self.settings[min(self.settings)])  # another one is a probe's
        puzzle = self.kind.make(setting, plan.draw)
        span = (
            self._spans.at(next(iter(self._spans.needs)), 0) if plan.probe else self._spans.at(plan.length, plan.index)
        )
        text = _hidden(puzzle, span.head(units), plan)
        return FittedPrompt(
            context=f"{self.kind.intro}\n\n{text}\n\n",
            question=puzzle.question,
            answer_prefix=puzzle.answer_prefix,
            answers=puzzle.answers,
            meta={"needles": list(puzzle.needed), "group": span.group, "dial": self.kind.dial.name, "setting": setting},
        )


class GradedTask(RulerTask):
    """One task of the family; its `kind` says everything about it."""

    family = protocol = "graded"
    official = SAMPLES

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind.name, self._hidden, kind.metric)
        self.kind = kind
        self.about = About("own, text of the pool", "1", "Apache-2.0", kind.metric.__name__, SAMPLES)

    def fitting(self, options: TaskOptions) -> tuple[int, ...]:
        """Return the lengths at which a setting qualified for the model; all of them where nobody calibrated it."""
        if options.grades is None:
            return options.lengths
        return tuple(length for length in options.lengths if length in options.grades.settings.get(self.name, {}))

    def reference(self, sample: Sample) -> str:
        return ", ".join(sample.answers)

    def settings(self, options: TaskOptions) -> dict[int, int]:
        """Return the setting at each length of the run: the calibrated one, or the middle of the dial.

        Raises TaskError for one that the dial does not have.
        """
        graded = {} if options.grades is None else options.grades.settings.get(self.name, {})
        dial = self.kind.dial
        for length, setting in graded.items():
            if setting not in dial.scale:
                scale = ", ".join(map(str, dial.scale))
                raise TaskError(f"{dial.name} {setting} at {length} tokens is no setting; the dial has {scale}")
        return {length: graded.get(length, dial.middle) for length in options.lengths}

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        chosen = self.settings(options)
        graded = {} if options.grades is None else options.grades.settings.get(self.name, {})
        return {
            "dial": self.kind.dial.name,
            "settings": {str(length): setting for length, setting in chosen.items()},
            "not_calibrated": [length for length in chosen if length not in graded],
            "calibration": "none" if options.grades is None else dict(options.grades.said),
            **pool_facts(self.name, options),
        }

    def _hidden(self, options: TaskOptions) -> HiddenPuzzle:
        rooms = {length: room(length, self.kind.generation, options.tokenizer) for length in options.lengths}
        spans = pool_spans(self.name, options, {length: max(LEAST_SPAN, tokens) for length, tokens in rooms.items()})
        return HiddenPuzzle(self.kind, self.settings(options), spans)

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Return `limit` samples a length, as `RulerTask.samples` does; each ends after one line."""
        return (self._short(sample, options) for sample in super().samples(options))

    def _short(self, sample: Sample, options: TaskOptions) -> Sample:
        """The sample with as many tokens to generate as its answer needs, and some."""
        wanted = len(options.tokenizer.encode(f" {self.reference(sample)}")) + SPARE_TOKENS
        most = min(self.kind.generation, -(-wanted // STEP) * STEP)
        return replace(sample, max_new_tokens=most, stop=("\n",))


def _hidden(puzzle: Puzzle, sentences: list[str], plan: SamplePlan) -> str:
    """The text, and each statement on a line of its own somewhere between its sentences."""
    placed = sorted(zip(_places(puzzle, len(sentences), plan), puzzle.statements, strict=True), key=lambda one: one[0])
    parts, last = [], 0
    for place, statement in placed:
        parts += [" ".join(sentences[last:place]), statement]
        last = place
    return "\n".join(part for part in (*parts, " ".join(sentences[last:])) if part)


def _places(puzzle: Puzzle, count: int, plan: SamplePlan) -> list[int]:
    """How many of the `count` sentences stand before each statement. One needed alone is where the plan says."""
    places = [plan.draw.randint(0, count) for _ in puzzle.statements]
    if len(puzzle.needed) > 1:
        return sorted(places) if puzzle.ordered else places
    asked, at = puzzle.statements.index(puzzle.needed[0]), int(plan.at * (count + 1))
    if puzzle.ordered:
        before = sorted(plan.draw.randint(0, at) for _ in places[:asked])
        return [*before, at, *sorted(plan.draw.randint(at, count) for _ in places[asked + 1 :])]
    return [*places[:asked], at, *places[asked + 1 :]]
