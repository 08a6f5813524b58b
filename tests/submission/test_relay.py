"""Sent caches in a submitted run: as many bytes as the cache has, said of tasks that are relayed and of no other."""

from typing import Any

import pytest

from harness.records.record import Record
from harness.records.relayed import HEADER_BYTES, LAYER_BYTES, Relayed
from harness.submission.check_bytes import Budgets
from harness.submission.check_prompts import Drawn
from harness.submission.check_scores import no_score
from methods.budget import Budget
from tests import submitted

CELL = ("snapkv", "16")


def sent_record(more: int = 300, task: str = "relay/needle", **changes: Any) -> Record:
    """A cell whose message has so many bytes more than its cache."""
    made = submitted.record(1, *CELL, task=task)
    own = {"sent_bytes": made.kv_bytes + more, "text_bytes": 5, "send_s": 0.1, "receive_s": 0.1, "ask_s": 0.1}
    return made.model_copy(update={"relayed": Relayed(**own), **changes})


def problems(record: Record) -> list[str]:
    return list(Budgets({CELL: Budget.parse("16")}, {}).problems(record, "here"))


def test_a_message_holds_the_cache_and_little_more() -> None:
    most = HEADER_BYTES + LAYER_BYTES * submitted.LAYERS
    assert problems(sent_record()) == problems(sent_record(most)) == []
    for more in (0, -1, most + 1):
        (found,) = problems(sent_record(more))
        assert "bytes sent of a cache of" in found


@pytest.mark.parametrize("changes", [{"task": "niah/passkey"}, {"relayed": None}])
def test_what_was_sent_belongs_to_relayed_tasks(changes: dict[str, Any]) -> None:
    (found,) = problems(sent_record(**changes))
    assert "answered by another process, the record says otherwise" in found


def test_a_cell_without_a_score_was_not_sent() -> None:
    bare = {"metrics": {}, "prediction": "", "nll": None, "status": "failed"}
    assert list(no_score(sent_record(**bare))) and not list(no_score(sent_record(**bare, relayed=None)))


def test_the_bytes_of_the_text_are_those_of_the_draw() -> None:
    class Planned:
        """What the check asks of a sample that was drawn again."""

        def __init__(self, record: Record, context: str) -> None:
            self.sample = type("Of", (), {"answers": record.answers, "context": context, "meta": record.meta})()
            self.sample.max_new_tokens, self.sample.turns = 8, ()
            self.sha256, self.ids, self.needle, self.answer = record.prompt_sha256, range(100), (), range(4)

    record = sent_record()  # of a text of 5 bytes
    for context, wrong in (("texts", []), ("té: 1", ["text_bytes not those of the task's own draw"])):
        planned: Any = Planned(record, context)
        drawn = Drawn(submitted.manifest(), {(record.task, record.sample_id): planned}, {record.task})
        assert list(drawn.problems(record)) == wrong
