"""The sender: compresses a context for every cell, sends each cache, and brings back what the receiver answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from harness.engine.compress import Compressed
from harness.engine.engine import CellRun, Engine
from harness.engine.types import Cell, Outcome, Prompt
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.plan.receivers import PlannedReceiver
from harness.plan.sweep import PlannedCell
from harness.records.relayed import Relayed
from harness.records.spec import MethodSpec, RunSpec
from harness.relay.client import Receiver
from harness.relay.message import constants_of, pack_message
from harness.relay.wire import Ask, Question, Reply

Cells = Sequence[Sequence[PlannedCell]]  # those of each prompt


@dataclass
class _Sent:
    """A cell's cache at the receiver, and what it answered to the prompts of these numbers, in their order."""

    sent_bytes: int
    send_s: float
    reply: Reply
    control: Reply | None = None


class Relay:
    """Answers prompts as `Engine.run_group` does, but that another process decodes."""

    def __init__(
        self, engine: Engine, loaded: LoadedModel, spec: RunSpec, receiver: PlannedReceiver | None = None
    ) -> None:
        """receiver: the model that answers; None for the same one."""
        self.engine, self.same = engine, receiver is None
        self.receiver = Receiver(loaded, receiver)
        self.methods: Mapping[str, MethodSpec] = {method.label: method for method in spec.methods}

    def run_group(
        self, prompts: Sequence[Prompt], cells: Cells, texts: Sequence[str], *, control: bool = False
    ) -> list[list[Outcome]]:
        """The outcomes of questions over one context.

        cells: those of each prompt. texts: the context of each, as text. control: whether every cache is sent a second
        time with zeros in its place. A cell whose cache cannot be sent, or whose receiver ends, is marked; others go
        on. Raises as `Engine.run_group` does.
        """
        border, done = self.engine.compress_group(prompts, [[cell.cell for cell in own] for own in cells])
        asked: dict[Cell, dict[int, None]] = {}  # numbers of the prompts of each; two labels may name one cell
        labels: dict[Cell, str] = {}
        for number, own in enumerate(cells):
            for planned in own:
                asked.setdefault(planned.cell, {})[number] = None
                labels[planned.cell] = planned.method
        answers: dict[tuple[int, Cell], Outcome] = {}
        text_s, why = self._read_text(prompts[0]) if any(run.compressed for run in done.values()) else (None, "")
        for cell, numbers in asked.items():
            run = done.pop(cell)
            questions = [Question.of(prompts[number], border) for number in numbers]
            sent = self._sent(run, labels[cell], questions, control=control)
            for turn, number in enumerate(numbers):
                told = Told(len(texts[number].encode()), text_s, why)
                answers[number, cell] = _outcome(run, sent, turn, told)
        return [[replace(answers[number, planned.cell]) for planned in own] for number, own in enumerate(cells)]

    def _read_text(self, prompt: Prompt) -> tuple[float | None, str]:
        """Seconds of the receiver to the first token from the text, or why they are not known."""
        try:
            reply, _ = self.receiver.ask(Ask(text=tuple(prompt.ids)))
        except HarnessError as error:
            return None, f"sending the text was not timed: {error}"
        return (reply.text_s, "") if reply.error is None else (None, f"sending the text was not timed: {reply.error}")

    def _sent(self, run: CellRun, label: str, questions: Sequence[Question], *, control: bool) -> _Sent | None:
        """Send a cell's cache; None, with its outcome marked, where that fails."""
        if run.compressed is None:
            return None
        try:
            return self._ask(run.compressed, self._method(run, label), questions, control=control)
        except Exception as error:  # a method's own KV is foreign code
            run.outcome.fail(error)
            return None
        finally:
            run.compressed = None  # each cache goes once it is sent

    def _ask(
        self, left: Compressed, method: MethodSpec | None, questions: Sequence[Question], *, control: bool
    ) -> _Sent:
        constants = constants_of(left)
        start = time.perf_counter()
        message = pack_message(left)
        packed_s = time.perf_counter() - start
        ask = Ask(method=method, questions=tuple(questions))
        reply, written_s = self.receiver.ask(ask, message, constants)
        if self.same and reply.error is None and reply.kv_bytes != left.kv_bytes:
            raise HarnessError(f"the receiver holds {reply.kv_bytes} bytes of a cache of {left.kv_bytes}")
        zeroed = None
        if control and reply.error is None:
            with suppress(HarnessError):  # it costs the record a fact, never its score
                zeroed, _ = self.receiver.ask(ask.model_copy(update={"zeroed": True}), message, constants)
        return _Sent(len(message), packed_s + written_s, reply, zeroed)

    def _method(self, run: CellRun, label: str) -> MethodSpec | None:
        return self.methods[label] if run.cell.policy.evicts_while_decoding else None


@dataclass(frozen=True)
class Told:
    """What the text of a prompt's context takes. why: a note where its seconds are not known."""

    text_bytes: int
    text_s: float | None
    why: str


def _outcome(run: CellRun, sent: _Sent | None, turn: int, text: Told) -> Outcome:
    """Of the sender's and the receiver's, as one."""
    if sent is None:
        return replace(run.outcome)
    answered = sent.reply.outcomes[turn]
    nothing = vars(Outcome())
    told = {name: value for name, value in vars(answered).items() if value != nothing[name]}  # it knew nothing before
    whole = replace(run.outcome, **told | {"notes": (*run.outcome.notes, *answered.notes)})
    if sent.reply.error is not None or whole.status != "ok":
        return whole
    whole.relayed = Relayed(
        sent_bytes=sent.sent_bytes,
        text_bytes=text.text_bytes,
        send_s=sent.send_s,
        receive_s=sent.reply.receive_s,
        ask_s=sent.reply.ask_s[turn],
        text_s=text.text_s,
        depends=_depends(sent.control, answered, turn),
    )
    whole.notes += (text.why,) if text.why else ()
    return whole


def _depends(control: Reply | None, answered: Outcome, turn: int) -> bool | None:
    """Whether another answer came of zeros, or none that is finite; None where it was not tried, or lost."""
    if control is None or control.error is not None:
        return None
    zeroed = control.outcomes[turn]
    mine, zeros = ((own.status, own.token_ids, own.nll_per_token) for own in (answered, zeroed))
    return mine != zeros
