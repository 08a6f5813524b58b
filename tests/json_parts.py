"""Every part of a JSON value, and the value with one part changed: what a damaged file may be."""

from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis

HALF = "cut \ud83d here"
"""Half of a surrogate pair in a text."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has parts, first items of lists alone."""
    inside = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))[:1]
        if isinstance(value, list)
        else []
    )
    return [path, *(place for key, part in inside for place in places(part, (*path, key)))]


def changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    """A copy with one part replaced; taken out where `to` is ..."""
    if not place:
        return to
    copy = list(value) if isinstance(value, list) else dict(value)
    if to is ... and len(place) == 1:
        del copy[place[0]]
    else:
        copy[place[0]] = changed(value[place[0]], place[1:], to)
    return copy


def damages(good: Any, values: Sequence[Any], *, under: Any = None) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every part of `good` replaced by every value: its place and the damaged copy.

    The suite tries some of them, `make hostile` all. under: first key of the places.
    """
    found = [(place, value) for place in places(good)[1:] if under in (None, place[0]) for value in values]
    step = 1 if hypothesis.settings().max_examples > 25 else 7  # a step that no number of values has as a factor
    yield from ((place, changed(good, place, value)) for place, value in found[::step])
