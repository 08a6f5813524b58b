"""RULER's 13 synthetic tasks, `ruler/niah_single_1` to `ruler/qa_2`.

Source: https://arxiv.org/abs/2404.06654 and NVIDIA/RULER@c3f5e3b (scripts/synthetic.yaml). A RULER score is the plain
mean of the 13.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tasks.base import TaskOptions, task
from tasks.essays import read_essays
from tasks.ruler import qa
from tasks.ruler.aggregation import CodedWords, CommonWords
from tasks.ruler.family import Generator, RulerTask, drawn_spans
from tasks.ruler.niah import ROWS, NeedleGenerator, Needles
from tasks.ruler.vt import ChainGenerator
from tasks.scoring import string_match_all, string_match_part


def _essay_facts(options: TaskOptions) -> Mapping[str, Any]:
    return {
        **read_essays(options).provenance(),
        "substitution": "NVIDIA reads these 49 essays and 169 web pages",
    }


def _needles(options: TaskOptions, *, name: str, row: Needles) -> Generator:
    if row.haystack == "needle":
        return NeedleGenerator(row)
    if spans := drawn_spans(f"ruler/{name}", options, NeedleGenerator.generation):
        return NeedleGenerator(row, spans=spans)
    return NeedleGenerator(row, read_essays(options) if row.haystack == "essay" else None)


def _chains(options: TaskOptions) -> Generator:
    return ChainGenerator(options.tokenizer, drawn_spans("ruler/vt", options, ChainGenerator.generation))


for _name, _row in ROWS.items():
    _needle_task = partial(RulerTask, facts=_essay_facts) if _row.haystack == "essay" else RulerTask
    task(
        _needle_task(
            _name,
            partial(_needles, name=_name, row=_row),
            string_match_all,
            "keys and values of one prompt are distinct",
            "the order of several needles is drawn per sample",
            "below 4096 tokens a needle may also come after the last line of a noise or needle haystack",
        )
    )
task(
    RulerTask(
        "vt",
        _chains,
        string_match_all,
        "below 4096 tokens the worked example has at most a quarter of the length; fewer than five noise lines are "
        "split into sentences",
    )
)
task(
    RulerTask(
        "cwe",
        lambda options: CommonWords(),
        string_match_all,
        "words beyond wonderwords' are adjective-noun pairs (NVIDIA: a file of English words); `pairs` counts them",
    )
)
task(RulerTask("fwe", lambda options: CodedWords(), string_match_all, "the order of the text is drawn per sample"))
for _name, _file in qa.FILES.items():
    task(
        RulerTask(
            _name,
            _file.load,
            string_match_part,
            "the documents' order is drawn per sample",
            "questions whose own documents exceed the length are passed over",
            "a limit takes questions spread over the first 500 of the file, not the first ones",
            facts=_file.provenance,
            find=_file.find,
            read=_file.load,
        )
    )
