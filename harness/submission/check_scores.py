"""Whether the numbers of a submitted record follow from its prediction: metrics, NLL, and what its tokens say."""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import NoReturn, cast

from harness.errors import shown
from harness.records.record import Record, RunManifest, by_turns
from tasks.base import Sample, Task

EXACT = 1e-9
ROUNDING = 1e-6
SCORED = 64 << 10
"""Characters of a prediction that is scored, of its references, and of each text in the sample's meta."""
WORK = 1 << 25
"""Characters of a prediction times those of the longest reference: metrics compare each with each."""
NEEDLES = 1 << 22
"""Likewise of a needle, against which ROUGE fills a table."""
SENTENCES = 1 << 18
"""Sentences of the one times those of the other, likewise."""
Decode = Callable[[Sequence[int]], str]


def no_score(record: Record) -> Iterator[str]:
    """Say what a record without a score should not have."""
    if record.metrics or record.prediction or any(x is not None for x in (record.nll, record.measured, record.relayed)):
        yield f"status {record.status} goes with no score and no measurement"


def score_problems(task: Task, record: Record) -> Iterator[str]:
    """Say what the stored metrics have against them; a record that its task cannot score again is refused too."""
    if too_long := _too_long(record):
        yield too_long
        return
    try:
        found = dict(task.score(cast(Sample, _Stored(record)), record.prediction))
    except NotRecorded as missing:
        yield f"cannot be recomputed: {task.name} scores with the sample's {missing}, which no record holds"
        return
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        told = shown(f"{type(error).__name__}: {error}", 120)
        yield f"cannot be recomputed: answers or meta are not what {task.name} scores with ({told})"
        return
    if found.keys() != record.metrics.keys():
        yield f"metrics {ascii(sorted(record.metrics))[:120]}, the task gives {sorted(found)}"
        return
    for name, value in found.items():
        if not abs(value - record.metrics[name]) <= EXACT:
            yield f"{name} is {value:.9g} for the stored prediction, the record says {record.metrics[name]:.9g}"


def _too_long(record: Record) -> str:
    """Why a record is not scored: metrics of long texts take minutes; empty where it is."""
    needles = record.meta.get("needles")
    hidden = [text for text in needles if isinstance(text, str)] if isinstance(needles, list) else []
    others = (*record.answers, *hidden)
    said, longest = len(record.prediction), max(map(len, others), default=0)
    stops = (record.prediction.count(".") + 1) * (max((text.count(".") for text in others), default=0) + 1)
    table = said * max(map(len, hidden), default=0)
    large = max(said, sum(map(len, others))) > SCORED or said * longest > WORK
    if large or table > NEEDLES or stops > SENTENCES:
        return (
            f"a prediction of {said:,} characters and references of {longest:,} are too long to score: at most "
            f"{SCORED:,} of each, {WORK:,} as their product, {NEEDLES:,} of a needle, {SENTENCES:,} pairs of sentences"
        )
    return ""


class NotRecorded(Exception):
    """A field of a sample that is in no record."""


class _Stored:
    """What a record holds of a sample; any other field raises NotRecorded."""

    def __init__(self, record: Record) -> None:
        self.id, self.answers, self.meta = record.sample_id, record.answers, record.meta

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecorded(name)


def likelihood_problems(record: Record, manifest: RunManifest) -> Iterator[str]:
    """Say what is wrong with a record's log-likelihood by itself."""
    mean, first, count, most = record.nll, record.nll_first, record.nll_tokens, manifest.spec.nll_tokens
    if count > most:
        yield f"NLL over {count} tokens, the spec allows {most}"
    elif (mean is None) != (count == 0) or (first is None) != (mean is None):
        yield f"NLL {mean}, first token {first} and {count} tokens do not go together"
    elif mean is not None and first is not None and first > mean * count * (1 + ROUNDING) + ROUNDING:
        yield f"the first token's NLL {first:g} is more than all {count} together, {mean * count:g}"


def token_problems(record: Record, decode: Decode) -> Iterator[str]:
    """Say where the stored tokens do not say what the prediction says."""
    turns = by_turns(record.token_ids, record.turn_tokens)
    try:
        texts = [decode(ids) for ids in turns]
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        yield f"the tokens cannot be decoded ({type(error).__name__})"
        return
    said = record.prediction.split("\n") if record.turn_tokens else [record.prediction]
    for text, own in zip_longest(texts, said, fillvalue=""):
        if not text.startswith(own):  # a stop string ends it earlier
            yield f"the tokens say {ascii(text)[:60]}, the prediction is {ascii(own)[:60]}"
            return
