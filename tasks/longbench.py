"""LongBench v1 (Bai et al. 2023, arxiv.org/abs/2308.14508): 21 datasets, and LongBench-E, 13 of them by length.

Protocol of github.com/THUDM/LongBench@2e00731 (pred.py, eval.py, config/): its prompts, generation lengths, truncation
in the middle, chat wrap and metrics. The prompts are read from the installed lm-eval, corrected where it differs from
the official ones, and refused when their checksum is not the official one. `DEVIATIONS` says what still differs.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from tasks import scoring
from tasks.base import About, DataOptions, NothingFits, Sample, Task, TaskError, TaskOptions, draw, task
from tasks.datafile import FileBytes, find_file, read_file
from tasks.longbench_rows import longbench_rows

LM_EVAL = "0.4.13"  # the release whose templates the checksums were taken from

DEVIATIONS = (
    "tokens are counted and cut without special tokens; pred.py counts the beginning-of-text token as one of them",
    "max_length, which pred.py reads from a table of models, follows from the model's context",
    "a prediction ends before the newline token that ends samsum's; pred.py decodes it and drops it when scoring",
)

METRICS: Mapping[str, Callable[[str, str], float]] = {
    "f1": scoring.token_f1,
    "f1_zh": scoring.token_f1_zh,
    "rouge_l": scoring.rouge_l,
    "rouge_l_zh": scoring.rouge_l_zh,
    "count": scoring.count,
    "retrieval": scoring.retrieval,
    "retrieval_zh": scoring.retrieval_zh,
    "code_similarity": scoring.code_similarity,
}

# What lm-eval's templates lack, as (its text, the official text).
EDITS: Mapping[str, tuple[str, str]] = {
    "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
    "passage_count": ("final answer is:", "final answer is: "),
    "passage_retrieval_en": ("The answer is:", "The answer is: "),
    "lcc": ("line of code:", "line of code:\n"),
    "repobench-p": ("line of code:", "line of code:\n"),
}


@dataclass(frozen=True)
class Dataset:
    """One row of LongBench's tables (config/*.json, task.md).

    samples, samples_e: rows, of LongBench-E too where it has the dataset. template: first 12 hex digits of the official
    prompt template's sha256. first_line: only the first line of a prediction is scored. newline_ends: the
    token of a newline ends generation, after one token.
    """

    name: str
    category: str
    language: str
    metric: str
    max_new_tokens: int
    samples: int
    samples_e: int | None
    template: str
    chat: bool = True
    first_line: bool = False
    newline_ends: bool = False


SINGLE, MULTI, SUMMARY = "single-document QA", "multi-document QA", "summarization"
FEW_SHOT, SYNTHETIC, CODE = "few-shot", "synthetic", "code"
DATASETS = (
    Dataset("narrativeqa", SINGLE, "en", "f1", 128, 200, None, "aada7ed24b06"),
    Dataset("qasper", SINGLE, "en", "f1", 128, 200, 224, "0fbdd123fe7f"),
    Dataset("multifieldqa_en", SINGLE, "en", "f1", 64, 150, 150, "20b4666a2de8"),
    Dataset("multifieldqa_zh", SINGLE, "zh", "f1_zh", 64, 200, None, "344b3a4e557c"),
    Dataset("hotpotqa", MULTI, "en", "f1", 32, 200, 300, "9ec4ae308865"),
    Dataset("2wikimqa", MULTI, "en", "f1", 32, 200, 300, "9ec4ae308865"),
    Dataset("musique", MULTI, "en", "f1", 32, 200, None, "9ec4ae308865"),
    Dataset("dureader", MULTI, "zh", "rouge_l_zh", 128, 200, None, "ae53329f51b1"),
    Dataset("gov_report", SUMMARY, "en", "rouge_l", 512, 200, 300, "91c25d585b18"),
    Dataset("qmsum", SUMMARY, "en", "rouge_l", 512, 200, None, "dca23b678fe0"),
    Dataset("multi_news", SUMMARY, "en", "rouge_l", 512, 200, 294, "2af3f28c40b9"),
    Dataset("vcsum", SUMMARY, "zh", "rouge_l_zh", 512, 200, None, "3e5d8241bc9b"),
    Dataset("trec", FEW_SHOT, "en", "classification", 64, 200, 300, "0eff8bebdba9", False, True),
    Dataset("triviaqa", FEW_SHOT, "en", "f1", 32, 200, 300, "00a802e6377e", False, True),
    Dataset("samsum", FEW_SHOT, "en", "rouge_l", 128, 200, 300, "a68d88423490", False, True, True),
    Dataset("lsht", FEW_SHOT, "zh", "classification", 64, 200, None, "f3edabdf7fae", False, True),
    Dataset("passage_count", SYNTHETIC, "en", "count", 32, 200, 300, "986550b6c610"),
    Dataset("passage_retrieval_en", SYNTHETIC, "en", "retrieval", 32, 200, 300, "39b96b7fa52b"),
    Dataset("passage_retrieval_zh", SYNTHETIC, "zh", "retrieval_zh", 32, 200, None, "c1e2346e245e"),
    Dataset("lcc", CODE, "code", "code_similarity", 64, 500, 300, "6a1f24cf0bb8", False),
    Dataset("repobench-p", CODE, "code", "code_similarity", 64, 500, 300, "ee9ec182ea5f", False),
)


class LongBench(Task):
    """One dataset of LongBench (`longbench/<name>`), or of LongBench-E (`longbench_e/<name>`)."""

    def __init__(self, dataset: Dataset, *, by_length: bool = False) -> None:
        self.dataset = dataset
        self.by_length = by_length
        self.name = f"longbench{'_e' * by_length}/{dataset.name}"
        self.file = f"{dataset.name}{'_e' * by_length}.jsonl"
        rows = dataset.samples_e if by_length else dataset.samples
        self.about = About("THUDM/LongBench", "2e00731", "MIT", dataset.metric, rows or 0)

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        template = official_template(self.dataset)
        for row in self.drawn(options):
            yield self._sample(row, template, options)

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        if self.dataset.first_line:
            prediction = scoring.first_line(prediction)
        if self.dataset.metric == "classification":
            classes = sample.meta["all_classes"]
            return {"score": max(scoring.classification(prediction, answer, classes) for answer in sample.answers)}
        metric = METRICS[self.dataset.metric]
        return {"score": max(metric(prediction, answer) for answer in sample.answers)}

    def find_data(self, options: DataOptions) -> None:
        find_file(options, "longbench", self.file)

    def read_data(self, options: DataOptions) -> None:
        self.data(options)

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        official_template(self.dataset)
        rows, data = self.data(options)
        return {
            "data": data.source,
            "file": self.file,
            "sha256": data.sha256,
            "data_revision": data.revision,
            "rows": len(rows),
            "official_rows": self.about.samples,
            "template_source": f"lm-eval {version('lm_eval')}",
            "template_sha256": self.dataset.template,
            "deviations": list(DEVIATIONS),
        }

    def data(self, options: DataOptions) -> tuple[list[dict[str, Any]], FileBytes]:
        """Return all rows of the dataset and their file. Raises TaskError when it is missing or damaged."""
        read, metric = read_file(find_file(options, "longbench", self.file)), self.dataset.metric

        def scorable(answer: str) -> None:
            if metric.startswith("retrieval"):  # the one metric that refuses a reference
                METRICS[metric]("", answer)

        rows = longbench_rows(read.blob, self.file, with_classes=metric == "classification", scorable=scorable)
        return rows, read

    def drawn(self, options: TaskOptions) -> list[dict[str, Any]]:
        """Return `limit` of the rows, or of those that fit uncut, spread evenly over their lengths.

        Raises NothingFits when there is none.
        """
        rows, _ = self.data(options)
        if options.whole:
            template = official_template(self.dataset)
            rows = [row for row in rows if not self._sample(row, template, options).meta["truncated"]]
        if not rows:
            raise NothingFits(f"no row of {self.file} fits {options.max_tokens} tokens uncut; drop the task or --whole")
        return draw(rows, options.limit, options.seed, self.name, by=lambda row: row["length"])

    def meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a record says of a row. Rows of one context share `group`."""
        data = self.dataset
        meta: dict[str, Any] = {"dataset": data.name, "category": data.category, "language": data.language}
        meta |= {"length": row["length"], "group": hashlib.sha256(row["context"].encode()).hexdigest()[:12]}
        if self.by_length:
            meta["length_bin"] = "0-4k" if row["length"] < 4000 else "4-8k" if row["length"] < 8000 else "8k+"
        if data.metric == "classification":
            meta["all_classes"] = list(row["all_classes"])
        return meta

    def _sample(self, row: Mapping[str, Any], template: str, options: TaskOptions) -> Sample:
        data = self.dataset
        head, tail = template.split("{context}")
        context, question, truncated = cut_middle(
            head + row["context"], tail.replace("{input}", row["input"]), options=options, dataset=data
        )
        return Sample(
            id=row["_id"],
            context=context,
            question=question,
            answers=tuple(row["answers"]),
            max_new_tokens=data.max_new_tokens,
            chat=data.chat,
            end_tokens=("\n",) if data.newline_ends else (),
            min_new_tokens=int(data.newline_ends),
            meta=self.meta(row) | {"truncated": truncated},
        )


def longest_prompt(options: TaskOptions, dataset: Dataset) -> tuple[int, int]:
    """Return (max_length, room): tokens above which a prompt is cut, and tokens that a prompt may have at all.

    max_length is the model's context less 500, about what the official config/model2maxlen.json says (3500 of 4096,
    15500 of 16384, 31500 of 32768), and never more than the room. Room is what generation and the chat template leave;
    a prompt without a template leaves one token for beginning-of-text.
    """
    wrap = max(1, options.tokenizer.template_tokens if dataset.chat else 0)
    room = options.max_tokens - dataset.max_new_tokens - wrap
    return min(options.max_tokens - 500, room), room


def cut_middle(context: str, question: str, *, options: TaskOptions, dataset: Dataset) -> tuple[str, str, bool]:
    """Return (context, question, whether it was cut): the first and last half of max_length tokens, as pred.py does.

    The border is found again as the longest common end with the question, unless the context alone survived whole. A
    cut text that encodes to more tokens than there is room for is cut shorter, by the excess. Raises TaskError when the
    model's context leaves no room for a prompt.
    """
    tokenizer = options.tokenizer
    length, room = longest_prompt(options, dataset)
    ids = tokenizer.encode(context + question)
    if len(ids) <= length:
        return context, question, False
    while True:
        half = length // 2
        if half < 1:
            raise TaskError(
                f"longbench/{dataset.name}: {options.max_tokens} tokens leave no room for a prompt beside "
                f"{dataset.max_new_tokens} generated ones and the official margin of 500; raise max_tokens"
            )
        text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
        excess = len(tokenizer.encode(text)) - room
        if excess <= 0:
            break
        length -= excess
    lost = not text.endswith(question)  # some of it; else it survived whole, whatever the text begins with
    common = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(text), reversed(question), strict=False))
    border = len(context) if lost and text.startswith(context) else len(text) - sum(1 for _ in common)
    return text[:border], text[border:], True


@cache
def official_template(dataset: Dataset) -> str:
    """Return the official prompt template, with `{context}` and `{input}`, from the installed lm-eval's task file.

    Raises TaskError when lm-eval is missing, or its template is, or is not the official one after `EDITS`.
    """
    remedy = f"install lm_eval=={LM_EVAL}"
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError(f"LongBench's prompts are read from lm-eval, which is not installed; {remedy}")
    path = Path(next(iter(spec.submodule_search_locations)), "tasks", "longbench", f"{dataset.name}.yaml")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # imports nothing for a tag
        text = str(content["doc_to_text"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise TaskError(f"lm-eval {version('lm_eval')} has no prompt of longbench/{dataset.name}; {remedy}") from None
    text = re.sub(r"\{\{\s*context\s*\}\}", "{context}", text)
    text = re.sub(r"\{\{\s*(?:question|input)\s*\}\}", "{input}", text)
    missing, wanted = EDITS.get(dataset.name, ("", ""))
    if wanted not in text:
        text = text.replace(missing, wanted)
    if not hashlib.sha256(text.encode()).hexdigest().startswith(dataset.template):
        raise TaskError(
            f"the prompt of longbench/{dataset.name} in lm-eval {version('lm_eval')} is not the official one; {remedy}"
        )
    return text


for _dataset in DATASETS:
    task(LongBench(_dataset))
    if _dataset.samples_e is not None:
        task(LongBench(_dataset, by_length=True))
