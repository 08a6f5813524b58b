"""Repeat: a prompt that is there goes through the model once more, chunk by chunk, and its keys show what is used.

Each chunk comes right after the prompt, whose full cache it attends to, and is forgotten before the next one: nothing
of a pass stays but what `methods.repeat.Repeated` holds. Weights are computed in blocks of queries, never all at once.
Layers with a sliding window, chunks of their own or states answer as after the prompt; no policy sees them.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.engine.kernels import causal_attention, column_peaks
from harness.engine.layer_cache import LayerCache
from harness.engine.states import States
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.wording import LAST, Span
from methods.budget import PolicyError
from methods.repeat import Repeat, Repeated
from methods.views import Form, LayerSource

if TYPE_CHECKING:
    from harness.engine.prefill import PrefillLayer

UNWORDED = "the model's tokenizer is unknown; give it along"
Part = tuple[range, list[int]]
"""Tokens of a prompt, and what is fed to have them repeated."""


class RepeatLayer(LayerCache):
    """A prefilled layer (R = 1) that answers tokens after its prompt without keeping them.

    chunk: the prompt's tokens whose weights are wanted. sinks: first ones that are weighed with them. sources: as of
    `AttachedModel.sources`, for weights over the length of the hidden state that asks. peaks: [1, H, G, chunk] float32.
    """

    def __init__(self, prompt: "PrefillLayer", chunk: range, sinks: int, sources: Sequence[LayerSource] | None) -> None:
        self.prompt, self.sources = prompt, sources
        first = prompt.begin if prompt.window is None else max(prompt.begin, prompt.tokens - prompt.window)
        self.before = [x[:, :, first:] for x in (prompt.keys, prompt.values)]
        self.own = [x[:, :, :0] for x in self.before]
        self.peaks: Tensor | None = None
        self._weighed = [slice(sinks), slice(chunk.start, chunk.stop)]  # together, in this order
        self._wanted = slice(sinks, sinks + len(chunk))

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.own = [torch.cat(pair, dim=2) for pair in zip(self.own, (keys, values), strict=True)]

    def restart(self) -> None:
        self.before, self.own = ([x[:, :, :0] for x in part] for part in (self.before, self.own))

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        if not self.prompt.apart:
            self._weigh(queries, form)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.before, self.own, strict=True))
        return causal_attention(queries, keys, values, form)[0]

    def _weigh(self, queries: Tensor, form: Form) -> None:
        keys = torch.cat([*(self.before[0][:, :, own] for own in self._weighed), self.own[0]], dim=2)
        rows = None
        if self.sources is not None:
            hidden = self.sources[self.prompt.index].hidden[:, -queries.shape[2] :]
            rows = 1 / hidden.float().norm(dim=-1)
        peaks = column_peaks(queries, keys, form, rows=rows)[..., self._wanted]
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)


def repeat(
    model: AttachedModel,
    ids: Sequence[int],
    layers: Sequence["PrefillLayer"],
    states: States,
    asked: frozenset[Repeat],
    *,
    step: int,
) -> list[dict[Repeat, Repeated | Exception]]:
    """Have a prompt repeated in every way of `asked`; what each compressible layer's keys got, or what went wrong.

    layers: after the prompt `ids`. states: after it. step: most tokens of a forward. Raises HarnessError where a
    request in words is wanted and `model` has no wording.
    """
    found: list[dict[Repeat, Repeated | Exception]] = [{} for _ in model.compressible]
    for own in sorted(asked, key=repr):
        span = _span(model, ids, own)
        shown: Sequence[Repeated | Exception]
        try:
            with model.same_lengths():
                shown = _passed(model, ids, layers, states, own, span, step)
        except Exception as error:  # it is the affair of those who asked: others have the prompt as it is
            shown = [error] * len(found)
        for of_layer, what in zip(found, shown, strict=True):
            of_layer[own] = what
    return found


def _span(model: AttachedModel, ids: Sequence[int], asked: Repeat) -> Span | None:
    if not asked.words:
        return None
    if model.wording is None:
        raise HarnessError(f"the prompt is to be repeated in words; {UNWORDED}")
    return model.wording.span(ids)


def _passed(
    model: AttachedModel,
    ids: Sequence[int],
    layers: Sequence["PrefillLayer"],
    states: States,
    asked: Repeat,
    span: Span | None,
    step: int,
) -> list[Repeated]:
    """What one pass shows of each compressible layer."""
    start, end = (0, len(ids)) if span is None else span[:2]
    heads, group = layers[0].keys.shape[1], model.heads[0] // model.heads[1]
    received = [torch.zeros(1, heads, group, len(ids), device=layers[i].keys.device) for i in model.compressible]
    for chunk, fed in _parts(ids, asked, span):
        weighed = chunk if asked.apart else range(len(ids))
        sinks = min(start if asked.sinks is None else asked.sinks, weighed.start)
        rows = _forward(model, fed, layers, states, asked, weighed, sinks, step)
        for peaks, i in zip(received, model.compressible, strict=True):
            own = rows[i].peaks
            assert own is not None
            at = peaks[..., weighed.start : weighed.stop]
            torch.maximum(at, own, out=at)
    if asked.normed:
        for peaks, i in zip(received, model.compressible, strict=True):
            peaks.mul_(added_length(layers[i].values, model.attention[i]))
    return [Repeated(peaks, start, end) for peaks in received]


def _forward(
    model: AttachedModel,
    fed: Sequence[int],
    layers: Sequence["PrefillLayer"],
    states: States,
    asked: Repeat,
    weighed: range,
    sinks: int,
    step: int,
) -> list[RepeatLayer]:
    """Every layer after a chunk's repetition `fed`."""
    given, after = torch.tensor([list(fed)], device=model.device), states.copy()
    with model.sources(asked.normed) as sources:
        told = sources if asked.normed else None
        rows = [RepeatLayer(layer, weighed, sinks, told) for layer in layers]
        for at in range(0, len(fed), step):
            model.forward(given[:, at : at + step], rows, position=layers[0].tokens + at, states=after, keep=1)
    return rows


def _parts(ids: Sequence[int], asked: Repeat, span: Span | None) -> Iterator[Part]:
    """The chunks of what is repeated."""
    start, end = (0, len(ids)) if span is None else span[:2]
    for at in range(start, end, asked.chunk):
        own = range(at, min(at + asked.chunk, end))
        text, request = list(ids[own.start : own.stop]), None if span is None else span.request
        if request is None:
            yield own, text
        elif at == start:
            yield own, [*request.whole, *request.closing, *text]
        else:
            yield own, [*request.part, *ids[max(start, at - LAST) : at], *request.closing, *text]


def added_length(values: Tensor, module: torch.nn.Module) -> Tensor:
    """Length of what each value [B, H, S, D] adds to a layer's output by each query head: [B, H, G, S] float32.

    Raises PolicyError for attention whose output projection is not `o_proj`.
    """
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] % (values.shape[1] * values.shape[3]):
        raise PolicyError(f"{type(module).__name__} has no plain o_proj; run methods that ask for no norms of outputs")
    batch, heads, slots, dim = values.shape
    own = weight.float().view(weight.shape[0], heads, -1, dim).permute(1, 2, 0, 3)  # [H, G, E, D]
    squares = own.transpose(2, 3) @ own  # [H, G, D, D]
    wide = values.float().unsqueeze(2)  # [B, H, 1, S, D]
    lengths: Tensor = ((wide @ squares) * wide).sum(dim=-1).clamp_(min=0).sqrt_()
    return lengths.view(batch, heads, -1, slots)
