"""Turns: a conversation of several questions over one context, whose cache is compressed before the first answer.

    turns/facts          six facts are hidden in a text, and each of five turns asks for another of them
    turns/told           each turn also tells a new fact; later turns ask for facts of the context and for told ones
    turns/again/facts    the same conversations, the cache compressed again to its budget after each answer
    turns/again/told

Wordings and scores are our own; that one context is asked several times is after SCBench
(https://arxiv.org/abs/2412.10319). The answers that stay in a cache are the model's own. A sample is a conversation:
`score` is the share of its turns that were answered right, `turn1` to `turn5` are each turn's, and `context` and `told`
those of the turns that ask for a fact of the one kind. The two protocols have the same samples, so a board pairs them.

A length is that of the first prompt and its answer; what later turns bring comes on top. Every answer begins by
repeating its question, because SmolLM2-135M answers with its full cache then, and hardly otherwise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

from tasks.base import About, Sample, Task, TaskError, TaskOptions, Tokenizer, Turn, rng, task
from tasks.graded.scores import leads
from tasks.graded.words import FRUITS, NAMES, PLACES, THINGS, numbers, some
from tasks.pool import Span, Spans, pool_facts, pool_spans

TURNS = 5
HIDDEN = 6
CONTEXTS = 20  # of each length when no limit is given
GENERATION = 12
LEAST_TEXT = 100  # tokens of the shortest text that is still one
LEAST_AROUND = 96  # tokens of a prompt that are not its text, whatever the tokenizer
SLACK = 16  # tokens by which joints may differ from the estimate
INTRO = "Remember what this text says about people and things."

CITIES = (
    "Paris",
    "London",
    "Rome",
    "Madrid",
    "Berlin",
    "Vienna",
    "Oslo",
    "Dublin",
    "Athens",
    "Lisbon",
    "Boston",
    "Cairo",
)
COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "brown", "black", "white", "gray", "gold")


@dataclass(frozen=True)
class Fact:
    """Something that a text or a user says, and how it is asked for. head: what comes before the answer."""

    head: str
    question: str
    answer: str

    @property
    def said(self) -> str:
        return f"{self.head} {self.answer}."


@dataclass(frozen=True)
class Ask:
    """One turn. told: what the user says besides. source: `context` or `told`, where the fact asked for is from."""

    fact: Fact
    source: str
    told: Fact | None = None

    @property
    def text(self) -> str:
        told = "" if self.told is None else f"{TOLD} {self.told.said}\n"
        return f"{told}Question: {self.fact.question}"


TOLD = "Remember this too:"


def draw_facts(count: int, kinds_of: int, draw: Random) -> list[Fact]:
    """Return facts of which no two are about the same one, in turn of so many of the five kinds."""
    names, things = iter(some(NAMES, count, draw)), iter(some(THINGS, count, draw))

    def number() -> Fact:
        name = next(names)
        return Fact(f"The locker number of {name} is", f"What is the locker number of {name}?", numbers(1, draw)[0])

    def fruit() -> Fact:
        name = next(names)
        return Fact(f"The favorite fruit of {name} is", f"What is the favorite fruit of {name}?", draw.choice(FRUITS))

    def place() -> Fact:
        thing = next(things)
        return Fact(f"The {thing} is kept in the", f"Where is the {thing} kept?", draw.choice(PLACES))

    def city() -> Fact:
        name = next(names)
        return Fact(f"The sister of {name} lives in", f"Where does the sister of {name} live?", draw.choice(CITIES))

    def color() -> Fact:
        name = next(names)
        return Fact(
            f"The front door of {name} is painted", f"What color is the front door of {name}?", draw.choice(COLORS)
        )

    kinds = draw.sample([number, fruit, place, city, color], kinds_of)
    facts = [kind() for kind in islice(cycle(kinds), count)]
    draw.shuffle(facts)
    return facts


class Conversation(Task):
    """Five questions over one context; `asks` says which."""

    metric = "share of turns answered right"

    def __init__(self, name: str, *, again: bool = False) -> None:
        self.lane, self.again = f"turns/{name}", again
        self.name = f"turns/again/{name}" if again else self.lane
        self.protocol = "turns/again" if again else "turns"
        self.about = About("own, text of the pool", "1", "Apache-2.0", self.metric, CONTEXTS)

    def ask(self, draw: Random) -> tuple[list[Fact], list[Ask]]:
        """Return what is hidden in a context, and the turns."""
        hidden = draw_facts(HIDDEN, 3, draw)
        return hidden, [Ask(fact, "context") for fact in draw.sample(hidden, TURNS)]

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Yield `limit` conversations a length, by default 20 or as many as the pool has text for.

        A smaller limit draws a prefix. Raises TaskError, before the first sample, when there is too little text, or a
        length is too small or exceeds `max_tokens`.
        """
        lengths = tuple(dict.fromkeys(options.lengths))
        for length in lengths:
            self._check(length, options)
        spans = pool_spans(self.lane, options, {length: length - LEAST_AROUND for length in lengths})
        wanted = self.about.samples if options.limit is None else options.limit
        count = spans.granted(wanted, most=options.limit is None)
        return (self._sample(spans, length, number, options) for length in lengths for number in range(count))

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        lines = prediction.split("\n")
        right = [leads(lines[at], [answer]) if at < len(lines) else 0.0 for at, answer in enumerate(sample.answers)]
        scores = {"score": sum(right) / len(right)}
        scores |= {f"turn{number}": own for number, own in enumerate(right, start=1)}
        for source in dict.fromkeys(sample.meta["sources"]):
            own = [one for one, of in zip(right, sample.meta["sources"], strict=True) if of == source]
            scores[source] = sum(own) / len(own)
        return scores

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        return {"turns": TURNS, "hidden": HIDDEN, **pool_facts(self.lane, options)}

    def _sample(self, spans: Spans, length: int, number: int, options: TaskOptions) -> Sample:
        draw, span = rng(options.seed, self.lane, length, number), spans.at(length, number)
        hidden, asks = self.ask(draw)
        room = length - SLACK - _around(hidden, asks, options.tokenizer)
        first, *others = asks
        return Sample(
            id=f"{length}/{number}",
            context=f"{INTRO}\n\n{_text(span, room, hidden, draw, options.tokenizer)}\n\n",
            question=first.text,
            answers=tuple(ask.fact.answer for ask in asks),
            max_new_tokens=GENERATION,
            answer_prefix=first.fact.head,
            stop=("\n",),
            turns=tuple(Turn(ask.text, GENERATION, ask.fact.head) for ask in others),
            meta={
                "length": length,
                "group": span.group,
                "needles": [ask.fact.said for ask in asks if ask.source == "context"],
                "sources": [ask.source for ask in asks],
            },
        )

    def _check(self, length: int, options: TaskOptions) -> None:
        self.check_length(length, options)
        around = _around(*self.ask(rng(options.seed, self.lane)), options.tokenizer)
        missing = around + SLACK + LEAST_TEXT - length
        if missing > 0:
            raise TaskError(
                f"{self.name}: {length} tokens are too few; the smallest length that works is {length + missing}"
            )


class Told(Conversation):
    """Each turn tells a fact; the first asks for one of the context, of the others two do and two ask for told ones."""

    def ask(self, draw: Random) -> tuple[list[Fact], list[Ask]]:
        hidden, told = (facts := draw_facts(HIDDEN + TURNS, 5, draw))[:HIDDEN], facts[HIDDEN:]
        sources = ["context", *draw.sample(["context", "context", "told", "told"], TURNS - 1)]
        of_context, known, asks = iter(draw.sample(hidden, TURNS)), list[Fact](), list[Ask]()
        for source, new in zip(sources, told, strict=True):
            fact = next(of_context) if source == "context" else known.pop(draw.randrange(len(known)))
            asks.append(Ask(fact, source, new))
            known.append(new)
        return hidden, asks


def _text(span: Span, room: int, hidden: list[Fact], draw: Random, tokenizer: Tokenizer) -> str:
    """The head of a span in `room` tokens, with each fact on a line of its own between its sentences."""
    words = len(tokenizer.decode(tokenizer.encode(span.text)[:room]).split())
    sentences = span.head(words)
    places = sorted(draw.randint(0, len(sentences)) for _ in hidden)
    parts, last = list[str](), 0
    for place, fact in zip(places, hidden, strict=True):
        parts += [" ".join(sentences[last:place]), fact.said]
        last = place
    return "\n".join(part for part in (*parts, " ".join(sentences[last:])) if part)


def _around(hidden: list[Fact], asks: list[Ask], tokenizer: Tokenizer) -> int:
    """Tokens of the first prompt and its answer without the text, chat template included."""
    lines = "\n".join([INTRO, *(f"{fact.said}\n" for fact in hidden), asks[0].text, asks[0].fact.head])
    return len(tokenizer.encode(lines)) + tokenizer.template_tokens + GENERATION


for _again in (False, True):
    task(Conversation("facts", again=_again))
    task(Told("told", again=_again))
