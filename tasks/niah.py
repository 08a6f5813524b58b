"""Needle in a haystack: one sentence hidden in essays at ten depths, in three layouts.

`niah/snapkv`: the grid of the SnapKV and PyramidKV papers, from Zefan-Cai/KVCache-Factory@c97f9d7,
run_needle_in_haystack.py. Its prompt begins with a literal `<|im_start|>`, which is a control token of one model
family; it is left out, and the rest is a raw prompt. `niah/kamradt`: gkamradt/LLMTest_NeedleInAHaystack
(needlehaystack 0.1.0); its system and two user messages are one user message here, its GPT judge is keyword recall
here, and 50 tokens are generated, not 300. `niah/passkey`: a seven-digit number instead of the classic needle, of our
own, which small models can find.

Common differences: the ten depths of the SnapKV grid everywhere; prompt and generation together fill the length
exactly instead of leaving a buffer of 200 tokens; haystack 0 begins with the first essay, as in the sources, the
others at a seeded sentence; the sentence end before the insertion point is looked for in the text and not by token
number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tasks.base import Sample, Task, TaskError, TaskOptions, Tokenizer, rng, task
from tasks.essays import Essays, read_essays
from tasks.scoring import keyword_recall, rouge_1, string_match_all

DEPTHS = (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
"""Percent of the haystack's tokens before the needle."""
HAYSTACKS = 5
"""Haystacks of each cell of the grid when no limit is given."""
LEAST_HAYSTACK = 100
"""Tokens of the shortest haystack that is still one."""
SLACK = 8
"""Tokens by which a drawn number, a beginning-of-text token or a joint may differ from the estimate."""

NEEDLE = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."
MAGIC = "\nThe special magic number is: {number}.\n"


@dataclass(frozen=True)
class Layout:
    """A prompt around the haystack: `before`, haystack, `after`, then what is asked."""

    before: str
    after: str
    question: str
    answer_prefix: str
    chat: bool
    generation: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planted:
    """A needle as inserted, and the answers it holds."""

    needle: str
    answers: tuple[str, ...]


class NeedleTask(Task):
    """One layout over lengths x depths x haystacks. Ids are `{length}/depth{percent}/{haystack}`."""

    def __init__(self, name: str, *, layout: Layout, deviations: Sequence[str], source: str) -> None:
        self.name = f"niah/{name}"
        self.protocol = name
        self.layout = layout
        self._notes = {"source": source, "deviations": [*deviations]}

    def plant(self, draw: Random) -> Planted:
        """The needle of one sample."""
        return Planted(needle=NEEDLE, answers=(ANSWER,))

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """`limit` samples a length, default ten depths x 5 haystacks; every ten in a row cover all depths once.

        A smaller limit draws a prefix. Raises TaskError, before the first sample, when there are no essays or a length
        is too small or exceeds `max_tokens`.
        """
        essays = read_essays(options)
        lengths = tuple(dict.fromkeys(options.lengths))
        for length in lengths:
            self._check(length, options)
        starts = _starts(essays, options.seed)
        return (sample for length in lengths for sample in self._cells(essays, starts, length, options))

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        recall = keyword_recall(prediction, sample.answers[0])
        return {"score": recall, "rouge1": rouge_1(prediction, sample.meta["needles"][0])}

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        return {**self._notes, **read_essays(options).provenance()}

    def _cells(self, essays: Essays, starts: Sequence[int], length: int, options: TaskOptions) -> Iterator[Sample]:
        wanted = len(DEPTHS) * HAYSTACKS if options.limit is None else options.limit
        for haystack in range(-(-wanted // len(DEPTHS))):
            ids = _fill(essays.text, starts[haystack % len(starts)], length, options.tokenizer)
            depths = list(DEPTHS)
            rng(options.seed, self.name, length, haystack).shuffle(depths)
            for depth in depths[: wanted - haystack * len(DEPTHS)]:
                name = f"{length}/depth{depth}/{haystack}"
                meta = {"length": length, "depth": depth, "haystack": haystack}
                yield self._sample(name, ids, meta=meta, options=options)

    def _sample(self, name: str, ids: list[int], *, meta: Mapping[str, int], options: TaskOptions) -> Sample:
        layout, tokenizer = self.layout, options.tokenizer
        planted = self.plant(rng(options.seed, self.name, name))
        room = self._room(meta["length"], tokenizer)
        size = room - self._around(planted, tokenizer)
        while True:
            text = hide(planted.needle, ids[:size], meta["depth"], tokenizer)
            context = f"{layout.before}{text}{layout.after}"
            over = self._tokens(context, tokenizer) - room
            if over <= 0:
                break
            size -= over
        tokens = room + over + (tokenizer.template_tokens if layout.chat else 0)
        return Sample(
            id=name,
            context=context,
            question=layout.question,
            answers=planted.answers,
            max_new_tokens=layout.generation,
            answer_prefix=layout.answer_prefix,
            chat=layout.chat,
            stop=layout.stop,
            meta={**meta, "needles": [planted.needle.strip()], "prompt_tokens": tokens},
        )

    def _room(self, length: int, tokenizer: Tokenizer) -> int:
        """Tokens that the prompt may have; a raw prompt keeps one for a beginning-of-text token."""
        return length - self.layout.generation - (tokenizer.template_tokens if self.layout.chat else 1)

    def _tokens(self, context: str, tokenizer: Tokenizer) -> int:
        message = len(tokenizer.encode(context + self.layout.question))
        return message + len(tokenizer.encode(self.layout.answer_prefix))

    def _around(self, planted: Planted, tokenizer: Tokenizer) -> int:
        """Tokens of the prompt without its haystack."""
        return self._tokens(self.layout.before + planted.needle + self.layout.after, tokenizer)

    def _check(self, length: int, options: TaskOptions) -> None:
        if length > options.max_tokens:
            raise TaskError(
                f"{self.name}: length {length} exceeds the {options.max_tokens} tokens of the run; lower it"
            )
        planted = self.plant(rng(options.seed, self.name, length))
        size = self._room(length, options.tokenizer) - self._around(planted, options.tokenizer)
        missing = LEAST_HAYSTACK + SLACK - size
        if missing > 0:
            raise TaskError(
                f"{self.name}: {length} tokens are too few; the smallest length that works is {length + missing}"
            )


class Passkey(NeedleTask):
    """A seven-digit number as needle; the score is whether the prediction holds it."""

    def plant(self, draw: Random) -> Planted:
        number = str(draw.randint(1_000_000, 9_999_999))
        return Planted(needle=MAGIC.format(number=number), answers=(number,))

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": string_match_all(prediction, sample.answers)}


def hide(needle: str, ids: Sequence[int], depth: int, tokenizer: Tokenizer) -> str:
    """The text of `ids` with the needle at `depth` percent of its tokens, moved back to the end of a sentence.

    Depth 100 appends the needle. With no full stop before the place it comes first.
    """
    text = tokenizer.decode(ids)
    if depth == 100:
        return text + needle
    before = len(tokenizer.decode(ids[: int(len(ids) * (depth / 100))]))
    place = text.rfind(".", 0, before) + 1
    return text[:place] + needle + text[place:]


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


SNAPKV = Layout(
    before="This is a very long story book: <book> ",
    after=" </book>.\n",
    question=" Based on the content of the book, Question: The best thing to do in San Francisco is: ",
    answer_prefix="\nAnswer:",
    chat=False,
    generation=30,
    stop=("\n",),
)
KAMRADT = Layout(
    before="You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n\n",
    after="\n\n",
    question="What is the best thing to do in San Francisco? "
    "Don't give information outside the document or repeat your findings",
    answer_prefix="",
    chat=True,
    generation=50,
)
PASSKEY = Layout(
    before="A special magic number is hidden within the following text. Make sure to memorize it.\n",
    after="\n",
    question="What is the special magic number mentioned in the provided text?",
    answer_prefix=" The special magic number mentioned in the provided text is",
    chat=True,
    generation=16,
)
COMMON = ("no buffer of 200 tokens", "haystacks after the first begin at a seeded sentence")

task(
    NeedleTask(
        "snapkv",
        layout=SNAPKV,
        deviations=(*COMMON, "the literal <|im_start|> before the prompt is left out"),
        source="Zefan-Cai/KVCache-Factory@c97f9d7 run_needle_in_haystack.py",
    )
)
task(
    NeedleTask(
        "kamradt",
        layout=KAMRADT,
        deviations=(
            *COMMON,
            "ten depths",
            "one user message",
            "keyword recall instead of a GPT judge",
            "50 tokens, not 300",
        ),
        source="gkamradt/LLMTest_NeedleInAHaystack, needlehaystack 0.1.0",
    )
)
task(
    Passkey("passkey", layout=PASSKEY, deviations=(*COMMON, "own needle and wording"), source="own, after niah/kamradt")
)
