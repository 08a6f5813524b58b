"""A RULER task: a generator, a metric and what a record says of both.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/prepare.py (500 samples a length) and scripts/eval/synthetic/constants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from tasks.base import Sample, Task, TaskError, TaskOptions, rng
from tasks.ruler.fit import LARGEST_LENGTH, OFFICIAL_SAMPLES, Generator, Prompt, room, shrink, tokens

PROBES = 16
"""Samples that are tried before a length is accepted."""
SLACK = 16
"""Tokens that those must leave over, because later samples may be a little longer."""
STEP = 64
"""The smallest length that works is searched in these steps."""

GENERAL = (
    "every random choice is seeded per sample",
    "a sample that is too long shrinks by its overshoot, not by NVIDIA's fixed increment",
)

Metric = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Origin:
    """What a record says of the data. facts: computed from the options; deviations from NVIDIA's generator."""

    deviations: tuple[str, ...] = ()
    facts: Callable[[TaskOptions], Mapping[str, Any]] | None = None


class RulerTask(Task):
    """One of the 13 tasks. any_of: one answer is enough and the answers are aliases, else all of them are wanted."""

    protocol = "official"

    def __init__(
        self, name: str, opened: Callable[[TaskOptions], Generator], *, metric: Metric, any_of: bool, origin: Origin
    ) -> None:
        self.name = f"ruler/{name}"
        self._open = opened
        self._metric = metric
        self._any_of = any_of
        self._origin = origin

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """`limit` samples a length, 500 by default; ids `{length}/{i}`, a smaller limit draws a prefix.

        Raises TaskError, before the first sample, when data is missing or a length is too small or over `max_tokens`.
        """
        generator = self._open(options)
        plan = {length: self._units(generator, length, options) for length in dict.fromkeys(options.lengths)}
        return self._draw(generator, plan, options)

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": self._metric(prediction, sample.answers)}

    def reference(self, sample: Sample) -> str | None:
        return sample.answers[0] if self._any_of else ", ".join(sample.answers)

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        facts = self._origin.facts(options) if self._origin.facts else {}
        return {"source": "NVIDIA/RULER@c3f5e3b", "deviations": [*GENERAL, *self._origin.deviations], **facts}

    def _draw(self, generator: Generator, plan: Mapping[int, int], options: TaskOptions) -> Iterator[Sample]:
        wanted = OFFICIAL_SAMPLES if options.limit is None else options.limit
        for length, units in plan.items():
            made = 0
            for index in count() if generator.available is None else range(generator.available):
                if made == wanted:
                    break
                prompt = self._fitted(generator, units, length=length, index=index, options=options)
                if prompt is not None:
                    yield self._sample(prompt, generator, f"{length}/{made}", length=length, options=options)
                    made += 1
                elif generator.available is None:
                    raise TaskError(f"{self.name}: sample {length}/{index} does not fit {length} tokens; ask for more")

    def _fitted(
        self, generator: Generator, units: int, *, length: int, index: int, options: TaskOptions
    ) -> Prompt | None:
        """Sample `index` with at most `units` units, or None when its least haystack is too long."""
        available = room(length, generator.generation, options.tokenizer)

        def build(size: int) -> Prompt:
            return generator.build(size, length=length, index=index, draw=rng(options.seed, self.name, length, index))

        def spare(prompt: Prompt) -> int:
            return available - tokens(prompt, options.tokenizer)

        return shrink(build, spare, units=units, least=generator.least(length, index))

    def _sample(self, prompt: Prompt, generator: Generator, name: str, *, length: int, options: TaskOptions) -> Sample:
        size = tokens(prompt, options.tokenizer) + options.tokenizer.template_tokens
        return Sample(
            id=name,
            context=prompt.context,
            question=prompt.question,
            answers=prompt.answers,
            max_new_tokens=generator.generation,
            answer_prefix=prompt.answer_prefix,
            meta={**prompt.meta, "length": length, "prompt_tokens": size},
        )

    def _units(self, generator: Generator, length: int, options: TaskOptions) -> int:
        """Haystack units for a length, searched once with a sample of its own draw.

        Raises TaskError when the length exceeds `max_tokens` or is too small, with the smallest one that works.
        """
        if length > options.max_tokens:
            raise TaskError(
                f"{self.name}: length {length} exceeds the {options.max_tokens} tokens of the run; lower it"
            )
        index = self._first_fitting(generator, length, options)
        if index is None:
            later = range(length - length % STEP + STEP, LARGEST_LENGTH + 1, STEP)
            works = next((size for size in later if self._first_fitting(generator, size, options) is not None), "none")
            raise TaskError(f"{self.name}: {length} tokens are too few; the smallest length that works is {works}")
        available = room(length, generator.generation, options.tokenizer)

        def spare(units: int) -> int:
            draw = rng(options.seed, self.name, length, "fit")
            return available - tokens(generator.build(units, length=length, index=index, draw=draw), options.tokenizer)

        return generator.search(spare, length=length, least=generator.least(length, index))

    def _first_fitting(self, generator: Generator, length: int, options: TaskOptions) -> int | None:
        """The first of the probed samples that fits; None unless all of them do, or half where samples are counted."""
        available = room(length, generator.generation, options.tokenizer) - SLACK
        probed = range(PROBES if generator.available is None else min(PROBES, generator.available))

        def fits(index: int) -> bool:
            draw = rng(options.seed, self.name, length, index)
            prompt = generator.build(generator.least(length, index), length=length, index=index, draw=draw)
            return tokens(prompt, options.tokenizer) <= available

        fitting = [index for index in probed if fits(index)]
        enough = len(probed) if generator.available is None else -(-len(probed) // 2)
        return fitting[0] if len(fitting) >= enough else None
