"""Scoring all 4,750 predictions of LongBench on one thread; goal: under 10 seconds.

Text is made: words drawn by rank (Zipf), with full stops, in the lengths that predictions and references really have.
Every prediction is as long as generation allows.
"""

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jieba
import pytest

from tasks import load_tasks
from tasks.base import Sample
from tasks.scoring import rouge_l

pytestmark = pytest.mark.bench
SHARE = 0.75  # words a token in English; a token of Chinese is about one word


class Size(NamedTuple):
    """samples of a dataset, tokens of a prediction, references of a sample and words of one."""

    samples: int
    tokens: int
    references: int
    words: int
    chinese: bool = False


SIZES = {
    "narrativeqa": Size(200, 128, 2, 5),
    "qasper": Size(200, 128, 2, 10),
    "multifieldqa_en": Size(150, 64, 1, 10),
    "multifieldqa_zh": Size(200, 64, 1, 12, True),
    **dict.fromkeys(("hotpotqa", "2wikimqa"), Size(200, 32, 1, 3)),
    "musique": Size(200, 32, 2, 3),
    "dureader": Size(200, 128, 2, 100, True),
    "gov_report": Size(200, 512, 1, 640),
    "qmsum": Size(200, 512, 1, 65),
    "multi_news": Size(200, 512, 1, 250),
    "vcsum": Size(200, 512, 1, 200, True),
    **dict.fromkeys(("trec", "lsht"), Size(200, 64, 1, 1)),
    "triviaqa": Size(200, 32, 15, 4),
    "samsum": Size(200, 128, 1, 20),
    **dict.fromkeys(("passage_count", "passage_retrieval_en"), Size(200, 32, 1, 1)),
    "passage_retrieval_zh": Size(200, 32, 1, 1, True),
    **dict.fromkeys(("lcc", "repobench-p"), Size(500, 64, 1, 6)),
}
GOLD = {"passage_count": "7", "passage_retrieval_en": "Paragraph 7", "passage_retrieval_zh": "段落7"}


class Writer:
    """Draws text of so many words."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        jieba.initialize()
        frequent = sorted(jieba.dt.FREQ, key=lambda word: (-jieba.dt.FREQ[word], word))
        self._chinese = frequent[:5000]
        self._english = ["".join(self._draw.choices("etaoinshrdlu", k=self._draw.randint(2, 9))) for _ in range(5000)]
        self._weights = [1 / rank for rank in range(1, 5001)]

    def __call__(self, words: int, *, chinese: bool) -> str:
        drawn = self._draw.choices(self._chinese if chinese else self._english, self._weights, k=words)
        stop, blank = ("。", "") if chinese else (".", " ")
        ends = (stop if self._draw.random() < 1 / 20 else "" for _ in drawn)
        return blank.join(word + end for word, end in zip(drawn, ends, strict=True))


def made(name: str, size: Size, write: Writer) -> list[tuple[Sample, str]]:
    """Samples of one dataset with their predictions."""
    classes = [f"Class {n}" for n in range(50)]
    pairs = []
    for number in range(size.samples):
        answers = tuple(write(size.words, chinese=size.chinese) for _ in range(size.references))
        if name in ("trec", "lsht"):
            answers = (classes[number % 50],)
        meta = {"all_classes": classes, "dataset": name}
        sample = Sample(str(number), "", "", (GOLD[name],) if name in GOLD else answers, size.tokens, meta=meta)
        words = size.tokens if size.chinese else round(size.tokens * SHARE)
        pairs.append((sample, write(words, chinese=size.chinese)))
    return pairs


def test_scoring_of_4750_predictions(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write, tasks = Writer(0), load_tasks()
    work = {name: made(name, size, write) for name, size in SIZES.items()}
    assert sum(map(len, work.values())) == 4750
    seconds: dict[str, float] = {}

    def score() -> None:
        for name, pairs in work.items():
            start = time.perf_counter()
            for sample, prediction in pairs:
                assert 0 <= tasks[f"longbench/{name}"].score(sample, prediction)["score"] <= 1
            seconds[name] = time.perf_counter() - start

    benchmark.pedantic(score, rounds=3, iterations=1, warmup_rounds=1)
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:5]
    with capsys.disabled():
        print(f"\n4,750 predictions scored in {sum(seconds.values()):.2f} s (goal: under 10); most of it:")
        print("  " + ", ".join(f"{name} {spent:.2f}" for name, spent in slowest))


def test_rouge_l_of_long_summaries(note: Callable[..., None]) -> None:
    from rouge import Rouge

    write, package, ratios = Writer(1), Rouge(metrics=["rouge-l"]), []
    for _ in range(10):
        pair = write(384, chinese=False), write(640, chinese=False)
        start = time.perf_counter()
        ours = rouge_l(*pair)
        middle = time.perf_counter()
        theirs = package.get_scores([pair[0]], [pair[1]], avg=True)["rouge-l"]["f"]
        ratios.append((time.perf_counter() - middle) / (middle - start))
        assert ours == theirs
    note("ROUGE-L, 384 words against 640: package / ours", ratios)
