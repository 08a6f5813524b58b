"""Calibration prompts: families of questions over a corpus, worded unlike any evaluation task of this program.

    continuation  raw prose and what follows it
    copy          the rest of one sentence, of which the first words are given
    needle        one invented fact hidden in the prose
    multikey      three to five facts of one form, one of them asked for
    tracking      a value handed on from one owner to the next, and one that has nothing to do with it
    repeated      as tracking and multikey in turn, in a passage of the corpus that is said over and over
    records       lines of one form, as of a log, a table or a list; the number of one of them is asked for

The last two are of text that says much the same again and again, which fools attention over the whole prompt; they are
made when they are asked for (`harness compile --families`).

The content of a sample depends on the seed, the corpus' checksum, its family, its index, the lengths and the tokenizer
alone. Sample n (5 x index + the family's place in `FAMILIES`) begins at `tasks.base.point(n)` of the text, or some
sentences later where none fits there; the last two families have points of their own. So the first n spans do not
overlap while the corpus is longer than n, rounded up to a power of two, times the longest span (prompt, continuation, a
few sentences). Beyond that they do: text returns under other questions, depths and lengths. A span that reaches the end
of the corpus goes on at its beginning.

Lengths and depths are points of Roberts' R2 sequence, not of `point`: in two dimensions any first n are spread evenly,
where two sequences of base 2 would tie the depth to the length and to the place in the corpus.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, cycle, islice, pairwise
from math import ceil
from random import Random
from typing import Any

from harness.compiler.corpora import Corpus
from harness.compiler.wordings import ASIDES, COLOURS, COPIES, FACTS, INTROS, LEDGERS, PLACES, TRAILS, invented
from harness.errors import HarnessError, shown
from tasks.base import Sample, Tokenizer, point, rng

FAMILIES = ("continuation", "copy", "needle", "multikey", "tracking")
ALIKE = ("repeated", "records")
"""Of text that says much the same again and again."""
CONTINUATION = 64
"""Tokens of a continuation at most."""
COPY_WORDS = range(8, 31)
ATTEMPTS = 64  # places tried for one sample, a sentence apart
LEAST_FILL = 0.95
"""Share of its drawn length that a prompt has at least."""
LEAST_SENTENCES = 6
LENGTH_STEP = 0.7548776662466927  # 1/g and 1/g^2, where g^3 = g + 1
DEPTH_STEP = 0.5698402909980532


@dataclass(frozen=True)
class PromptPlan:
    """Where one sample stands. length: tokens of its prompt at most. depth: in [0, 1], of what is asked for."""

    family: str
    index: int
    seed: int
    corpus: Corpus
    length: int
    depth: float

    def draws(self) -> Random:
        """Return the generator of everything drawn for this sample, from its start."""
        return rng(self.seed, self.corpus.sha256, self.family, self.index)


def calibration_samples(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    count: int,
    seed: int,
    lengths: tuple[int, int] = (600, 1000),
    families: Sequence[str] = FAMILIES,
) -> list[Sample]:
    """Return `count` prompts with their answers, families in turn; a smaller count gives the first ones of a larger.

    lengths: least and most tokens of a prompt, chat template included. A prompt ends with a whole sentence, so it has
    between `LEAST_FILL` of its drawn length and all of it; where least and most are closer than that, it may have
    fewer than the least. Ids are `{corpus}/{family}/{index}`. Meta: family, corpus, length (the drawn one), depth in
    percent and needles where something is asked for. Raises HarnessError for lengths that the corpus has no prompt of.
    """
    turns = ((families[n % len(families)], n // len(families)) for n in range(count))
    return [_sample(_plan(corpus, *turn, seed=seed, lengths=lengths), tokenizer) for turn in turns]


def _plan(corpus: Corpus, family: str, index: int, *, seed: int, lengths: tuple[int, int]) -> PromptPlan:
    shifts = rng(seed, corpus.sha256, family, "shifts")
    size = (shifts.random() + index * LENGTH_STEP) % 1.0
    depth = (shifts.random() + index * DEPTH_STEP) % 1.0
    least = min(lengths[1], ceil(lengths[0] / LEAST_FILL))
    return PromptPlan(family, index, seed, corpus, least + int(size * (lengths[1] - least + 1)), depth)


def _sample(plan: PromptPlan, tokenizer: Tokenizer) -> Sample:
    """The sample with as many sentences as fit, from the first place that serves."""
    own = FAMILIES if plan.family in FAMILIES else ALIKE
    number = plan.index * len(own) + own.index(plan.family)
    place = point(number, plan.seed, plan.corpus.sha256, "place" if own is FAMILIES else "place alike")
    for attempt in range(ATTEMPTS):
        pieces, most = _window(plan, tokenizer, place=place, skip=attempt)
        if found := _longest(plan, pieces, most, tokenizer):
            return found
    raise HarnessError(
        f"corpus {shown(plan.corpus.name)}: no {plan.family} prompt of {plan.length} tokens can be made of whole "
        f"sentences, {LEAST_SENTENCES} at least; ask for longer prompts, or take another corpus"
    )


def _longest(plan: PromptPlan, pieces: Sequence[str], most: int, tokenizer: Tokenizer) -> Sample | None:
    """The sample with the most of these sentences that fits, or None when it is too short or cannot be made."""
    for size in range(most, LEAST_SENTENCES - 1, -1):
        found = BUILDERS[plan.family](plan, pieces, size, tokenizer)
        if found is None:
            return None
        tokens = _tokens(found, tokenizer)
        if tokens <= plan.length:
            return found if tokens >= LEAST_FILL * plan.length else None
    return None


def _tokens(sample: Sample, tokenizer: Tokenizer) -> int:
    """Tokens of a sample's prompt at most."""
    text = sample.context + sample.question + sample.answer_prefix
    around = max(1, tokenizer.template_tokens if sample.chat else 0)  # raw text may get a beginning-of-text token
    return around + len(tokenizer.encode(text))


def _window(plan: PromptPlan, tokenizer: Tokenizer, *, place: float, skip: int) -> tuple[list[str], int]:
    """Sentences with the white space before them, and how many of them alone have at most the plan's length.

    The others, at least one and a half continuations of tokens, are what a continuation is taken from.
    """
    pieces: list[str] = []
    total, most = 0, 0
    for piece in islice(plan.corpus.sentences_from(place), skip, None):
        pieces.append(piece)
        total += len(tokenizer.encode(piece))
        most += total <= plan.length
        if total > plan.length + 1.5 * CONTINUATION:
            return pieces, most
    raise HarnessError(
        f"corpus {shown(plan.corpus.name)} has about {total} tokens, a prompt of {plan.length} and what follows it "
        "need more; give it more text, or ask for shorter prompts"
    )


def _finish(
    plan: PromptPlan, tokenizer: Tokenizer, *, context: str, answer: str, needles: Sequence[str] = (), **said: Any
) -> Sample:
    meta: dict[str, Any] = {"family": plan.family, "corpus": plan.corpus.name, "length": plan.length}
    if needles:
        meta |= {"depth": round(100 * context.index(needles[0]) / len(context)), "needles": [*needles]}
    name, room = f"{plan.corpus.name}/{plan.family}/{plan.index}", len(tokenizer.encode(answer)) + 1
    return Sample(name, context, answers=(answer,), max_new_tokens=room, meta=meta, **said)


def _continuation(plan: PromptPlan, pieces: Sequence[str], size: int, tokenizer: Tokenizer) -> Sample | None:
    asked = plan.draws().randint(2, 3)
    answer = "".join(pieces[size:])
    while len(tokenizer.encode(answer)) > CONTINUATION:
        answer = answer.rpartition(" ")[0]
    if not answer.strip():
        return None
    context, question = "".join(pieces[: size - asked]).lstrip(), "".join(pieces[size - asked : size])
    return _finish(plan, tokenizer, context=context, question=question, answer=answer, chat=False)


def _copy(plan: PromptPlan, pieces: Sequence[str], size: int, tokenizer: Tokenizer) -> Sample | None:
    draws = plan.draws()
    (question, prefix), opening_words = draws.choice(COPIES), draws.randint(4, 6)
    text = "".join(pieces[:size]).strip()
    starts = [0, *accumulate(map(len, pieces[:size]))]
    for at in sorted(range(size), key=lambda i: abs(starts[i] - plan.depth * starts[-1])):
        sentence = pieces[at].strip()
        words = sentence.split(" ")
        opening = " ".join(words[:opening_words])
        if len(words) in COPY_WORDS and text.count(opening) == 1:
            break
    else:
        return None
    return _finish(
        plan,
        tokenizer,
        context=draws.choice(INTROS) + text,
        question="\n\n" + question.format(opening=opening),
        answer_prefix=prefix.format(opening=opening),
        answer=" ".join(words[opening_words:]),
        needles=[sentence],
    )


def _facts(plan: PromptPlan, pieces: Sequence[str], size: int, tokenizer: Tokenizer) -> Sample:
    """The first fact is asked for, at the plan's depth; the others are anywhere."""
    count = 1 if plan.family == "needle" else plan.draws().randint(3, 5)
    draws, pieces = plan.draws(), pieces[:size]
    fact = draws.choice(FACTS)
    keys, values = draws.sample(fact.owners, count), _values(fact.words, count, draws=draws, prose=pieces)
    told = [fact.says.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    depths = [plan.depth, *(draws.random() for _ in told[1:])]
    return _finish(
        plan,
        tokenizer,
        context=draws.choice(INTROS) + _hide(pieces, sorted(zip(depths, told, strict=True))),
        question="\n\n" + draws.choice(ASIDES) + fact.question.format(key=keys[0]),
        answer_prefix=fact.prefix.format(key=keys[0]),
        answer=values[0],
        needles=told[:1],
    )


def _tracking(plan: PromptPlan, pieces: Sequence[str], size: int, tokenizer: Tokenizer) -> Sample:
    """One to three hand-overs after the first owner, who is named in the first three quarters of the prose."""
    draws, pieces = plan.draws(), pieces[:size]
    trail, hops = draws.choice(TRAILS), draws.randint(1, 3)
    *keys, other = draws.sample(trail.owners, hops + 2)
    value, decoy = _values(trail.words, 2, draws=draws, prose=pieces)
    chain = [trail.says.format(key=keys[0], value=value)]
    chain += [trail.passes.format(key=key, source=source) for source, key in pairwise(keys)]
    first = 0.75 * plan.depth
    depths = sorted([first, *(draws.uniform(first, 1.0) for _ in range(hops))])
    told = [*zip(depths, chain, strict=True), (draws.random(), trail.says.format(key=other, value=decoy))]
    return _finish(
        plan,
        tokenizer,
        context=draws.choice(INTROS) + _hide(pieces, sorted(told, key=lambda item: item[0])),
        question="\n\n" + draws.choice(ASIDES) + trail.question.format(key=keys[-1]),
        answer_prefix=trail.prefix.format(key=keys[-1]),
        answer=value,
        needles=chain,
    )


def _repeated(plan: PromptPlan, pieces: Sequence[str], size: int, tokenizer: Tokenizer) -> Sample:
    """As many sentences as are asked for, the first two to four again and again, and a trail or facts among them."""
    passage = [f" {piece.strip()}" for piece in pieces[: 2 + plan.index // 2 % 3]]
    told = _tracking if plan.index % 2 else _facts
    return told(plan, [*islice(cycle(passage), size)], size, tokenizer)


def _records(plan: PromptPlan, pieces: Sequence[str], size: int, tokenizer: Tokenizer) -> Sample | None:
    """As many lines as fit behind an opening that leaves little room; there is nothing of the corpus in them."""
    draws = plan.draws()
    ledger, lines = draws.choice(LEDGERS), list[tuple[str, str, str]]()
    least = 10 ** draws.randint(2, 5)
    while len(lines) < plan.length // 6:  # no line has fewer tokens
        key, value = invented(draws).capitalize(), str(draws.randrange(least, 10 * least))
        drawn = {"colour": draws.choice(COLOURS), "place": draws.choice(PLACES)}
        clock = f"{draws.randrange(24):02}:{draws.randrange(60):02}"
        if all(key != other for other, *_ in lines):
            lines.append((key, value, ledger.says.format(key=key, value=value, clock=clock, **drawn)))

    def made(intro: str, count: int) -> Sample:
        key, value, line = lines[min(count - 1, int(plan.depth * count))]
        context, prefix = intro + "\n".join(line for *_, line in lines[:count]), ledger.prefix.format(key=key)
        said = {"question": "\n\n" + ledger.question.format(key=key), "answer_prefix": prefix}
        return _finish(plan, tokenizer, context=context, answer=value, needles=[line], **said)

    def tokens(count: int, intro: str) -> int:
        return _tokens(made(intro, count), tokenizer)

    for intro in draws.sample(INTROS, len(INTROS)):
        most = bisect_right(range(1, len(lines) + 1), plan.length, key=partial(tokens, intro=intro))
        if most and tokens(most, intro) >= LEAST_FILL * plan.length:
            return made(intro, most)
    return None


def _values(words: bool, count: int, *, draws: Random, prose: Sequence[str]) -> list[str]:
    """Different invented words, or numbers of as many digits, that the prose does not have."""
    text, digits, found = "".join(prose).casefold(), draws.randint(3, 6), dict[str, None]()
    while len(found) < count:
        value = invented(draws) if words else str(draws.randrange(10 ** (digits - 1), 10**digits))
        if value not in text:
            found[value] = None
    return list(found)


def _hide(pieces: Sequence[str], told: Sequence[tuple[float, str]]) -> str:
    """The prose with sentences between its own, each at the nearest gap to its depth, in the order given."""
    pieces = [f" {pieces[0].lstrip()}", *pieces[1:]]
    borders = [0, *accumulate(map(len, pieces))]
    hidden = [""] * len(borders)
    for depth, sentence in told:
        gap = min(range(len(borders)), key=lambda i: abs(borders[i] - depth * borders[-1]))
        hidden[gap] += f" {sentence}"
    return "".join(chain.from_iterable(zip(hidden, (*pieces, ""), strict=True))).strip()


BUILDERS: dict[str, Callable[[PromptPlan, Sequence[str], int, Tokenizer], Sample | None]] = {
    "continuation": _continuation,
    "copy": _copy,
    "needle": _facts,
    "multikey": _facts,
    "tracking": _tracking,
    "repeated": _repeated,
    "records": _records,
}
