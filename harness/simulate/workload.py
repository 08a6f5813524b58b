"""What a simulated run has to do: items with seconds, as recorded, or as a fit of them says of a full sweep.

An item is what goes to a worker at once: a sample (or the questions of one context) under all its cells. Its recorded
seconds are one prefill, the compression of every cell and every decode batch; a batch is in the records of all its
rows. Scoring and tokenizing are in no record, so they are not here either.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import log
from operator import mul
from statistics import median

import numpy as np
from scipy.optimize import nnls

from harness.errors import HarnessError
from harness.records.record import Record
from harness.records.spec import QueryMode

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # of RULER's paper
MEAN_LENGTH = {
    **{"narrativeqa": 18409, "qasper": 3619, "multifieldqa_en": 4559, "multifieldqa_zh": 6701, "hotpotqa": 9151},
    **{"2wikimqa": 4887, "musique": 11214, "dureader": 15768, "gov_report": 8734, "qmsum": 10614},
    **{"multi_news": 2113, "vcsum": 15380, "trec": 5177, "triviaqa": 8209, "samsum": 6258},
    **{"lsht": 22337, "passage_count": 11141, "passage_retrieval_en": 9289, "passage_retrieval_zh": 6745, "lcc": 1235},
    **{"repobench-p": 4206},
}
"""Average length of LongBench's datasets in words, of the Chinese ones in characters (THUDM/LongBench@072a5a7,
LongBench/task.md)."""
SPREAD = 0.586  # standard deviation of the logarithm of `length` within a dataset, pooled over 249 rows of all 21
TOKENS_PER = {"en": 1.54, "code": 3.19, "zh": 1.72}
"""Tokens of SmolLM2's tokenizer per word, or per Chinese character, over the contexts of the same rows."""
CUT = 500  # tokens below the model's context at which LongBench cuts a prompt
ID_BYTES = 4  # of a token id that the driver holds


@dataclass(frozen=True)
class Work:
    """An item to be simulated."""

    seconds: float
    tokens: int  # of its prompt
    order: int  # what the driver sorts by, the largest first
    records: int
    nbytes: float  # of its records as lines


@dataclass(frozen=True)
class Shape:
    tokens: int  # of its prompt
    cells: int
    batches: float  # in which it is decoded
    steps: float  # generated tokens of the longest row of every batch, summed
    scored: float  # the same of reference tokens

    @property
    def terms(self) -> tuple[tuple[float, ...], ...]:
        """What the seconds of the prefill, of the compressions and of the decode batches are linear in."""
        n = float(self.tokens)
        decode = self.batches, self.steps, self.steps * n, self.scored
        return (1.0, n, n * n), (self.cells, self.cells * n), decode


@dataclass(frozen=True)
class Recorded:
    """An item of a stored run."""

    shape: Shape
    parts: tuple[float, float, float]  # seconds of its prefill, compressions and decode batches
    records: int
    generated: int  # tokens, over all records

    @property
    def seconds(self) -> float:
        return sum(self.parts)


@dataclass(frozen=True)
class Fit:
    factors: tuple[tuple[float, ...], ...]  # of `Shape.terms`
    ratios: tuple[float, ...]  # recorded over fitted seconds, per item
    longest: int  # most tokens of a fitted prompt

    def seconds(self, shape: Shape) -> float:
        return float(sum(map(mul, chain(*self.factors), chain(*shape.terms))))

    def lines(self) -> list[str]:
        (a, b, c), (d, e), (f, g, h, i) = self.factors
        off = sorted(abs(ratio - 1) for ratio in self.ratios)
        return [
            f"seconds of an item = {a:.3g} + {b:.3g} n + {c:.3g} n^2 for a prompt of n tokens, + {d:.3g} + {e:.3g} n a "
            f"cell, + {f:.3g} a decode batch, + {g:.3g} + {h:.3g} n a token it generates, + {i:.3g} a token it scores",
            f"fitted to {len(off)} items of up to {self.longest:,} tokens; recorded against fitted seconds: off by "
            f"{100 * median(off):.0f} % in the median, {100 * off[int(0.95 * (len(off) - 1))]:.0f} % at the 95th "
            f"percentile, {100 * off[-1]:.0f} % at most",
        ]


def recorded_items(records: Sequence[Record], query: QueryMode) -> list[Recorded]:
    """Gather the items of a run that have seconds. Raises HarnessError when none has."""
    groups: dict[tuple[str, str | float], list[Record]] = {}
    for record in records:
        shared = query == "agnostic" and record.prefill_s > 0  # the questions of a context have one prefill
        groups.setdefault((record.task, record.prefill_s if shared else record.sample_id), []).append(record)
    items = [item for own in groups.values() if (item := _item(own)).seconds > 0]
    if not items:
        raise HarnessError(f"none of {len(records)} records has seconds; simulate a run in which cells were run")
    return items


def _item(own: Sequence[Record]) -> Recorded:
    decoded = sorted((r for r in own if r.decode_rows), key=_batch)
    steps = scored = 0.0
    for _, rows in groupby(decoded, key=_batch):
        batch = list(rows)
        whole = len(batch) / batch[0].decode_rows  # more than one where batches are alike to the last digit
        steps += whole * max(len(record.token_ids) for record in batch)
        scored += whole * max(record.nll_tokens for record in batch)
    compress = {(record.method, record.budget): record.compress_s for record in own}
    decode_s = sum(record.decode_s / record.decode_rows for record in decoded)
    parts = max(record.prefill_s for record in own), sum(compress.values()), decode_s
    batches = sum(1 / record.decode_rows for record in decoded)
    shape = Shape(max(record.prompt_tokens for record in own), len(compress), batches, steps, scored)
    return Recorded(shape, parts, len(own), sum(len(record.token_ids) for record in own))


def _batch(record: Record) -> tuple[str, float, int]:
    """Tell batches apart: rows of one batch have the same seconds to the last digit."""
    return record.sample_id, record.decode_s, record.decode_rows


def as_recorded(items: Sequence[Recorded], *, line_bytes: float, speedup: float) -> list[Work]:
    """Repeat the run itself, with the bytes of a line given, `speedup` times as fast."""
    sized = ((item, item.shape.tokens, item.records) for item in items)
    return [Work(i.seconds / speedup, n, n + i.generated, records, records * line_bytes) for i, n, records in sized]


def fit(items: Sequence[Recorded]) -> Fit:
    """Fit by least squares with no factor below zero, so that no extrapolation is.

    Raises HarnessError when prompts of fewer than three lengths were recorded.
    """
    sizes = {item.shape.tokens for item in items}
    if len(sizes) < 3:
        raise HarnessError(
            f"prompts of {len(sizes)} lengths are recorded, a fit needs 3; give a run with more --lengths, "
            "or repeat this one with --tasks recorded"
        )
    factors = []
    for part in range(3):
        terms = np.array([item.shape.terms[part] for item in items])
        scale = np.where(terms.any(axis=0), np.abs(terms).max(axis=0), 1.0)
        found, _ = nnls(terms / scale, np.array([item.parts[part] for item in items]))
        factors.append(tuple(map(float, found / scale)))
    bare = Fit(tuple(factors), (), max(sizes))
    ratios = tuple(item.seconds / max(bare.seconds(item.shape), 1e-12) for item in items)
    return Fit(bare.factors, ratios, bare.longest)


def longbench(*, max_tokens: int, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (prompt tokens, tokens to generate) of every sample of LongBench, of lengths drawn about `MEAN_LENGTH`."""
    from tasks.longbench import DATASETS

    draw = np.random.default_rng([seed, 1])
    for dataset in DATASETS:
        middle = log(MEAN_LENGTH[dataset.name] * TOKENS_PER[dataset.language]) - SPREAD**2 / 2
        for tokens in draw.lognormal(middle, SPREAD, dataset.samples):
            yield max(1, min(round(tokens), max_tokens - CUT)), dataset.max_new_tokens


def ruler(*, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (prompt tokens, tokens to generate) of every sample of RULER's 13 tasks. A length counts both."""
    from tasks.ruler.aggregation import CodedWords, CommonWords
    from tasks.ruler.family import OFFICIAL_SAMPLES
    from tasks.ruler.niah import ROWS, NeedleGenerator
    from tasks.ruler.qa import Documents
    from tasks.ruler.vt import ChainGenerator

    others = ChainGenerator, CommonWords, CodedWords, Documents, Documents
    generated = [*[NeedleGenerator.generation] * len(ROWS), *(generator.generation for generator in others)]
    for length in lengths:
        for new in generated:
            yield from [(length - new, new)] * OFFICIAL_SAMPLES


def extrapolated(
    prompts: Sequence[tuple[int, int]],
    items: Sequence[Recorded],
    fitted: Fit,
    *,
    line_bytes: float,
    speedup: float,
    seed: int,
) -> list[Work]:
    """Make items of other prompts under the recorded cells: fitted seconds, times the ratio of a drawn recorded item.

    prompts: (tokens, tokens to generate), all of which are generated.
    """
    cells = max(item.shape.cells for item in items)
    batches, scored = (median(getattr(item.shape, name) for item in items) for name in ("batches", "scored"))
    ratios = np.random.default_rng([seed, 2]).choice(fitted.ratios, len(prompts))
    work = []
    for (tokens, new), ratio in zip(prompts, ratios, strict=True):
        seconds = fitted.seconds(Shape(tokens, cells, batches, batches * new, scored)) * float(ratio) / speedup
        work.append(Work(seconds, tokens, tokens + cells * new, cells, cells * line_bytes))
    return work
