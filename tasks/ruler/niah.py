"""RULER's eight needle tasks. Source: NVIDIA/RULER@c3f5e3b, scripts/data/synthetic/niah.py and constants.py.

Differences: keys, and values, of one prompt are distinct (NVIDIA draws with replacement); the order of several
needles is drawn per sample (NVIDIA shuffles with one fixed seed, so it is the same in all samples); below 4096
tokens, where a haystack may be a single line, a needle may also come after the last line. With drawn contexts, noise
and essays are a span of `tasks.pool` of its own for each sample; NVIDIA's are the same noise, or head of the essays.
"""

from dataclasses import dataclass
from functools import partial
from random import Random

from tasks.essays import Essays
from tasks.pool import Spans
from tasks.ruler.corpus import DRAWS, NOISE, distinct
from tasks.ruler.family import SMALL, DrawnText, FittedPrompt, SamplePlan

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
)
QUESTION = "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"))
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # the 40 rounded points of linspace(0, 100) in percent


@dataclass(frozen=True)
class Needles:
    """One row of NVIDIA's table: k keys with v values each, q of them asked for."""

    haystack: str  # noise | needle | essay
    keys: str  # words | uuids
    values: str  # numbers | uuids
    k: int = 1
    v: int = 1
    q: int = 1


ROWS = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", k=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", v=4),
    "niah_multiquery": Needles("essay", "words", "numbers", k=4, q=4),
}


class NeedleGenerator(DrawnText):
    """Draws the prompts of one row. Units: words of prose, or lines.

    essays: the haystack's text where it is fixed. spans: its texts where it is drawn.
    """

    generation = 128

    def __init__(self, row: Needles, essays: Essays | None = None, *, spans: Spans | None = None) -> None:
        self.row = row
        self.essays = essays
        self.spans = spans
        self.prose = essays is not None or spans is not None

    def units(self, length: int, index: int) -> int | None:
        return None if self.spans is None else self.spans.at(length, index).words

    def least(self, length: int, index: int) -> int:
        return 20 if self.prose else self.row.k * self.row.v

    def build(self, units: int, plan: SamplePlan) -> FittedPrompt:
        row, draw = self.row, plan.draw
        keys = distinct(row.k, lambda: DRAWS[row.keys](draw))
        values = distinct(row.k * row.v, lambda: DRAWS[row.values](draw))
        owned = {key: values[i * row.v : (i + 1) * row.v] for i, key in enumerate(keys)}
        asked = draw.sample(keys, row.q)
        wanted = [self._needle(key, value) for key in asked for value in owned[key]]
        others = [self._needle(key, value) for key in keys if key not in asked for value in owned[key]]
        haystack = self._hide(wanted, others, self._lines(units, keys, plan), plan)
        meta: dict[str, object] = {"needles": wanted, **self._group(plan)}
        if len(wanted) == 1:
            meta["depth"] = round(100 * haystack.index(wanted[0]) / max(1, len(haystack) - len(wanted[0])))
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        filled = partial(fill, kind=row.values, query=query, singular=len(wanted) == 1)
        answers = tuple(value for key in asked for value in owned[key])
        return FittedPrompt(filled(TEMPLATE, haystack), filled(QUESTION), filled(ANSWER_PREFIX), answers, meta)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.row.values, key=key, value=value)

    def _group(self, plan: SamplePlan) -> dict[str, str]:
        """The text of the haystack by name; nothing where it is made for the sample."""
        if span := self.span(plan):
            return {"group": span.group}
        fixed = {"essay": "essays:0", "noise": "noise"}
        return {"group": fixed[self.row.haystack]} if self.row.haystack in fixed else {}

    def _lines(self, units: int, keys: list[str], plan: SamplePlan) -> list[str]:
        """The haystack without needles: sentences of `units` words, or `units` lines."""
        if text := self.span(plan) or self.essays:
            return text.head(units)
        return [NOISE] * units if self.row.haystack == "noise" else self._distractors(units, set(keys), plan.draw)

    def _hide(self, wanted: list[str], others: list[str], lines: list[str], plan: SamplePlan) -> str:
        """The haystack with its needles. A single wanted one stands where the plan says, the others at random."""
        if self.prose:
            places = [int(len(lines) * (depth / 100)) for depth in DEPTHS]
        else:
            places = list(range(len(lines) + (plan.length < SMALL)))
        single = [places.pop(int(plan.at * len(places)))] if len(wanted) == 1 else []
        needles = [*wanted, *others]
        chosen = [*single, *plan.draw.sample(places, len(needles) - len(single))]
        parts, last = [], 0
        for place, needle in sorted(zip(chosen, needles, strict=True)):
            parts += [lines[last:place], [needle]]
            last = place
        parts.append(lines[last:])
        if self.prose:
            return " ".join(" ".join(part) for part in parts)  # an empty part leaves its space, as NVIDIA's does
        return "\n".join(line for part in parts for line in part)

    def _distractors(self, count: int, taken: set[str], draw: Random) -> list[str]:
        lines: list[str] = []
        while len(lines) < count:
            key = DRAWS[self.row.keys](draw)
            if key not in taken:
                taken.add(key)
                lines.append(self._needle(key, DRAWS[self.row.values](draw)))
        return lines


def fill(template: str, context: str = "", *, kind: str, query: str, singular: bool) -> str:
    """Return a template filled, in the singular where one value is asked for."""
    if singular:
        for plural, single in SINGULAR:
            template = template.replace(plural, single)
        kind = kind.removesuffix("s")
    return template.format(type_needle_v=kind, query=query, context=context)
