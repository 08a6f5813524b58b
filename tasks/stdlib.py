"""Tasks of LongBench's kind made offline from the running interpreter's own standard library. They are not LongBench.

    stdlib/next_line            the line that follows a window of source code (LongBench's lcc is of this kind)
    stdlib/passage_retrieval    the number of the documentation paragraph that a sentence was taken from

Prompt, generation and chat template have at most the length in tokens, as nearly as whole lines and paragraphs allow.
With drawn contexts a lane of lines, and one of paragraphs, is shared out as `tasks.pool` does: each sample has its own,
and paragraphs that calibration takes (`harness.compiler.corpora`) are in none.

Sources differ between Python versions, so results compare within one; the record names it and the checksum of the text.
"""

import ast
import hashlib
import itertools
import platform
import re
import sys
import sysconfig
import tokenize
from abc import abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tasks import scoring
from tasks.base import About, Sample, Task, TaskError, TaskOptions, Tokenizer, rng, task
from tasks.pool import Sentence, Span, Spans, entered
from tasks.texts import share_of

SAMPLES = 50  # of each length, when no limit is given
SPARE = 128  # tokens that a text has beyond its length, where contexts are drawn
FILLED = 80  # percent of a length that such a prompt and its generation use at least
ATTEMPTS = 100  # draws for one sample before its length is given up

CODE_INTRO = "Please continue the following Python code with its next line.\n\n"
CODE_TAIL = 4  # lines that end the prompt as its question
MIN_LINE = 12  # characters of a line to predict, its indentation apart
MIN_BEFORE = 40  # lines of its own file before it
MIN_WINDOW = 10  # lines of context at least

PASSAGE_INTRO = "Here are numbered paragraphs from the documentation of Python.\n\n"
PASSAGE_QUESTION = "\n\nThis sentence is from one of the paragraphs:\n{}\n\nWhich paragraph is it from?\n"
PASSAGE_PREFIX = "The sentence is from Paragraph"
PARAGRAPH_CHARS = range(150, 801)
SENTENCE_WORDS = range(8, 31)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class Generated(Task):
    """A task that makes its samples, `SAMPLES` of each length, each from the seed, its length and its number alone."""

    protocol = "stdlib"
    max_new_tokens: int
    chat: bool
    metric: Callable[[str, str], float]

    @abstractmethod
    def corpus(self) -> Sequence[str]:
        """Return all text that samples are made from, in a fixed order."""

    @abstractmethod
    def attempt(self, length: int, draws: Random, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Return fields of one sample of at most `length` tokens, or None when this draw does not serve."""

    @abstractmethod
    def lane(self) -> list[Sentence]:
        """Return the pieces of text that samples take in turn where contexts are drawn."""

    @abstractmethod
    def within(self, span: Span, length: int, draws: Random, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Return fields of one sample over a text of its own, or None when that does not serve."""

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        if options.contexts == "drawn":
            yield from self._drawn(options)
            return
        for length in options.lengths:
            self.check_length(length, options)
            for number in range(SAMPLES if options.limit is None else options.limit):
                yield self._sample(length, number, options)

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return {"score": max(self.metric(prediction, answer) for answer in sample.answers)}

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        digest = hashlib.sha256("\0".join(self.corpus()).encode(errors="surrogatepass")).hexdigest()
        python = f"{platform.python_implementation()} {platform.python_version()}"
        said = {"source": "standard library", "python": python, "sha256": digest}
        return said | ({"contexts": "drawn, a text for each sample"} if options.contexts == "drawn" else {})

    def room(self, length: int, tokenizer: Tokenizer) -> int:
        """Return how many tokens the prompt may have; one is left for beginning-of-text without a chat template."""
        return length - self.max_new_tokens - max(1, tokenizer.template_tokens if self.chat else 0)

    def _drawn(self, options: TaskOptions) -> Iterator[Sample]:
        """Samples that have a text for themselves; one that does not serve is passed over."""
        for length in options.lengths:
            self.check_length(length, options)
        needs = {length: length + SPARE for length in options.lengths}
        encode = options.tokenizer.encode
        spans = Spans(self.name, entered(self.lane(), options.seed), needs, lambda text: len(encode(f"{text}\n")))
        count = spans.granted(SAMPLES if options.limit is None else options.limit, most=options.limit is None)
        for length in needs:
            made = 0
            for index in range(count) if options.limit is None else itertools.count():
                if made == count:
                    break
                if not spans.reaches(index):
                    advice = "ask for a longer one, fewer samples (--limit), or --contexts protocol"
                    raise TaskError(f"{self.name}: {made} of {count} samples fit a length of {length} tokens; {advice}")
                span, draws = spans.at(length, index), rng(options.seed, self.name, length, index)
                fields = self.within(span, length, draws, options.tokenizer)
                if fields is not None:
                    fields["meta"] |= {"group": span.group}
                    yield self._made(f"{length}/{made}", fields)
                    made += 1
            if not made:
                raise TaskError(f"{self.name}: nothing fits a length of {length} tokens; ask for a longer one")

    def _made(self, name: str, fields: dict[str, Any]) -> Sample:
        return Sample(id=name, max_new_tokens=self.max_new_tokens, chat=self.chat, **fields)

    def _sample(self, length: int, number: int, options: TaskOptions) -> Sample:
        draws = rng(options.seed, self.name, length, number)
        for _ in range(ATTEMPTS):
            fields = self.attempt(length, draws, options.tokenizer)
            if fields is not None:
                return self._made(f"{length}/{number}", fields)
        raise TaskError(f"{self.name}: nothing fits a length of {length} tokens; ask for a longer one")


class NextLine(Generated):
    """The next line of standard-library code, scored by the similarity of the first line of code that is generated."""

    name = "stdlib/next_line"
    about = About("Python's standard library", platform.python_version(), "PSF-2.0", "code_similarity", SAMPLES)
    max_new_tokens = 64
    chat = False
    metric = staticmethod(scoring.code_similarity)

    def reference(self, sample: Sample) -> str | None:
        """Return the line after its newline, which is not in the prompt: tokenizers join it with the indentation."""
        return f"\n{sample.answers[0]}"

    def corpus(self) -> Sequence[str]:
        return [source(path) for path in source_files()]

    def attempt(self, length: int, draws: Random, tokenizer: Tokenizer) -> dict[str, Any] | None:
        path = draws.choice(source_files())
        candidates = predictable_lines(path)
        if not candidates:
            return None
        at = draws.choice(candidates)
        lines, room = source(path).split("\n"), self.room(length, tokenizer)
        window = widest_window(
            lines[:at], path, draws=draws, fits=lambda text: len(tokenizer.encode(CODE_INTRO + text)) <= room
        )
        fields = None if window is None else self._asked(window, path, at, tokenizer)
        return fields and {**fields, "meta": {"length": length, **fields["meta"], "group": path.name}}

    def lane(self) -> list[Sentence]:
        """Every line, a file's after its name, files in the order of a hash."""
        order = sorted(source_files(), key=lambda path: share_of(path.name, 2**64))
        lines = ((path.name, number, text) for path in order for number, text in enumerate(_headed(path)))
        return [Sentence(name, number, text) for name, number, text in lines]

    def within(self, span: Span, length: int, draws: Random, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """The last line of the span that can be asked for, after as many of its lines as fit."""
        lines, room = [line.text for line in span.sentences], self.room(length, tokenizer)
        files = {path.name: path for path in source_files()}

        def fits(text: str) -> bool:
            return len(tokenizer.encode(CODE_INTRO + text)) <= room

        for last in range(len(lines) - 1, MIN_WINDOW, -1):
            line = span.sentences[last]
            path, at = files[line.document], line.number - 1  # the name of the file stands before its first line
            if at not in predictable_lines(path):
                continue
            count = bisect_left(range(1, last + 1), True, key=lambda n: not fits("\n".join(lines[last - n : last])))
            window = "\n".join(lines[last - count : last])
            used = len(tokenizer.encode(CODE_INTRO + window)) + length - room
            if count < MIN_WINDOW or used * 100 < FILLED * length:
                return None
            if fields := self._asked(window, path, at, tokenizer):
                return {**fields, "meta": {"length": length, **fields["meta"]}}
        return None

    def _asked(self, window: str, path: Path, at: int, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Fields of a sample that asks for line `at` of a file after a window that ends before it."""
        lines = source(path).split("\n")
        answer = lines[at].rstrip()
        if answer.strip() in window or len(tokenizer.encode(answer)) > self.max_new_tokens:
            return None
        tail = "\n".join(["", *lines[at - CODE_TAIL : at]])
        return {
            "context": CODE_INTRO + window.removesuffix(tail),
            "question": tail,
            "answers": (answer,),
            "meta": {"file": path.name, "line": at + 1},
        }


class PassageRetrieval(Generated):
    """The paragraph that a sentence is from, scored by the share of numbers that name it."""

    name = "stdlib/passage_retrieval"
    about = About("Python's help topics", platform.python_version(), "PSF-2.0", "retrieval", SAMPLES)
    max_new_tokens = 16
    chat = True
    metric = staticmethod(scoring.retrieval)

    def corpus(self) -> Sequence[str]:
        return paragraphs()

    def attempt(self, length: int, draws: Random, tokenizer: Tokenizer) -> dict[str, Any] | None:
        return self._asked(paragraphs(), length, draws, tokenizer)

    def lane(self) -> list[Sentence]:
        """Every paragraph that calibration leaves, in the order of a hash."""
        order = sorted(help_paragraphs(calibration=False), key=lambda text: share_of(text, 2**64))
        return [Sentence("help", number, text) for number, text in enumerate(order)]

    def within(self, span: Span, length: int, draws: Random, tokenizer: Tokenizer) -> dict[str, Any] | None:
        return self._asked([one.text for one in span.sentences], length, draws, tokenizer, spare=True)

    def _asked(
        self, texts: Sequence[str], length: int, draws: Random, tokenizer: Tokenizer, *, spare: bool = False
    ) -> dict[str, Any] | None:
        """Fields of a sample over some of these paragraphs. spare: all of them may be in it."""
        golds = [text for text in sorted(quotable()) if text in set(texts)]
        if not golds:
            return None
        gold = draws.choice(golds)
        question = PASSAGE_QUESTION.format(draws.choice(quotable()[gold]))
        others = [text for text in texts if text != gold]
        draws.shuffle(others)
        room = self.room(length, tokenizer)

        def left(chosen: Sequence[str]) -> int:
            return room - len(tokenizer.encode(PASSAGE_INTRO + numbered(chosen) + question + PASSAGE_PREFIX))

        chosen = fill(gold, others, left=left, cost=cache(lambda text: len(tokenizer.encode(text))))
        draws.shuffle(chosen)
        while left(chosen) < 0 and len(chosen) > 1:
            chosen.remove(next(text for text in chosen if text != gold))
        if len(chosen) < 2 or left(chosen) < 0:
            return None
        if len(chosen) > len(others) and not spare:
            raise TaskError(
                f"{self.name}: Python's documentation has fewer than {length} tokens; ask for a shorter length"
            )
        at = chosen.index(gold)
        return {
            "context": PASSAGE_INTRO + numbered(chosen),
            "question": question,
            "answers": (f"Paragraph {at + 1}",),
            "answer_prefix": PASSAGE_PREFIX,
            "stop": ("\n",),
            "meta": {"length": length, "paragraphs": len(chosen), "paragraph": at + 1}
            | {"group": hashlib.sha256(gold.encode()).hexdigest()[:12]},
        }

    def reference(self, sample: Sample) -> str | None:
        """Return what follows the answer prefix: the number alone."""
        return sample.answers[0].removeprefix("Paragraph")


@cache
def source_files() -> tuple[Path, ...]:
    """List top-level modules by name, without build data and site customisation. Raises TaskError without any."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(path for path in sorted(folder.glob("*.py")) if path.stem in sys.stdlib_module_names)
    if not files:
        raise TaskError(f"this Python has no standard-library sources in {folder}; use one that has, or another task")
    return files


@cache
def source(path: Path) -> str:
    """Return the text of a module, decoded as the interpreter would."""
    with tokenize.open(path) as file:
        return file.read()


def _headed(path: Path) -> list[str]:
    """The lines of a module after a comment with its name."""
    return [f"# {path.name}", *source(path).split("\n")]


@cache
def predictable_lines(path: Path) -> tuple[int, ...]:
    """Find lines worth predicting, by index: code of `MIN_LINE` characters after another line, no comment, no text.

    A line with a mark that the metric passes over (`#`, a backtick, `//`) could not score 1 and is left out.
    """
    lines = source(path).split("\n")
    strings = (node for node in ast.walk(ast.parse(source(path))) if isinstance(node, (ast.Constant, ast.JoinedStr)))
    inside = {at for node in strings for at in range(node.lineno, node.end_lineno or 0)}  # all but the opening line
    return tuple(
        at
        for at, line in enumerate(lines)
        if at >= MIN_BEFORE
        and at not in inside
        and lines[at - 1].strip()
        and len(line.strip()) >= MIN_LINE
        and not line.lstrip().startswith(('"', "'"))
        and not any(mark in line for mark in (*scoring.NOT_CODE, '"""', "'''"))
    )


def widest_window(before: Sequence[str], path: Path, *, draws: Random, fits: Callable[[str], bool]) -> str | None:
    """Return as many lines as fit, up to the one to predict; None when they are fewer than `MIN_WINDOW`.

    A file that is too short continues upwards into other files, in a drawn order, each under its name. Raises TaskError
    when the whole library fits.
    """
    lines = [f"# {path.name}", *before]
    others = [other for other in source_files() if other != path]
    draws.shuffle(others)

    def last(count: int) -> str:
        return "\n".join(lines[-count:])

    known, size = 0, 4 * MIN_WINDOW
    while True:
        while len(lines) < size and others:
            other = others.pop()
            lines = [f"# {other.name}", *source(other).split("\n"), *lines]
        if not fits(last(size)):
            break
        if len(lines) <= size and not others:
            raise TaskError(f"{NextLine.name}: the standard library is shorter than that; ask for a shorter length")
        known, size = size, 2 * size
    count = known + bisect_left(range(known + 1, size), True, key=lambda n: not fits(last(n)))
    return last(count) if count >= MIN_WINDOW else None


@cache
def paragraphs() -> tuple[str, ...]:
    """Return prose paragraphs of the interpreter's help topics, each once. Raises TaskError without help topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TaskError("this Python has no help topics (pydoc_data); use one that has, or another task") from None
    found: dict[str, None] = {}
    for _, topic in sorted(topics.items()):
        for block in re.split(r"\n\s*\n", topic):
            text = " ".join(block.split())
            prose = text[:1].isupper() and text.endswith(".") and "::" not in text and ">>>" not in text
            if prose and len(text) in PARAGRAPH_CHARS:
                found[text] = None
    return tuple(found)


def help_paragraphs(*, calibration: bool) -> tuple[str, ...]:
    """Return the half of `paragraphs` that is for calibration, or the other one, by a hash of each."""
    return tuple(text for text in paragraphs() if (share_of(text, 2) == 0) == calibration)


@cache
def quotable() -> Mapping[str, tuple[str, ...]]:
    """Return paragraphs of several sentences, with those of their sentences that are in no other paragraph."""
    sentences = {text: SENTENCE_END.split(text) for text in paragraphs()}
    everything = "\n".join(paragraphs())
    uses = Counter({sentence: everything.count(sentence) for parts in sentences.values() for sentence in parts})
    unique = {
        text: tuple(part for part in parts if uses[part] == 1 and len(part.split()) in SENTENCE_WORDS)
        for text, parts in sentences.items()
        if len(parts) > 1
    }
    return {text: parts for text, parts in unique.items() if parts}


def numbered(texts: Sequence[str]) -> str:
    """Return the paragraphs with their numbers, from 1 on, as a prompt shows them."""
    return "\n\n".join(f"Paragraph {number}: {text}" for number, text in enumerate(texts, start=1))


def fill(
    first: str, others: Sequence[str], *, left: Callable[[Sequence[str]], int], cost: Callable[[str], int]
) -> list[str]:
    """Return `first` and those of `others`, in their order, that there is room for.

    left: tokens that a choice leaves, exactly; cost: tokens of one text, about. The exact number is taken again after
    every pass, until a pass adds nothing.
    """
    chosen, rest, before = [first], list(others), 0
    label = cost("\n\nParagraph 999: ")
    while len(chosen) > before:
        before, space = len(chosen), left(chosen)
        passed: list[str] = []
        for text in rest:
            need = label + cost(text)
            (chosen if need <= space else passed).append(text)
            space -= need if need <= space else 0
        rest = passed
    return chosen


task(NextLine())
task(PassageRetrieval())
