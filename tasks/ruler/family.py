"""A RULER task: a generator, a metric, what a record says of both, and prompts that fill a length.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/prepare.py (500 samples a length) and scripts/eval/synthetic/constants.py. A
length includes the prompt, the answer prefix, the tokens to generate and what the chat template adds. As there, the
haystack's units are searched once per length with a drawn sample, and single samples that exceed it shrink.
Differences: they shrink by their own overshoot and not by a fixed 5 to 500 units, so they end close to the length, and
a length that fits nothing raises instead of looping.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from random import Random
from typing import Any

from tasks.base import About, DataOptions, Sample, Task, TaskError, TaskOptions, Tokenizer, point, rng, spread_order
from tasks.pool import LANES, Span, Spans, pool_facts, pool_spans
from tasks.scoring import string_match_part

OFFICIAL_SAMPLES = 500
LARGEST_LENGTH = 131072
SMALL = 4096  # below this length NVIDIA's generators use smaller variants
PROBES = 16  # samples that are tried before a length is accepted
SLACK = 16  # tokens that those must leave over, because later samples may be a little longer
LEAST_SPAN = 320  # tokens of drawn text that the least haystack of every task fits in
STEP = 64  # the smallest length that works is searched in these steps

GENERAL = (
    "every random choice is seeded per sample",
    "the place of a single answer follows an evenly spread sequence",
    "a sample that is too long shrinks by its overshoot, not by NVIDIA's fixed increment",
)


@dataclass(frozen=True)
class FittedPrompt:
    """A drawn sample. context ends where the question begins; context + question is the user's message."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplePlan:
    """What one sample is drawn from.

    index: which sample. draw: every random choice comes from it. at: in [0, 1), the place of the one answer in the
    haystack. probe: only how long the least haystack is counts; its text may be any.
    """

    length: int
    index: int
    draw: Random
    at: float
    probe: bool = False


class Generator(ABC):
    """Draws prompts of one task. A unit is what the haystack is measured in: words, lines, documents."""

    generation: int
    """Tokens to generate."""

    available: int | None = None
    """Samples that exist, or None for any number. Where they are counted, those that do not fit are passed over."""

    def granted(self, wanted: int, *, most: bool) -> int:
        """Return how many samples of each length there are text for: `wanted`, or with `most` also fewer.

        Raises TaskError when there are fewer.
        """
        return wanted

    def units(self, length: int, index: int) -> int | None:
        """Return the units of the text that is one sample's own; None where all samples of a length are sized alike."""
        return None

    @abstractmethod
    def least(self, length: int, index: int) -> int:
        """Return the fewest units of sample `index` at this length."""

    @abstractmethod
    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        """Return the sample of a plan with a haystack of `units`."""

    def search(self, spare: Callable[[int], int], *, length: int, least: int) -> int:
        """Find the units for a length. spare: units -> tokens left over, negative when too long; `least` fits."""
        return largest(spare, least)


class DrawnText(Generator):
    """Draws prompts over text of the pool where `spans` is given: a span for each sample."""

    spans: Spans | None = None

    def granted(self, wanted: int, *, most: bool) -> int:
        return wanted if self.spans is None else self.spans.granted(wanted, most=most)

    def span(self, plan: SamplePlan) -> Span | None:
        """Return the text that the sample has for itself; None where the text is fixed."""
        if self.spans is None:
            return None
        return self.spans.at(next(iter(self.spans.needs)), 0) if plan.probe else self.spans.at(plan.length, plan.index)


class RulerTask(Task):
    """A task of RULER: what `opened` draws, scored by `metric`.

    facts: what a record says of the data, beside the deviations from NVIDIA's generator. find, read: look for the data
    file and read it, for a task that has one.
    """

    family = "ruler"
    official = OFFICIAL_SAMPLES
    """Samples of each length when no limit is given."""

    def __init__(
        self,
        name: str,
        opened: Callable[[TaskOptions], Generator],
        metric: Callable[[str, Sequence[str]], float],
        *deviations: str,
        facts: Callable[[TaskOptions], Mapping[str, Any]] = lambda options: {},
        find: Callable[[DataOptions], object] = lambda options: None,
        read: Callable[[DataOptions], object] = lambda options: None,
    ) -> None:
        self.name = f"{self.family}/{name}"
        self.about = About("NVIDIA/RULER", "c3f5e3b", "Apache-2.0", metric.__name__, self.official)
        self._open, self._metric, self._deviations, self._facts = opened, metric, deviations, facts
        self._find, self._read = find, read

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Return `limit` samples a length, 500 by default; ids `{length}/{i}`, a smaller limit draws a prefix.

        `i` counts from 0, or is the number of the question in its file. Questions: the first 500 of the file in an
        order that spreads any first part over them, then the later ones in file order; those that do not fit are
        passed over. Where contexts are drawn the default is as many as the pool has text for, 500 at most. Raises
        TaskError, before the first sample, when data is missing, there is too little text, or a length is too small or
        over `max_tokens`.
        """
        for length in options.lengths:
            self.check_length(length, options)
        generator = self._open(options)
        wanted = generator.granted(self.wanted(options), most=options.limit is None)
        sizes = {length: self._units(generator, length, options) for length in dict.fromkeys(options.lengths)}
        return self._draw(generator, sizes, wanted, options)

    def wanted(self, options: TaskOptions) -> int:
        """Return how many contexts of each length are asked for."""
        return self.official if options.limit is None else options.limit

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": self._metric(prediction, sample.answers)}

    def reference(self, sample: Sample) -> str | None:
        """Return all answers, or the first one where they are aliases."""
        return sample.answers[0] if self._metric is string_match_part else ", ".join(sample.answers)

    def find_data(self, options: DataOptions) -> None:
        self._find(options)

    def read_data(self, options: DataOptions) -> None:
        self._read(options)

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        said = {"deviations": [*GENERAL, *self._deviations]}
        if options.contexts == "drawn" and self.name in LANES:
            note = "the haystack is a span of the pool of its own for each sample, not noise or the head of the essays"
            return {"deviations": [*said["deviations"], note], **pool_facts(self.name, options)}
        return {**said, **self._facts(options)}

    def _draw(
        self, generator: Generator, sizes: Mapping[int, int], wanted: int, options: TaskOptions
    ) -> Iterator[Sample]:
        for length, units in sizes.items():
            made = 0
            for rank, index in enumerate(self._order(generator, length, options.seed)):
                if made == wanted:
                    break
                at = point(rank, options.seed, self.name, length)
                sample = self._fitted(generator, units, length, index, at=at, options=options)
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

    def _fitted(
        self, generator: Generator, units: int, length: int, index: int, *, at: float, options: TaskOptions
    ) -> Sample | None:
        """Sample `index` with at most `units` units, or its own; None when its least haystack is too long."""
        own = generator.units(length, index)
        fitted = shrink(
            lambda size: generator.build(size, SamplePlan(length, index, self._rng(length, index, options), at)),
            lambda prompt: tokens(prompt, options.tokenizer),
            room=room(length, generator.generation, options.tokenizer),
            units=units if own is None else own,
            least=generator.least(length, index),
        )
        if fitted is None:
            return None
        prompt, size = fitted
        return Sample(
            id=f"{length}/{index}",
            context=prompt.context,
            question=prompt.question,
            answers=prompt.answers,
            max_new_tokens=generator.generation,
            answer_prefix=prompt.answer_prefix,
            meta={"group": f"own:{length}/{index}", **prompt.meta, "length": length}
            | {"prompt_tokens": size + options.tokenizer.template_tokens},
        )

    def _units(self, generator: Generator, length: int, options: TaskOptions) -> int:
        """Haystack units for a length, searched once with a sample of its own draw.

        Raises TaskError when the length is too small, with the smallest one that works.
        """
        index = self._first_fitting(generator, length, options)
        if index is None:
            later = range(length - length % STEP + STEP, LARGEST_LENGTH + 1, STEP)
            works = next((size for size in later if self._first_fitting(generator, size, options) is not None), "none")
            raise TaskError(f"{self.name}: {length} tokens are too few; the smallest length that works is {works}")

        if generator.units(length, 0) is not None:
            return generator.least(length, index)

        def spare(units: int) -> int:
            plan = SamplePlan(length, index, self._rng(length, "fit", options), 0.5)
            return self._spare(generator, units, plan, options)

        return generator.search(spare, length=length, least=generator.least(length, index))

    def _first_fitting(self, generator: Generator, length: int, options: TaskOptions) -> int | None:
        """The first of the probed samples that fits; None unless all of them do, or half where samples are counted."""

        def fits(index: int) -> bool:
            plan = SamplePlan(length, index, self._rng(length, index, options), 0.5, probe=True)
            return self._spare(generator, generator.least(length, index), plan, options) >= SLACK

        probed = range(PROBES if generator.available is None else min(PROBES, generator.available))
        fitting = [index for index in probed if fits(index)]
        enough = len(probed) if generator.available is None else -(-len(probed) // 2)
        return fitting[0] if len(fitting) >= enough else None

    def _spare(self, generator: Generator, units: int, plan: SamplePlan, options: TaskOptions) -> int:
        available = room(plan.length, generator.generation, options.tokenizer)
        return available - tokens(generator.build(units, plan), options.tokenizer)

    def _rng(self, length: int, index: int | str, options: TaskOptions) -> Random:
        return rng(options.seed, self.name, length, index)


def drawn_spans(name: str, options: TaskOptions, generation: int) -> Spans | None:
    """Return the spans that fill a task's prompts; None where contexts are the protocol's."""
    if options.contexts == "protocol":
        return None
    rooms = {length: room(length, generation, options.tokenizer) for length in options.lengths}
    return pool_spans(name, options, {length: max(LEAST_SPAN, tokens) for length, tokens in rooms.items()})


def tokens(prompt: FittedPrompt, tokenizer: Tokenizer) -> int:
    """Return the number of tokens of the user's message and the answer prefix, without what the chat template adds."""
    message = len(tokenizer.encode(prompt.context + prompt.question))
    return message + len(tokenizer.encode(prompt.answer_prefix))


def room(length: int, generation: int, tokenizer: Tokenizer) -> int:
    """Return how many tokens a prompt may have at a length."""
    return length - generation - tokenizer.template_tokens


def largest(spare: Callable[[int], int], least: int) -> int:
    """Return the largest number of units with tokens to spare, for a `spare` that falls with the units; `least` fits.

    The bracket is halved, or cut where a straight line through its ends crosses zero.
    """
    low, left = least, spare(least)
    step = max(1, least)
    high, right = low + step, spare(low + step)
    while right >= 0:
        low, left, step = high, right, 2 * step
        high, right = low + step, spare(low + step)
    line = True
    while high - low > 1:
        guess = low + left * (high - low) // max(1, left - right) if line else (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        here = spare(middle)
        low, left, high, right = (middle, here, high, right) if here >= 0 else (low, left, middle, here)
        line = not line
    return low


def shrink(
    build: Callable[[int], FittedPrompt], used: Callable[[FittedPrompt], int], *, room: int, units: int, least: int
) -> tuple[FittedPrompt, int] | None:
    """Return a prompt of at most `units` that fits `room` tokens, and its tokens; None when `least` do not fit.

    A prompt that is too long loses its overshoot's share of the units.
    """
    units = max(units, least)
    prompt = build(units)
    while (size := used(prompt)) > room:
        if units == least:
            return None
        units = max(least, units + (room - size) * units // size)
        prompt = build(units)
    return prompt, size
