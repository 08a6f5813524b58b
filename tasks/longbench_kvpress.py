"""LongBench by the evaluation protocol of kvpress: `longbench/kvpress/<dataset>`, 21 tasks.

Source: github.com/NVIDIA/kvpress 0.5.5: evaluation/evaluate.py, kvpress/pipeline.py, LongBench's
create_huggingface_dataset.py (which text is context, question and answer prefix) and calculate_metrics.py. The prompts
are the official ones, split by `parts`. `DIFFERS` says what differs from the official protocol, `DEVIATIONS` what
differs from kvpress.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tasks.base import DataOptions, Sample, Task, TaskError, TaskOptions, task
from tasks.longbench import DATASETS, Dataset, LongBench, official_template

EXTRA_TOKENS = 20  # create_huggingface_dataset.py adds them to every official generation length
ROW_CUES = {"trec": "Type:", "triviaqa": "Answer:", "samsum": "Summary:"}  # end of the row's input, not of the template

DIFFERS = (
    "the question is no part of the compressed context (run it with --query agnostic)",
    "the context goes on to the line that holds the question: instructions after the text are compressed with it",
    "every dataset is wrapped in the chat template, trec, triviaqa, samsum, lsht, lcc and repobench-p too",
    "the answer prefix stands after the chat template's end of the user message",
    "trec's, triviaqa's and samsum's cue is taken off the row's input when it is its very end, and always put after it",
    "20 more tokens are generated",
    "samsum's generation does not end at a newline and may be empty",
    "a context that is too long is cut at its end, not in its middle",
    "blanks before the first line of a few-shot answer are dropped, not newlines alone",
)
DEVIATIONS = (
    "a context is cut when context, question and generation exceed max_tokens; kvpress cuts it at the tokenizer's "
    "model_max_length and counts neither question nor generation",
    "context and question are one user message and tokenised together; kvpress tokenises them apart, and a chat "
    "template that trims the message does not reach the question's last newline there",
    "without a chat template kvpress puts a newline before the answer prefix",
    "end-of-text as first token ends generation; kvpress goes on",
)


class KvpressLongBench(Task):
    """One dataset, prompted and scored as kvpress does. Samples of one context follow each other."""

    protocol = "kvpress"
    query = "agnostic"

    def __init__(self, dataset: Dataset) -> None:
        self.official = LongBench(dataset)
        self.name = f"longbench/kvpress/{dataset.name}"
        self.about = replace(self.official.about, revision="2e00731, kvpress 0.5.5")

    def samples(self, options: TaskOptions) -> Iterator[Sample]:
        pieces = parts(official_template(self.official.dataset))
        rows = self.official.drawn(options)
        order = list(dict.fromkeys(row["context"] for row in rows))
        first = {text: number for number, text in enumerate(order)}
        for row in sorted(rows, key=lambda row: first[row["context"]]):
            yield self._sample(row, pieces, options)

    def score(self, sample: Sample, prediction: str) -> Mapping[str, float]:
        return self.official.score(sample, prediction.lstrip() if self.official.dataset.first_line else prediction)

    def find_data(self, options: DataOptions) -> None:
        self.official.find_data(options)

    def read_data(self, options: DataOptions) -> None:
        self.official.read_data(options)

    def provenance(self, options: TaskOptions) -> Mapping[str, Any]:
        own = {"differs_from_official": list(DIFFERS), "deviations": list(DEVIATIONS)}
        return {**self.official.provenance(options), **own}

    def _sample(self, row: Mapping[str, Any], pieces: tuple[str, str, str], options: TaskOptions) -> Sample:
        data = self.official.dataset
        context, question, prefix = pieces
        cue = ROW_CUES.get(data.name, "")
        given = row["input"].removesuffix(cue)
        head, tail = context.split("{context}")
        if data.name == "lcc":
            question = "{input}"  # empty in the official rows; kvpress puts it here, the official template nowhere
        question = question.replace("{input}", given)
        new_tokens = data.max_new_tokens + EXTRA_TOKENS
        room = options.max_tokens - new_tokens - max(1, options.tokenizer.template_tokens)
        whole = head + row["context"] + tail
        kept = cut_end(whole, question, cue or prefix, options=options, room=room)
        return Sample(
            id=row["_id"],
            context=kept,
            question=question,
            answers=tuple(row["answers"]),
            max_new_tokens=new_tokens,
            answer_prefix=cue or prefix,
            meta=self.official.meta(row) | {"truncated": kept != whole},
        )


def parts(template: str) -> tuple[str, str, str]:
    """Return an official template as (context, question, answer prefix), which joined are the template again.

    The answer prefix is the last line, as far as no placeholder reaches into it. The question begins with the line of
    `{input}`, or, in a template without it, with the first text after `{context}` and its newlines.
    """
    last = re.search(r"[^\n}]*\n?\Z", template)
    body = template if last is None else template[: last.start()]
    after = body.index("{context}") + len("{context}")
    at = body.find("{input}")
    border = max(after, body.rfind("\n", 0, at) + 1) if at >= 0 else len(body) - len(body[after:].lstrip("\n"))
    return body[:border], body[border:], template[len(body) :]


def cut_end(context: str, question: str, prefix: str, *, options: TaskOptions, room: int) -> str:
    """Return the context, or as many of its first tokens as leave the whole prompt within `room` tokens.

    Raises TaskError when there is no room for any of it.
    """
    tokenizer = options.tokenizer
    ids = tokenizer.encode(context)
    room -= len(tokenizer.encode(prefix))
    keep, text = len(ids), context
    while (excess := len(tokenizer.encode(text + question)) - room) > 0:
        keep -= excess
        if keep < 1:
            raise TaskError(f"{options.max_tokens} tokens leave no room for a context; raise max_tokens")
        text = tokenizer.decode(ids[:keep])
    return text


for _dataset in DATASETS:
    task(KvpressLongBench(_dataset))
