"""Context and question in two processes: one reads the context, another answers from the cache that it is sent.

    relay/needle              prompts of niah/passkey: a seven-digit number in a text
    relay/keys                prompts of multiquery/niah: four keys of one text, asked for one by one
    relay/qa/squad, hotpotqa  prompts of multiquery/qa_1 and qa_2: four questions over documents
    relay/qa/longbench        prompts of multiquery/longbench: questions that share a document

Samples, data and metrics are those of the tasks named, question by question, so that a board can be read beside theirs.
What differs is who answers: `harness.relay` sends the context's compressed cache as bytes to a process of its own. The
setting is Q-KVComm's (https://arxiv.org/abs/2512.17914); its text extractor, which puts key facts of the context into
the receiver's prompt, is left out: that is retrieval of text, and no cache.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import tasks.multiquery
import tasks.niah  # noqa: F401 - registers what is relayed, as the one above
from tasks.base import TASKS, DataOptions, Sample, Task, TaskOptions, task

RELAYED = {
    "needle": "niah/passkey",
    "keys": "multiquery/niah",
    "qa/squad": "multiquery/qa_1",
    "qa/hotpotqa": "multiquery/qa_2",
    "qa/longbench": "multiquery/longbench",
}
"""Task of this family to the one whose samples, and lane of the pool, it has."""


class Relayed(Task):
    """Another task's samples, answered by another process from what was kept of their context."""

    protocol = "relay"
    query = "agnostic"
    relayed = True

    def __init__(self, name: str, source: Task) -> None:
        self.name, self.source, self.about = f"relay/{name}", source, source.about

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        return self.source.samples(options)

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return self.source.score(sample, prediction)

    def find_data(self, options: DataOptions) -> None:
        self.source.find_data(options)

    def read_data(self, options: DataOptions) -> None:
        self.source.read_data(options)

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        return {**self.source.provenance(options), "prompts": f"those of {self.source.name}"}


for _name, _source in RELAYED.items():
    task(Relayed(_name, TASKS[_source]))
