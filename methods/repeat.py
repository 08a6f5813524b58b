"""A second pass that a policy may ask for: the prompt is given once more after itself, and its keys show what is used.

Shape letters as in `methods.base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from methods.budget import PolicyError

if TYPE_CHECKING:
    from methods.views import LayerView

WHOLE = 2**31
"""A `chunk` as long as any prompt."""


@dataclass(frozen=True)
class Repeat:
    """How a prompt is repeated, chunk by chunk, each right after the prompt as though there were no other.

    words: whether the model is asked for it (KVzip's words, within the chat template); False: the tokens alone.
    chunk: tokens of a chunk. apart: whether a chunk's queries are weighed over the prompt's keys of that chunk (and
    their own), as though the others were not there; the model itself sees them. sinks: first tokens of the prompt that
    are weighed with each chunk; None for all that the chat template puts before the user's text. normed: weights are
    divided by the length of the hidden state that asks and multiplied by the length of what the value adds to the
    layer's output.
    """

    words: bool = True
    chunk: int = 2000
    apart: bool = True
    sinks: int | None = None
    normed: bool = False


@dataclass(frozen=True, eq=False)
class Repeated:
    """What a layer's keys got while the prompt was repeated.

    received: [B, H, G, T] float32, the most that a query paid to each token; 0 outside of what was repeated.
    start, end: the tokens of the prompt that were repeated; those before and behind are the chat template's.
    """

    received: Tensor
    start: int
    end: int


def repeated(view: LayerView, asked: Repeat) -> Repeated:
    """Return what a layer got by a pass. Raises PolicyError where `Needs` lacks it; what the pass raised, if it did."""
    found = view.repeated.get(asked)
    if found is None:
        raise PolicyError("the prompt was not repeated; declare it in needs")
    if isinstance(found, Exception):
        raise found.with_traceback(None)
    return found
