"""RULER's question answering: SQuAD and HotpotQA questions, their paragraphs hidden among others.

Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/qa.py and constants.py. Data: SQuAD 2.0 dev (answerable
questions) and HotpotQA dev distractor v1, as files in the data folder. Differences: the documents' order is drawn per
sample (NVIDIA's fixed seed puts the answer at one place in all of them), and a question whose own documents exceed
the length is passed over (NVIDIA's loop does not end there).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

from pydantic import Field, RootModel, StrictBool, TypeAdapter, model_validator

from tasks.base import DataOptions, TaskError, TaskOptions, shown
from tasks.datafile import Part, Reference, Text, find_file, read_file, read_json
from tasks.ruler.family import FittedPrompt, Generator, SamplePlan

ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
TEMPLATE = ORDER + "The following are given documents.\n\n{context}\n\n"
QUESTION = ORDER + "Question: {query}"
ANSWER_PREFIX = " Answer:"


@dataclass(frozen=True)
class Item:
    """A question. own: indexes of its documents; related: indexes of documents to prefer as distractors."""

    query: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    related: tuple[int, ...] = ()


class Documents(Generator):
    """Draws the prompts. Units: documents."""

    generation = 32

    def __init__(self, items: Sequence[Item], documents: Sequence[str]) -> None:
        self.items = items
        self.documents = documents
        self.available = len(items)

    def least(self, length: int, index: int) -> int:
        return len(self.items[index].own)

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        item = self.items[plan.index]
        chosen = self._choose(item, units, plan.draw)
        plan.draw.shuffle(chosen)
        meta: dict[str, object] = {"documents": len(chosen), "item": plan.index, "group": self.group(item)}
        if len(item.own) == 1:
            chosen.remove(item.own[0])
            chosen.insert(int(plan.at * (len(chosen) + 1)), item.own[0])
            meta["depth"] = round(100 * chosen.index(item.own[0]) / max(1, len(chosen) - 1))
        return FittedPrompt(
            context=TEMPLATE.format(context=self.listed(chosen)),
            question=QUESTION.format(query=item.query),
            answer_prefix=ANSWER_PREFIX,
            answers=item.answers,
            meta=meta,
        )

    def group(self, item: Item) -> str:
        """Return a name of the documents that a question owns: of their hash."""
        text = "\0".join(self.documents[at] for at in sorted(item.own))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def listed(self, chosen: Sequence[int]) -> str:
        """Return the documents of these indexes as the haystack shows them."""
        return "\n\n".join(f"Document {i}:\n{self.documents[at]}" for i, at in enumerate(chosen, start=1))

    def _choose(self, item: Item, units: int, draw: Random) -> list[int]:
        own, related, total = list(item.own), list(item.related), len(self.documents)
        if units >= total:
            return [i % total for i in range(units)]
        more = units - len(own)
        if more <= len(related):
            return own + draw.sample(related, max(0, more))
        taken = {*own, *related}
        fill = [i for i in draw.sample(range(total), min(total, units + len(taken))) if i not in taken]
        return own + related + fill[: more - len(related)]


class SquadAnswer(Part):
    text: Text


class SquadQuestion(Part):
    """A question; one that is not impossible has an answer that is not blank."""

    question: Text
    answers: tuple[SquadAnswer, ...]
    is_impossible: StrictBool

    @model_validator(mode="after")
    def _answerable(self) -> "SquadQuestion":
        if not self.is_impossible and not self.texts:
            raise ValueError(f"question {shown(self.question)} is not impossible and has no answer")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """Different answers that are not blank, in order."""
        return tuple(dict.fromkeys(answer.text for answer in self.answers if answer.text.strip()))


class SquadParagraph(Part):
    context: Text
    qas: tuple[SquadQuestion, ...]


class SquadArticle(Part):
    paragraphs: tuple[SquadParagraph, ...]


class Squad(Part):
    """SQuAD's file, as far as it is used."""

    data: tuple[SquadArticle, ...]

    def questions(self) -> tuple[list[Item], list[str]]:
        """Return answerable questions in file order and all paragraphs, sorted; related are those of the article."""
        documents = sorted({paragraph.context for article in self.data for paragraph in article.paragraphs})
        at = {text: i for i, text in enumerate(documents)}
        items = []
        for article in self.data:
            article_documents = dict.fromkeys(at[paragraph.context] for paragraph in article.paragraphs)
            for paragraph in article.paragraphs:
                own = at[paragraph.context]
                related = tuple(i for i in article_documents if i != own)
                asked = [qa for qa in paragraph.qas if not qa.is_impossible]
                items += [Item(qa.question, qa.texts, (own,), related) for qa in asked]
        return items, documents


class HotpotRow(Part):
    """A question. context: paragraphs, each a title and sentences."""

    question: Text
    answer: Reference
    context: Annotated[tuple[tuple[Text, tuple[Text, ...]], ...], Field(min_length=1)]


class Hotpot(RootModel[tuple[HotpotRow, ...]]):
    """HotpotQA's file, as far as it is used."""

    def questions(self) -> tuple[list[Item], list[str]]:
        """Return questions in file order and all paragraphs (`title` line, then text), sorted; a question owns its."""
        texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row.context] for row in self.root]
        documents = sorted({text for row in texts for text in row})
        at = {text: i for i, text in enumerate(documents)}
        items = [
            Item(row.question, (row.answer,), tuple(dict.fromkeys(at[text] for text in own)))
            for row, own in zip(self.root, texts, strict=True)
        ]
        return items, documents


@dataclass(frozen=True)
class QuestionFile:
    """A data file. asset: its name in `harness data fetch`. shape: what it holds."""

    asset: str
    patterns: tuple[str, ...]
    what: str
    shape: TypeAdapter[Any]

    def find(self, options: DataOptions) -> Path:
        """Return its path; see `tasks.datafile.find_file`. Raises TaskError when it is not there."""
        return find_file(options, self.asset, *self.patterns, also=("ruler",))

    def load(self, options: DataOptions) -> Documents:
        """Read it. Raises TaskError when it is missing, damaged, not what was fetched, or holds no question."""
        path = self.find(options)
        read = read_json(self.shape, read_file(path).blob, where=str(path), remedy=f"expected {self.what}")
        items, documents = read.questions()
        if not items:
            raise TaskError(f"{path} holds no answerable question; expected {self.what}")
        return Documents(items, documents)

    def provenance(self, options: TaskOptions) -> dict[str, Any]:
        """Return the file name and checksum of the data, and where it came from."""
        path = self.find(options)
        read = read_file(path)
        facts = {"data": self.what, "file": path.name, "sha256": read.sha256}
        return facts | {"data_source": read.source, "data_revision": read.revision}


FILES = {
    "qa_1": QuestionFile(
        "squad",
        ("squad*.json", "dev-v2.0.json"),
        "SQuAD 2.0 dev (dev-v2.0.json of the SQuAD explorer)",
        TypeAdapter(Squad),
    ),
    "qa_2": QuestionFile(
        "hotpotqa",
        ("hotpot*.json",),
        "HotpotQA dev distractor (hotpot_dev_distractor_v1.json of the HotpotQA site)",
        TypeAdapter(Hotpot),
    ),
}
