"""What observing costs: a prefill with what a method observes less a plain one, on some prompts of a run.

The cells of a sample share one prefill that observes for all of them, so their records cannot tell. On the first few
contexts of each length that was asked for, whatever their tasks, and of each data set, the prompt is prefilled again:
plainly, and once for each different `Needs`. The cost follows the length; to measure it for every generated task would
more than double a short run. All of it happens in the process and with the threads that ran the cells. The order turns
round from context to context, so that a machine that gets slower or faster favours nobody in their median. A difference
is kept as measured: noise may make it negative. What cannot be measured costs the record this number, never its score.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from harness.engine.engine import Engine
from harness.plan.sweep import PlannedSample
from methods.base import Needs

log = logging.getLogger("harness")

Observed = Mapping[tuple[str, str], int]
"""Task and id of every sample that is measured, to its turn: odd ones go backwards."""


def observed(groups: Iterable[Sequence[PlannedSample]], *, lengths: Sequence[int], count: int) -> Observed:
    """The samples of the first `count` contexts of each of `lengths`, and of each task without one of them.

    groups: all that a run consists of, in its order, so that every session of it finds the same. lengths: as asked for.
    """
    found: dict[tuple[str, str], int] = {}
    seen: dict[str | int, int] = {}
    for group in groups:
        name, length = group[0].task.name, group[0].sample.meta.get("length", 0)
        place: str | int = length if length in lengths else name
        number = seen.setdefault(place, 0)
        seen[place] += 1
        if number < count:
            turn = list(seen).index(place) + number  # alternates within a place, and over places where each has one
            found |= {(name, planned.sample.id): turn for planned in group}
    return found


def at_prefill(needs: Needs) -> Needs:
    """What of `needs` is gathered while a prompt is prefilled."""
    return replace(needs, decode_attention=False)


def observe_ms(engine: Engine, ids: Sequence[int], needs: Iterable[Needs], *, turn: int) -> dict[Needs, float]:
    """Milliseconds that each of `needs` (of `at_prefill`) adds to a prefill of `ids`; it lacks what failed.

    None at all cost 0 by definition. turn: an odd one goes through them backwards.
    """
    plain = Needs()
    order = list(dict.fromkeys([plain, *needs]))
    seconds: dict[Needs, float] = {}
    for own in order[:: -1 if turn % 2 else 1] if order[1:] else ():
        try:
            seconds[own] = engine.prefill(ids, own).clock.seconds("prefill")
        except (RuntimeError, MemoryError) as error:  # out of memory, mostly; the cells have their scores already
            told = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("what observing %s costs was not measured on %d tokens: %s", own, len(ids), told)
    known = {own: 1000 * (spent - seconds[plain]) for own, spent in seconds.items()} if plain in seconds else {}
    return {**known, plain: 0.0}
