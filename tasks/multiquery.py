"""Several questions over one context: the context is compressed once, before any of them is known.

    multiquery/niah         RULER's niah_multiquery haystack, each of its four keys asked for on its own
    multiquery/qa_1, qa_2   RULER's question answering, the documents of four questions hidden among others
    multiquery/longbench    the rows of LongBench's single-document QA that share a document

Prompts, data and metrics are those of `tasks.ruler` and `tasks.longbench`, one question at a time; the setting is our
own, after SCBench (https://arxiv.org/abs/2412.10319). Samples of one context carry its `group`: they are no
independent draws. A limit counts questions.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from tasks.base import About, DataOptions, Sample, Task, TaskError, TaskOptions, spread_order, task
from tasks.essays import read_essays
from tasks.longbench import DATASETS, SINGLE, LongBench, cut_middle, official_template
from tasks.ruler import qa
from tasks.ruler.family import FittedPrompt, RulerTask, SamplePlan, drawn_spans
from tasks.ruler.niah import ANSWER_PREFIX, QUESTION, ROWS, NeedleGenerator, fill
from tasks.scoring import string_match_all, string_match_part

QUESTIONS = 4  # questions of each generated context
CONTEXTS = 125  # contexts of each length when no limit is given

DataRow = tuple[LongBench, Mapping[str, Any]]  # a dataset and one of its rows


class KeyByKey(NeedleGenerator):
    """The niah_multiquery haystack, fitted to the question for all its keys and asked for one key at a time."""

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        prompt = super().build(units, plan)
        asked = []
        for needle, answer in zip(prompt.meta["needles"], prompt.answers, strict=True):
            key = needle.partition(" for ")[2].partition(" is: ")[0]
            filled = partial(fill, kind=self.row.values, query=key, singular=True)
            fields = {"question": filled(QUESTION), "answer_prefix": filled(ANSWER_PREFIX), "answers": (answer,)}
            asked.append((fields, {"needles": [needle]}))
        return replace(prompt, meta={"asked": asked, **self._group(plan)})


class QuestionByQuestion(qa.Documents):
    """The documents of `QUESTIONS` questions of a data file, hidden among others."""

    def __init__(self, found: qa.Documents) -> None:
        super().__init__(found.items, found.documents)
        self.available = len(found.items) // QUESTIONS
        if not self.available:
            raise TaskError(
                f"{len(found.items)} questions are too few, {QUESTIONS} are asked together; use whole files"
            )

    def least(self, length: int, index: int) -> int:
        return len(self._together(index).own)

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        items = self._items(plan.index)
        fields = [{"question": qa.QUESTION.format(query=item.query), "answers": item.answers} for item in items]
        longest: dict[str, Any] = max(fields, key=lambda one: len(one["question"]))
        chosen = self._choose(self._together(plan.index), units, plan.draw)
        plan.draw.shuffle(chosen)
        return FittedPrompt(
            context=qa.TEMPLATE.format(context=self.listed(chosen)),
            **longest,
            answer_prefix=qa.ANSWER_PREFIX,
            meta={"asked": [(one, {}) for one in fields], "documents": len(chosen)}
            | {"group": self.group(self._together(plan.index))},
        )

    def _items(self, index: int) -> list[qa.Item]:
        """Questions far apart in the file, so that they are about different documents."""
        return [self.items[index + i * (len(self.items) // QUESTIONS)] for i in range(QUESTIONS)]

    def _together(self, index: int) -> qa.Item:
        """The questions of one context as one item that owns all their documents."""
        items = self._items(index)
        own = dict.fromkeys(at for item in items for at in item.own)
        related = dict.fromkeys(at for item in items for at in item.related if at not in own)
        return qa.Item("", (), tuple(own), tuple(related))


class ManyQuestions(RulerTask):
    """A RULER task asked several questions a context; each is a sample of its own, with id `{length}/{i}/{j}`."""

    query = "agnostic"
    family = protocol = "multiquery"
    official = CONTEXTS * QUESTIONS

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        """Yield `limit` questions a length, 125 contexts of 4 by default. Raises as `RulerTask.samples` does."""
        most = self.official if options.limit is None else options.limit
        return self._questions(super().samples(options), most)

    def wanted(self, options: TaskOptions) -> int:
        return -(-super().wanted(options) // QUESTIONS)

    def _questions(self, shared: Iterator[Sample], most: int) -> Iterator[Sample]:
        made: Counter[int] = Counter()
        for sample in shared:
            length = sample.meta["length"]
            meta = {name: value for name, value in sample.meta.items() if name not in ("asked", "prompt_tokens")}
            for number, (fields, own) in enumerate(sample.meta["asked"][: most - made[length]]):
                yield replace(sample, id=f"{sample.id}/{number}", meta=meta | own, **fields)
            made[length] += QUESTIONS


class SharedDocuments(Task):
    """LongBench's single-document questions whose document has several; prompt and metric are the dataset's own.

    A context is cut with its longest question, and so the same for all of them.
    """

    name = "multiquery/longbench"
    protocol = "multiquery"
    query = "agnostic"

    def __init__(self) -> None:
        self._tasks = {data.name: LongBench(data) for data in DATASETS if data.category == SINGLE}
        rows = sum(data.samples for data in DATASETS if data.category == SINGLE)
        self.about = About("THUDM/LongBench", "2e00731", "MIT", "f1, f1_zh", rows)

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        shared: list[list[DataRow]] = []
        for source in self._tasks.values():
            documents: dict[str, list[DataRow]] = defaultdict(list)
            for row in source.data(options)[0]:
                documents[row["context"]].append((source, row))
            shared += [rows for rows in documents.values() if len(rows) > 1]
        if not shared:
            raise TaskError(f"{self.name}: no two rows of {', '.join(self._tasks)} share a document; use whole files")
        order = spread_order(len(shared), options.seed, self.name)
        samples = (sample for at in order for sample in self._document(shared[at], options))
        return islice(samples, options.limit)

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return self._tasks[sample.meta["dataset"]].score(sample, prediction)

    def find_data(self, options: DataOptions) -> None:
        for source in self._tasks.values():
            source.find_data(options)

    def read_data(self, options: DataOptions) -> None:
        for source in self._tasks.values():
            source.read_data(options)

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        return {name: dict(source.provenance(options)) for name, source in self._tasks.items()}

    def _document(self, rows: Sequence[DataRow], options: TaskOptions) -> Iterator[Sample]:
        source = rows[0][0]
        head, tail = official_template(source.dataset).split("{context}")
        questions = [tail.replace("{input}", row["input"]) for _, row in rows]
        longest = max(questions, key=lambda text: len(options.tokenizer.encode(text)))
        whole = head + rows[0][1]["context"]
        context, _, truncated = cut_middle(whole, longest, options=options, dataset=source.dataset)
        for (_, row), question in zip(rows, questions, strict=True):
            yield Sample(
                id=f"{source.dataset.name}/{row['_id']}",
                context=context,
                question=question,
                answers=tuple(row["answers"]),
                max_new_tokens=source.dataset.max_new_tokens,
                meta=source.meta(row) | {"truncated": truncated},
            )


def _keys(options: TaskOptions) -> KeyByKey:
    spans = drawn_spans("multiquery/niah", options, KeyByKey.generation)
    return KeyByKey(ROWS["niah_multiquery"], None if spans else read_essays(options), spans=spans)


def _documents(options: TaskOptions, *, file: qa.QuestionFile) -> QuestionByQuestion:
    return QuestionByQuestion(file.load(options))


task(
    ManyQuestions(
        "niah",
        _keys,
        string_match_all,
        "one key a question",
        facts=lambda options: read_essays(options).provenance(),
    )
)
for _name, _file in qa.FILES.items():
    task(
        ManyQuestions(
            _name,
            partial(_documents, file=_file),
            string_match_part,
            "four questions a context",
            facts=_file.provenance,
            find=_file.find,
            read=_file.load,
        )
    )
task(SharedDocuments())
