"""Turns: a conversation goes on over a cache that was compressed before its first answer.

Rows answer differently, so each is decoded by itself: what a cell says depends on no company. Its own answers stay in
its cache. What was compressed grows by every turn or, where the prompt says `again`, is compressed again to its budget
after every answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from harness.engine.again import Noted, compress_again
from harness.engine.compress import Compressed
from harness.engine.decode import Decoding, Generated
from harness.engine.packed import storage_bytes, tensors_of
from harness.engine.types import NextTurn, Prompt
from harness.records.record import OVER


@dataclass
class Again:
    """What one row keeps beside its decoding, so that its cache can be compressed again.

    left, noted: by the last compression. over: what a reader must know of compressions that left too much.
    """

    left: Compressed
    noted: list[Noted]
    over: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.asked = self.left.asked_bytes - self.left.stored_bytes + _stored(self.left)  # of compressible layers

    def compress(self, decoding: Decoding, ids: Sequence[int], *, start: int, room: int) -> Decoding:
        """Compress what has grown by `ids` from position `start` on, and go on decoding for up to `room` tokens."""
        if not ids:  # the first token came from the prefill, and ended the answer
            return decoding
        self.left, self.noted = compress_again(decoding.model, self.left, self.noted, ids, start)
        stored = _stored(self.left)
        if stored > OVER * self.asked and self.left.policy.kind != "own":
            self.over.append(f"{stored} bytes after {self.left.tokens} tokens, {self.asked} asked")
        return replace(Decoding.of(decoding.model, [self.left], room=room), beside=beside(self.noted))


def beside(noted: Sequence[Noted]) -> int:
    """Bytes of what is kept beside a cache."""
    return sum(own.nbytes for own in noted)


def room_of(turns: Sequence[NextTurn]) -> int:
    """Most tokens that further turns bring."""
    return sum(len(turn.ids) + turn.limits.max_new_tokens for turn in turns)


def converse(
    decoding: Decoding, first: Generated, prompt: Prompt, given: Sequence[int], at: int, again: Again | None
) -> list[Generated]:
    """Every answer of a conversation.

    Args:
        decoding: of one row, after its first answer.
        first: that answer.
        prompt: its turns are asked.
        given: tokens that were fed to this row before the answer.
        at: position of the answer.
        again: None to let the cache grow.
    """
    answers = [first]
    for turn in prompt.turns:
        said = answers[-1].tokens
        rest = said[decoding.position - at :]  # the last token of an answer is fed only where end-of-text follows it
        if again is not None:
            start, rest = at - len(given), []
            decoding = again.compress(decoding, [*given, *said], start=start, room=room_of([turn]))
        logits = decoding.feed([*rest, *turn.ids], alone=True)
        given, at = turn.ids, decoding.position
        answers += decoding.greedy(logits, turn.limits)
    return answers


def joined(answers: Sequence[Generated]) -> Generated:
    """All answers as one; its bytes at the end are the last one's."""
    tokens = [token for answer in answers for token in answer.tokens]
    steps = sum(answer.byte_steps for answer in answers)
    flaw = next((answer.flaw for answer in answers if answer.flaw), None)
    return replace(answers[-1], tokens=tokens, byte_steps=steps, flaw=flaw)


def _stored(left: Compressed) -> int:
    return storage_bytes(x for i in left.compressible for x in tensors_of(left.layers[i]))
