"""A RULER task: a generator, a metric and what a record says of both.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/prepare.py (500 samples a length) and scripts/eval/synthetic/constants.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from tasks.base import About, DataOptions, Sample, Task, TaskError, TaskOptions, point, rng, spread_order
from tasks.ruler.fit import LARGEST_LENGTH, OFFICIAL_SAMPLES, Generator, SamplePlan, room, shrink, tokens

PROBES = 16
"""Samples that are tried before a length is accepted."""
SLACK = 16
"""Tokens that those must leave over, because later samples may be a little longer."""
STEP = 64
"""The smallest length that works is searched in these steps."""

GENERAL = (
    "every random choice is seeded per sample",
    "the place of a single answer follows an evenly spread sequence",
    "a sample that is too long shrinks by its overshoot, not by NVIDIA's fixed increment",
)

Metric = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Origin:
    """What a record says of the data.

    facts: computed from the options. find: the data file, for a task that reads one. deviations: from NVIDIA's
    generator.
    """

    deviations: tuple[str, ...] = ()
    facts: Callable[[TaskOptions], Mapping[str, Any]] | None = None
    find: Callable[[DataOptions], object] | None = None


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
        self.about = About("NVIDIA/RULER", "c3f5e3b", "Apache-2.0", metric.__name__, OFFICIAL_SAMPLES)
        self._origin = origin

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Return `limit` samples a length, 500 by default; ids `{length}/{i}`, a smaller limit draws a prefix.

        `i` counts from 0, or is the number of the question in its file. Questions: the first 500 of the file in an
        order that spreads any first part over them, then the later ones in file order; those that do not fit are
        passed over. Raises TaskError, before the first sample, when data is missing or a length is too small or over
        `max_tokens`.
        """
        generator = self._open(options)
        sizes = {length: self._units(generator, length, options) for length in dict.fromkeys(options.lengths)}
        return self._draw(generator, sizes, options)

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": self._metric(prediction, sample.answers)}

    def reference(self, sample: Sample) -> str | None:
        return sample.answers[0] if self._any_of else ", ".join(sample.answers)

    def find_data(self, options: DataOptions) -> None:
        if self._origin.find is not None:
            self._origin.find(options)

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        facts = self._origin.facts(options) if self._origin.facts else {}
        return {"deviations": [*GENERAL, *self._origin.deviations], **facts}

    def _draw(self, generator: Generator, sizes: Mapping[int, int], options: TaskOptions) -> Iterator[Sample]:
        wanted = OFFICIAL_SAMPLES if options.limit is None else options.limit
        for length, units in sizes.items():
            made = 0
            for rank, index in enumerate(self._order(generator, length, options.seed)):
                if made == wanted:
                    break
                sample = self._fitted(generator, units, plan=self._plan(length, index, rank, options), options=options)
                if sample is not None:
                    yield sample
                    made += 1
                elif generator.available is None:
                    raise TaskError(f"{self.name}: sample {length}/{index} does not fit {length} tokens; ask for more")

    def _order(self, generator: Generator, length: int, seed: int) -> Iterable[int]:
        """The samples that may be drawn, in the order they are tried."""
        if generator.available is None:
            return count()
        first = min(OFFICIAL_SAMPLES, generator.available)
        return chain(spread_order(first, seed, self.name, length), range(first, generator.available))

    def _plan(self, length: int, index: int, rank: int, options: TaskOptions) -> Callable[[], SamplePlan]:
        at = point(rank, options.seed, self.name, length)
        return lambda: SamplePlan(length, index, rng(options.seed, self.name, length, index), at)

    def _fitted(
        self, generator: Generator, units: int, *, plan: Callable[[], SamplePlan], options: TaskOptions
    ) -> Sample | None:
        """The sample of a plan with at most `units` units, or None when its least haystack is too long."""
        place = plan()
        fitted = shrink(
            lambda size: generator.build(size, plan()),
            lambda prompt: tokens(prompt, options.tokenizer),
            room=room(place.length, generator.generation, options.tokenizer),
            units=units,
            least=generator.least(place.length, place.index),
        )
        if fitted is None:
            return None
        prompt, size = fitted
        return Sample(
            id=f"{place.length}/{place.index}",
            context=prompt.context,
            question=prompt.question,
            answers=prompt.answers,
            max_new_tokens=generator.generation,
            answer_prefix=prompt.answer_prefix,
            meta={
                **prompt.meta,
                "length": place.length,
                "prompt_tokens": size + options.tokenizer.template_tokens,
            },
        )

    def _units(self, generator: Generator, length: int, options: TaskOptions) -> int:
        """Haystack units for a length, searched once with a sample of its own draw.

        Raises TaskError when the length exceeds `max_tokens` or is too small, with the smallest one that works.
        """
        self.check_length(length, options)
        index = self._first_fitting(generator, length, options)
        if index is None:
            later = range(length - length % STEP + STEP, LARGEST_LENGTH + 1, STEP)
            works = next((size for size in later if self._first_fitting(generator, size, options) is not None), "none")
            raise TaskError(f"{self.name}: {length} tokens are too few; the smallest length that works is {works}")
        available = room(length, generator.generation, options.tokenizer)

        def spare(units: int) -> int:
            plan = SamplePlan(length, index, rng(options.seed, self.name, length, "fit"), at=0.5)
            return available - tokens(generator.build(units, plan), options.tokenizer)

        return generator.search(spare, length=length, least=generator.least(length, index))

    def _first_fitting(self, generator: Generator, length: int, options: TaskOptions) -> int | None:
        """The first of the probed samples that fits; None unless all of them do, or half where samples are counted."""
        available = room(length, generator.generation, options.tokenizer) - SLACK
        probed = range(PROBES if generator.available is None else min(PROBES, generator.available))

        def fits(index: int) -> bool:
            plan = SamplePlan(length, index, rng(options.seed, self.name, length, index), at=0.5)
            return tokens(generator.build(generator.least(length, index), plan), options.tokenizer) <= available

        fitting = [index for index in probed if fits(index)]
        enough = len(probed) if generator.available is None else -(-len(probed) // 2)
        return fitting[0] if len(fitting) >= enough else None
