"""Needle in a haystack: one sentence hidden in essays, in three layouts.

`niah/snapkv`: the grid of the SnapKV and PyramidKV papers, from Zefan-Cai/KVCache-Factory@c97f9d7,
run_needle_in_haystack.py, a raw prompt with ten depths. It begins with a literal `<|im_start|>`, as the source's does:
for tokenizers that know it (SmolLM2, Qwen) that is a control token, and SmolLM2 then mostly ends at once.
`niah/kamradt`: gkamradt/LLMTest_NeedleInAHaystack (needlehaystack 0.1.0) with its 35 depths; its system and two user
messages are one user message here, its GPT judge is keyword recall here, and 50 tokens are generated, not 300.
`niah/passkey`: a seven-digit number instead of the classic needle, of our own, which small models can find; ten depths.

As in both sources, haystack and needle together have 200 tokens less than the length, and the needle is moved back to
the nearest token that is a full stop. Common differences: a layout that needs more than those 200 tokens for itself
gets them. With drawn contexts every sample's haystack is a span of `tasks.pool`. Fixed ones are as in the sources,
haystack after haystack under all depths; haystack 0 begins with the first essay, the others at a seeded sentence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from tasks.base import About, Sample, Task, TaskError, TaskOptions, Tokenizer, rng, spread_order, task
from tasks.essays import SOURCE, Essays, read_essays
from tasks.pool import Spans, pool_facts, pool_spans
from tasks.scoring import keyword_recall, string_match_all

TEN_DEPTHS = tuple(round(100 * i / 9) for i in range(10))
"""Percent of the haystack's tokens before the needle: the rounded points of linspace(0, 100)."""
ALL_DEPTHS = tuple(round(100 * i / 34) for i in range(35))  # the 35 points of the original
HAYSTACKS = 5  # haystacks at each length and depth when no limit is given
BUFFER = 200  # tokens of a length that neither haystack nor needle uses
LEAST_HAYSTACK = 100  # tokens of the shortest haystack that is still one
SLACK = 8  # tokens by which a drawn number, a beginning-of-text token or a joint may differ from the estimate

NEEDLE = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."
MAGIC = "\nThe special magic number is: {number}.\n"


@dataclass(frozen=True)
class NeedleLayout:
    """A prompt around the haystack: `before`, haystack, `after`, then what is asked. depths in percent."""

    before: str
    after: str
    question: str
    answer_prefix: str
    chat: bool
    generation: int
    stop: tuple[str, ...] = ()
    depths: tuple[int, ...] = TEN_DEPTHS


class NeedleTask(Task):
    """One layout over lengths x depths x haystacks. Ids are `{length}/depth{percent}/{haystack}`.

    A haystack is under all depths where it is fixed, and under one where it is drawn.
    """

    metric = "keyword_recall"

    def __init__(
        self, name: str, layout: NeedleLayout, *deviations: str, source: str, revision: str, licence: str = "MIT"
    ) -> None:
        self.name = f"niah/{name}"
        self.protocol = name
        self.layout = layout
        self.about = About(source, revision, licence, self.metric, HAYSTACKS * len(layout.depths))
        self._deviations = [*COMMON, *deviations]

    def plant(self, draw: Random) -> tuple[str, str]:
        """Return the needle of one sample, as inserted, and the answer that it holds."""
        return NEEDLE, ANSWER

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """`limit` samples a length, default all depths x 5 haystacks; haystack by haystack, depths spread evenly.

        A smaller limit draws a prefix; the default, where contexts are drawn, is as many of them as the pool has text
        for. Raises TaskError, before the first sample, when there is no text, too little of it, or a length is too
        small or exceeds `max_tokens`.
        """
        lengths = tuple(dict.fromkeys(options.lengths))
        for length in lengths:
            self._check(length, options)
        if options.contexts == "drawn":
            spans = self._spans(options)
            wanted = self.about.samples if options.limit is None else options.limit
            count = spans.granted(wanted, most=options.limit is None)
            return (sample for length in lengths for sample in self._each(spans, length, count, options))
        essays = read_essays(options)
        starts = _starts(essays, options.seed)
        return (sample for length in lengths for sample in self._grid(essays, starts, length, options))

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        """Score keyword recall of the answer; beside it ROUGE-1 and ROUGE-L F against the needle, as in the source."""
        rouge = _rouge().score(sample.meta["needles"][0], prediction)
        recall = keyword_recall(prediction, sample.answers[0])
        return {"score": recall, **{name: float(value.fmeasure) for name, value in rouge.items()}}

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        if options.contexts == "drawn":
            return {"deviations": self._deviations[1:], **pool_facts(self.name, options)}
        return {"deviations": self._deviations, **read_essays(options).provenance()}

    def _spans(self, options: TaskOptions) -> Spans:
        return pool_spans(self.name, options, {length: length - BUFFER for length in options.lengths})

    def _each(self, spans: Spans, length: int, count: int, options: TaskOptions) -> Iterator[Sample]:
        """A haystack of its own for each sample; every round of the depths in a seeded order."""
        depths = self.layout.depths
        for number in range(count):
            lap, turn = divmod(number, len(depths))
            depth = depths[spread_order(len(depths), options.seed, self.name, length, lap)[turn]]
            span = spans.at(length, number)
            ids = options.tokenizer.encode(span.text)
            meta = {"length": length, "depth": depth, "haystack": number, "group": span.group}
            yield self._sample(f"{length}/depth{depth}/{number}", ids, meta=meta, options=options)

    def _grid(self, essays: Essays, starts: Sequence[int], length: int, options: TaskOptions) -> Iterator[Sample]:
        depths = self.layout.depths
        wanted = len(depths) * HAYSTACKS if options.limit is None else options.limit
        for haystack in range(-(-wanted // len(depths))):
            start = starts[haystack % len(starts)]
            ids = _fill(essays.text, start, length, options.tokenizer)
            order = spread_order(len(depths), options.seed, self.name, length, haystack)
            for at in order[: wanted - haystack * len(depths)]:
                name = f"{length}/depth{depths[at]}/{haystack}"
                meta = {"length": length, "depth": depths[at], "haystack": haystack, "group": f"essays:{start}"}
                yield self._sample(name, ids, meta=meta, options=options)

    def _sample(self, name: str, ids: list[int], *, meta: Mapping[str, Any], options: TaskOptions) -> Sample:
        layout, tokenizer = self.layout, options.tokenizer
        needle, answer = self.plant(rng(options.seed, self.name, name))
        text = hide(needle, ids[: self._size(needle, meta["length"], tokenizer)], meta["depth"], tokenizer)
        context = f"{layout.before}{text}{layout.after}"
        return Sample(
            id=name,
            context=context,
            question=layout.question,
            answers=(answer,),
            max_new_tokens=layout.generation,
            answer_prefix=layout.answer_prefix,
            chat=layout.chat,
            stop=layout.stop,
            meta={**meta, "needles": [needle.strip()], "prompt_tokens": self._tokens(context, tokenizer)},
        )

    def _tokens(self, context: str, tokenizer: Tokenizer) -> int:
        """Tokens of a prompt, chat template included."""
        parts = context + self.layout.question, self.layout.answer_prefix
        return sum(len(tokenizer.encode(part)) for part in parts) + self.layout.chat * tokenizer.template_tokens

    def _size(self, needle: str, length: int, tokenizer: Tokenizer) -> int:
        """Tokens of the haystack without its needle."""
        around = self._tokens(self.layout.before + self.layout.after, tokenizer) + self.layout.generation + SLACK
        return length - max(BUFFER, around) - len(tokenizer.encode(needle))

    def _check(self, length: int, options: TaskOptions) -> None:
        self.check_length(length, options)
        needle, _ = self.plant(rng(options.seed, self.name, length))
        missing = LEAST_HAYSTACK + SLACK - self._size(needle, length, options.tokenizer)
        if missing > 0:
            raise TaskError(
                f"{self.name}: {length} tokens are too few; the smallest length that works is {length + missing}"
            )


class Passkey(NeedleTask):
    """A seven-digit number as needle; the score is whether the prediction holds it."""

    metric = "string_match_all"

    def plant(self, draw: Random) -> tuple[str, str]:
        number = str(draw.randint(1_000_000, 9_999_999))
        return MAGIC.format(number=number), number

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": string_match_all(prediction, sample.answers)}


def hide(needle: str, ids: Sequence[int], depth: int, tokenizer: Tokenizer) -> str:
    """Return the text of `ids` with the needle at `depth` percent, moved back behind a token that is a full stop.

    Depth 100 appends the needle. With no full stop before the place it comes first.
    """
    place = len(ids)
    if depth < 100:
        stops = _full_stops(tokenizer)
        place = int(len(ids) * (depth / 100))
        while place and ids[place - 1] not in stops:
            place -= 1
    return tokenizer.decode([*ids[:place], *tokenizer.encode(needle), *ids[place:]])


def _full_stops(tokenizer: Tokenizer) -> set[int]:
    """The tokens of a full stop alone and after a word: 13 of Llama 3, 842 and 28723 of Mistral, as in the source."""
    return {tokenizer.encode(text)[-1] for text in (".", "a.")}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # seconds, for nltk: not to list or refuse names

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def _starts(essays: Essays, seed: int) -> list[int]:
    """Characters at which the haystacks begin: the first essay, then every other sentence in a seeded order."""
    later = essays.starts[1:]
    rng(seed, "niah", "haystacks").shuffle(later)
    return [0, *later]


def _fill(text: str, start: int, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """At least `tokens` token ids of the essays from character `start` on, starting over when they end."""
    size = 6 * tokens
    while True:
        rounds = 1 + (start + size) // len(text)
        ids = tokenizer.encode((text * rounds)[start : start + size])
        if len(ids) >= tokens:
            return ids
        size *= 2


SNAPKV = NeedleLayout(
    before="<|im_start|> This is a very long story book: <book> ",
    after=" </book>.\n",
    question=" Based on the content of the book, Question: The best thing to do in San Francisco is: ",
    answer_prefix="\nAnswer:",
    chat=False,
    generation=30,
    stop=("\n",),
)
KAMRADT = NeedleLayout(
    before="You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n\n",
    after="\n\n",
    question="What is the best thing to do in San Francisco? "
    "Don't give information outside the document or repeat your findings",
    answer_prefix="",
    chat=True,
    generation=50,
    depths=ALL_DEPTHS,
)
PASSKEY = NeedleLayout(
    before="A special magic number is hidden within the following text. Make sure to memorize it.\n",
    after="\n",
    question="What is the special magic number mentioned in the provided text?",
    answer_prefix=" The special magic number mentioned in the provided text is",
    chat=True,
    generation=16,
)
COMMON = (
    "haystacks after the first begin at a seeded sentence",
    "a layout that needs more than 200 tokens beside haystack and needle gets them",
)

task(
    NeedleTask(
        "snapkv",
        SNAPKV,
        "keyword recall is the score; the source stores ROUGE-1 and plots keyword recall",
        source="Zefan-Cai/KVCache-Factory",
        revision="c97f9d7",
    )
)
task(
    NeedleTask(
        "kamradt",
        KAMRADT,
        *("one user message", "keyword recall instead of a GPT judge", "50 tokens, not 300"),
        source=SOURCE,
        revision="needlehaystack 0.1.0",
    )
)
task(
    Passkey(
        "passkey",
        PASSKEY,
        "own needle and wording",
        source="own, after niah/kamradt",
        revision="1",
        licence="Apache-2.0",
    )
)
