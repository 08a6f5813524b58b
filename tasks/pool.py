"""The pool that contexts are drawn from: a lane of it for each task, and in a lane a span for each sample.

The pool is three documents of four of `tasks.texts`, in the order of a hash of their names. It is cut into lanes by
characters, one for each task that `LANES` names, `graded` ones a third as long as the others, so no two tasks share a
sentence whatever a run asks for. A lane is a ring of sentences. Seed s enters it at (s mod `SEEDS`) / `SEEDS` of its
way and takes span after span: sample 0 of each length of the run, then sample 1, and so on. So a sample depends on its
task, index, seed, the run's lengths and the tokenizer alone. No sentence is taken twice: a lane that is spent refuses.

With SmolLM2's tokenizer the pool has 1,770,000 tokens (191 documents, 1,360,000 words), a lane 82,000: for a task of
RULER 83 contexts of 1k, 16 each of 1k and 4k, or 5 of 16k; a graded one 29 contexts of 1k. So there are four seeds
before text returns, for at most a quarter of a lane each (20 contexts of 1k); a seed that takes more goes on into the
text that the next one begins with, and seeds 0 and 4 share all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Any

from tasks.base import TaskError, TaskOptions
from tasks.texts import Document, documentation, essays, sha256, share_of

LANES = (
    *("niah/snapkv", "niah/kamradt", "niah/passkey"),
    *("ruler/niah_single_1", "ruler/niah_single_2", "ruler/niah_single_3", "ruler/niah_multikey_1"),
    *("ruler/niah_multivalue", "ruler/niah_multiquery", "ruler/vt", "multiquery/niah"),
    *("prose/continuation", "prose/long"),
    *("instructions/obey", "instructions/secret"),
    *("graded/retrieval_number", "graded/retrieval_owner", "graded/retrieval_digits", "graded/retrieval_label"),
    *("graded/keys_all", "graded/keys_owned", "graded/tracking_moves", "graded/tracking_hands"),
    *("graded/tracking_same", "graded/ordering_first", "graded/ordering_last", "graded/ordering_next"),
    *("graded/ordering_list", "graded/aggregation_most", "graded/aggregation_voters", "graded/aggregation_kinds"),
    *("graded/copying_words", "graded/copying_letters"),
    *("turns/facts", "turns/told"),
)
"""Every task that draws from the pool. A new one at the end changes what all draw: bump the digests of their tests."""
SEEDS = 4
WIDE, NARROW = 3, 1
"""Shares of the pool that a lane has: narrow ones are of `graded`, whose many tasks are read together, and `turns`."""
ENTRIES = 997
"""Places where calibration enters its text."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document, and its number there."""

    document: str
    number: int
    text: str


@dataclass(frozen=True)
class Span:
    """Sentences that one sample has for itself."""

    sentences: tuple[Sentence, ...]

    @property
    def group(self) -> str:
        """Where it begins, and every document it reaches into: `awsdocs-017:84+essays/love.txt`."""
        first = self.sentences[0]
        names = list(dict.fromkeys(sentence.document for sentence in self.sentences))
        return "+".join([f"{first.document}:{first.number}", *names[1:]])

    @cached_property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)

    @cached_property
    def words(self) -> int:
        return len(self.text.split())

    def head(self, words: int) -> list[str]:
        """Return the first `words` words as sentences, the last one cut."""
        taken: list[str] = []
        for sentence in self.sentences:
            own = sentence.text.split()
            if words <= 0:
                break
            taken.append(" ".join(own[:words]))
            words -= len(own)
        return taken


class Spans:
    """The spans of one task in a run.

    sentences: the lane, from where the seed enters it. needs: tokens of a span for each length of the run, in its
    order. count: the tokens of a sentence where it stands. whole: a span stays within one document.
    """

    def __init__(
        self,
        task: str,
        sentences: Sequence[Sentence],
        needs: Mapping[int, int],
        count: Callable[[str], int],
        *,
        whole: bool = False,
    ) -> None:
        self.task, self.needs, self.whole = task, dict(needs), whole
        self._sentences = sentences
        self._count = cache(count)
        self._made: list[dict[int, Span]] = []
        self._more = self._drawn()

    def at(self, length: int, index: int) -> Span:
        """Return the span of a sample. Raises TaskError when the lane is spent before it."""
        if not self.reaches(index):
            raise self._spent(index + 1)
        return self._made[index][length]

    def granted(self, wanted: int, *, most: bool = False) -> int:
        """Return how many samples of each length there are text for: `wanted`, or with `most` also fewer, but not 0.

        Raises TaskError when there are fewer.
        """
        if not wanted or self.reaches(wanted - 1):
            return wanted
        if most and self._made:
            return len(self._made)
        raise self._spent(wanted)

    def reaches(self, index: int) -> bool:
        """Whether there is text for that sample."""
        while len(self._made) <= index:
            row = next(self._more, None)
            if row is None:
                return False
            self._made.append(row)
        return True

    def _drawn(self) -> Iterator[dict[int, Span]]:
        """Yield one span of each length, as long as there are all of them."""
        rests = _by_document(self._sentences) if self.whole else [list(self._sentences)]
        while True:
            row: dict[int, Span] = {}
            for length, need in self.needs.items():
                span = _take(rests, need, self._count)
                if span is None:
                    return
                row[length] = span
            yield row

    def _spent(self, wanted: int) -> TaskError:
        has = sum(self._count(sentence.text) for sentence in self._sentences)
        within = ", each from one document" if self.whole else ""
        return TaskError(
            f"{self.task}: {wanted} samples of each length ask for {wanted * sum(self.needs.values())} tokens of "
            f"text{within}; its lane of the pool has {has}, enough for {len(self._made)}; ask for "
            "fewer samples (--limit), shorter lengths, or the fixed haystacks of --contexts protocol"
        )


def pool_spans(task: str, options: TaskOptions, needs: Mapping[int, int], *, whole: bool = False) -> Spans:
    """Return the spans of a task of `LANES`, or of calibration's text: all of it, entered where the task's name says.

    Raises TaskError when an asset is missing.
    """
    pool = read_pool(options)
    if options.calibrates:
        lane = _begun(_between(pool, 0, 1, 1), share_of(f"enter/{task}", ENTRIES), ENTRIES)
    else:
        lane = entered(_lane(pool, task), options.seed)
    return Spans(task, lane, needs, lambda text: len(options.tokenizer.encode(f" {text}")), whole=whole)


def pool_facts(task: str, options: TaskOptions) -> dict[str, Any]:
    """Return what a record says of the text that a task draws from the pool."""
    pool = read_pool(options)
    return {
        "contexts": "drawn, a span of the pool for each sample",
        "pool": f"{len(pool)} documents: Paul Graham essays, AWS documentation; calibration's apart",
        "pool_sha256": sha256("\0".join(document.text for document in pool)),
        "pool_lane": f"{LANES.index(task) + 1} of {len(LANES)}",
        "pool_entry": f"{options.seed % SEEDS} of {SEEDS}",
    }


def entered(sentences: Sequence[Sentence], seed: int) -> list[Sentence]:
    """Return a lane from where a seed enters it, round."""
    return _begun(sentences, seed % SEEDS, SEEDS)


def read_pool(options: TaskOptions) -> tuple[Document, ...]:
    """Return the documents that are drawn from, in the order of hashes. Raises TaskError for missing files."""
    found = (*documentation(options.asset("awsdocs")), *essays(options))
    return tuple(
        sorted(
            (one for one in found if one.calibrates == options.calibrates), key=lambda one: sha256(f"order/{one.name}")
        )
    )


def _begun(sentences: Sequence[Sentence], part: int, parts: int) -> list[Sentence]:
    """The sentences from a part of their characters on, round."""
    sums = list(accumulate(len(sentence.text) for sentence in sentences))
    first = next(at for at, total in enumerate(sums) if total > sums[-1] * part // parts)
    return [*sentences[first:], *sentences[:first]]


def _lane(pool: Sequence[Document], task: str) -> list[Sentence]:
    """The sentences that begin in a task's lane."""
    shares = [NARROW if name.startswith(("graded/", "turns/")) else WIDE for name in LANES]
    before = sum(shares[: LANES.index(task)])
    return _between(pool, before, before + shares[LANES.index(task)], sum(shares))


def _between(pool: Sequence[Document], first: int, last: int, parts: int) -> list[Sentence]:
    """The sentences that begin between two of so many equal parts of the pool."""
    ends = list(accumulate(len(document.text) for document in pool))
    low, high = (ends[-1] * at // parts for at in (first, last))
    found = []
    for document, end in zip(pool, ends, strict=True):
        before = end - len(document.text)
        if before < high and end > low:
            for number, (start, stop) in enumerate(_borders(document)):
                if low <= before + start < high:
                    found.append(Sentence(document.name, number, document.text[start:stop]))
    return found


@lru_cache(maxsize=512)
def _borders(document: Document) -> tuple[tuple[int, int], ...]:
    """Where sentences begin and end; one that begins inside a word, as in `good.[2]`, goes on with the one before."""
    import punkt  # of tasks with such a pool alone

    text = document.text
    spans = punkt.tokenizer_for("english").span_tokenize(text)
    starts = [start for start, _ in spans if not start or text[start - 1] == " "]
    return tuple(zip(starts, (*(start - 1 for start in starts[1:]), len(text)), strict=True))


def _by_document(sentences: Sequence[Sentence]) -> list[list[Sentence]]:
    """Unbroken runs of one document, in order."""
    runs: list[list[Sentence]] = []
    for sentence in sentences:
        last = runs[-1][-1] if runs else None
        if last and (last.document, last.number + 1) == (sentence.document, sentence.number):
            runs[-1].append(sentence)
        else:
            runs.append([sentence])
    return runs


def _take(rests: Sequence[list[Sentence]], need: int, tokens: Callable[[str], int]) -> Span | None:
    """The first sentences of at least `need` tokens of the first rest that has them, taken from it."""
    for rest in rests:
        total = 0
        for count, sentence in enumerate(rest, start=1):
            total += tokens(sentence.text)
            if total >= need:
                span = Span(tuple(rest[:count]))
                del rest[:count]
                return span
    return None
