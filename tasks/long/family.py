"""A long task: lines in the prompt, a step for each in the answer, numbered down to 1 and closed by `0. END`.

The answer's first steps are given, so that what a line looks like needs no guess: SmolLM2-135M does none of this by
instruction alone. Numbers go down because upwards it never comes to an end. As many lines as fill a length are shown;
where an answer to all of them would be longer than `LONGEST` tokens, it begins at a later line.

A length includes the prompt and the tokens to generate, as RULER counts; of those there are `ROOM` times as many as the
right answer takes, so that an answer can be seen to be too long. Every prompt is a context of its own, made of words
alone: there is no text of the pool in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tasks.base import About, Sample, Task, TaskError, TaskOptions, Tokenizer, rng
from tasks.long.kinds import Kind
from tasks.long.steps import step_metrics

SAMPLES = 30  # of each length when no limit is given
GIVEN = 6  # steps that the answer prefix has
SHORTEST, LONGEST = 256, 1024  # tokens of a right answer
ROOM = 1.75  # tokens to generate, by those of a right answer
START = 1  # tokens left for a beginning of text
STEP = 64  # the smallest length that works is searched in these steps


@dataclass(frozen=True)
class Fitted:
    """A prompt. tokens: of prompt and generation. wanted: of the right answer. steps: that are asked for."""

    context: str
    question: str
    prefix: str
    answer: str
    tokens: int
    wanted: int
    steps: int

    @property
    def generation(self) -> int:
        return int(ROOM * self.wanted)


class LongTask(Task):
    """One kind of work. Ids are `{length}/{index}`."""

    protocol = "long"

    def __init__(self, kind: Kind) -> None:
        self.name, self.kind = f"long/{kind.name}", kind
        self.about = About("own", "1", "Apache-2.0", "steps right until the first error", SAMPLES)

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Yield `limit` samples a length. Raises TaskError for a length that is too small or exceeds `max_tokens`."""
        lengths = tuple(dict.fromkeys(options.lengths))
        for length in lengths:
            self._check(length, options)
        count = SAMPLES if options.limit is None else options.limit
        return (self._sample(length, index, options) for length in lengths for index in range(count))

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return step_metrics(prediction, sample.answers[0])

    def _check(self, length: int, options: TaskOptions) -> None:
        self.check_length(length, options)
        least = length
        while self._fit(least, 0, options).wanted < SHORTEST:
            least += STEP
        if least > length:
            raise TaskError(
                f"{self.name}: {length} tokens leave no room for an answer of {SHORTEST}; ask for at least {least}"
            )

    def _sample(self, length: int, index: int, options: TaskOptions) -> Sample:
        made = self._fit(length, index, options)
        return Sample(
            id=f"{length}/{index}",
            context=made.context,
            question=made.question,
            answers=(made.answer,),
            max_new_tokens=made.generation,
            answer_prefix=made.prefix,
            chat=False,
            stop=("\n\n",),
            meta={"length": length, "group": f"{self.name}/{length}/{index}", "steps": made.steps},
        )

    def _fit(self, length: int, index: int, options: TaskOptions) -> Fitted:
        """The prompt of most lines that fits."""
        least, most = GIVEN + 1, max(GIVEN + 2, length // 4)
        while most - least > 1:
            middle = (least + most) // 2
            fits = self._made(middle, length, index, options).tokens <= length
            least, most = (middle, most) if fits else (least, middle)
        return self._made(least, length, index, options)

    def _made(self, lines: int, length: int, index: int, options: TaskOptions) -> Fitted:
        work = self.kind.make(lines, rng(options.seed, self.name, length, index))
        rows = work.answer
        first, wanted = _first(rows, options.tokenizer)
        given = "\n".join([*rows[first - GIVEN : first], f"{lines - first}."])
        answer = "\n".join(rows[first:]).partition(".")[2]
        context, question = "\n".join([work.intro, *work.lines]), f"\n\n{work.title}\n"
        prompt = len(options.tokenizer.encode(context + question + given))
        tokens = prompt + START + int(ROOM * wanted)
        return Fitted(context, question, given, answer, tokens, wanted, lines - first)


def _first(rows: tuple[str, ...], tokenizer: Tokenizer) -> tuple[int, int]:
    """The first row that is asked for, and the tokens of the answer from there."""
    sizes = [len(tokenizer.encode(f"\n{row}")) for row in rows]
    first, total = len(rows) - 2, sum(sizes[-2:])
    while first > GIVEN and total + sizes[first - 1] <= LONGEST:
        first -= 1
        total += sizes[first]
    return first, total
