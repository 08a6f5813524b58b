"""RULER's 13 synthetic tasks, `ruler/niah_single_1` to `ruler/qa_2`.

Source: https://arxiv.org/abs/2404.06654 and NVIDIA/RULER@c3f5e3b (scripts/synthetic.yaml). A RULER score is the plain
mean of the 13.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tasks.base import TaskOptions, task
from tasks.essays import read_essays
from tasks.ruler import qa
from tasks.ruler.cwe import CommonWords
from tasks.ruler.family import Origin, RulerTask
from tasks.ruler.fit import Generator
from tasks.ruler.fwe import CodedWords
from tasks.ruler.niah import ROWS, NeedleGenerator, Needles
from tasks.ruler.vt import ChainGenerator
from tasks.scoring import string_match_all, string_match_part


def _essay_facts(options: TaskOptions) -> Mapping[str, Any]:
    substitution = "NVIDIA reads these 49 essays and 169 web pages"
    return {**read_essays(options).provenance(), "substitution": substitution}


def _needles(options: TaskOptions, *, row: Needles) -> Generator:
    return NeedleGenerator(row, read_essays(options) if row.haystack == "essay" else None)


def _register() -> None:
    distinct = (
        "keys and values of one prompt are distinct",
        "the order of several needles is drawn per sample",
        "below 4096 tokens a needle may also come after the last line of a noise or needle haystack",
    )
    for name, row in ROWS.items():
        origin = Origin(deviations=distinct, facts=_essay_facts if row.haystack == "essay" else None)
        task(RulerTask(name, partial(_needles, row=row), metric=string_match_all, any_of=False, origin=origin))
    others: dict[str, tuple[Callable[[TaskOptions], Generator], str]] = {
        "vt": (
            lambda options: ChainGenerator(options.tokenizer),
            "below 4096 tokens the worked example has at most a quarter of the length; fewer than five noise lines are "
            "split into sentences",
        ),
        "cwe": (
            lambda _: CommonWords(),
            "words beyond wonderwords' are adjective-noun pairs (NVIDIA: a file of English words); `pairs` counts them",
        ),
        "fwe": (lambda _: CodedWords(), "the order of the text is drawn per sample"),
    }
    for name, (opened, deviation) in others.items():
        origin = Origin(deviations=(deviation,))
        task(RulerTask(name, opened, metric=string_match_all, any_of=False, origin=origin))
    for name, source in {"qa_1": qa.SQUAD, "qa_2": qa.HOTPOT}.items():
        origin = Origin(
            deviations=(
                "the documents' order is drawn per sample",
                "questions whose own documents exceed the length are passed over",
                "a limit takes questions spread over the first 500 of the file, not the first ones",
            ),
            facts=partial(qa.provenance, source=source),
            find=partial(qa.find_file, source=source),
        )
        task(RulerTask(name, partial(qa.load, source=source), metric=string_match_part, any_of=True, origin=origin))


_register()
