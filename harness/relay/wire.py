"""What sender and receiver say to each other, a line of JSON each; behind a request stand as many bytes as it says."""

from collections.abc import Callable, Sequence

from harness.engine.types import Limits, Outcome, Prompt
from harness.records.spec import Frozen, MethodSpec


class Question(Frozen):
    """What is asked of a cache: tokens that follow the context, the reference, and when the answer ends."""

    ids: tuple[int, ...]
    answer: tuple[int, ...] = ()
    needle: tuple[int, ...] = ()
    max_new_tokens: int
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, prompt: Prompt, border: int) -> "Question":
        """What a prompt asks after `border` tokens of context."""
        limits = prompt.limits
        return cls(
            ids=tuple(prompt.ids[border:]),
            answer=tuple(prompt.answer),
            needle=tuple(prompt.needle),
            max_new_tokens=limits.max_new_tokens,
            min_new_tokens=limits.min_new_tokens,
            eos_ids=tuple(sorted(limits.eos_ids)),
            stop=limits.stop,
        )

    def prompt(self, text: Callable[[Sequence[int]], str]) -> Prompt:
        """The question as a prompt without context. text: token ids to text."""
        limits = Limits(self.max_new_tokens, frozenset(self.eos_ids), self.min_new_tokens, self.stop, text)
        return Prompt(self.ids, 0, self.answer, limits, self.needle)


class Ask(Frozen):
    """A request: to answer `questions` from the message of `size` bytes that follows, or to prefill `text`.

    constants: bytes before the message, of tensors that belong to the model and that this receiver has not had. method:
    of the run, where it evicts while it decodes; the cache of others says all. zeroed: as a control.
    """

    size: int = 0
    constants: int = 0
    method: MethodSpec | None = None
    questions: tuple[Question, ...] = ()
    zeroed: bool = False
    text: tuple[int, ...] = ()


class Reply(Frozen):
    """What comes back. outcomes, ask_s: of each question. error: why there is nothing else.

    The first reply, before any request, tells the revision of the model, or why it cannot be loaded.
    """

    revision: str = ""
    outcomes: tuple[Outcome, ...] = ()
    kv_bytes: int = 0
    receive_s: float = 0.0
    ask_s: tuple[float, ...] = ()
    text_s: float = 0.0
    error: str | None = None
