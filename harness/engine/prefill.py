"""Prefill and observe: a prompt through the model once, with the full cache, and what policies see of it.

A layer keeps the whole prompt and gathers what the policies declared in `Needs`: the last queries, column sums of the
attention, what a repetition of it shows (`harness.engine.repeat`). A prompt may come in chunks, which bounds the
activations. A layer that is given an `act` is compressed as
soon as the prompt's last token has passed it, and its full cache is let go: so served, the full cache of all layers
never exists at once.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from harness.engine.clock import PhaseClock
from harness.engine.kernels import causal_attention, column_sums
from harness.engine.layer_cache import LayerCache
from harness.engine.repeat import repeat
from harness.engine.states import States
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import NotFinite
from harness.errors import HarnessError
from methods.base import KV, LayerView, Needs, PromptView
from methods.device import Doubt, settle
from methods.repeat import WHOLE, Repeat, Repeated
from methods.views import POSITION_BYTES, Form, LayerSource, Rotate

Act = Callable[[LayerView], KV]


@dataclass(eq=False, repr=False)
class PrefillLayer(LayerCache):
    """Keeps a prompt of `tokens` tokens (R = 1) and what `needs` asks for: window queries, streamed column sums.

    chunked: whether it sees its own chunk alone. act: compresses the layer once the prompt is through. clock: counts
    observation and compression apart. rotate: as in `LayerView`. sources: those of all layers, filled as the prompt
    passes them; empty when no policy asks. doubts: of all layers that `act` compresses, as in `LayerView`. repeated: as
    there, once it is known.
    """

    needs: Needs
    tokens: int
    index: int = 0
    chunked: bool = False
    act: Act | None = None
    clock: PhaseClock = field(default_factory=lambda: PhaseClock(torch.device("cpu")))
    rotate: Rotate | None = None
    sources: Sequence[LayerSource] = ()
    module: torch.nn.Module | None = None
    doubts: list[Doubt] | None = None
    repeated: Mapping[Repeat, Repeated | Exception] = field(default_factory=dict)
    left: KV | None = field(default=None, init=False)  # by `act`
    window: int | None = field(default=None, init=False)  # known once it attended
    seen: int = field(default=0, init=False)
    begin: int = field(default=0, init=False)  # the first token of the chunk
    whole: list[Tensor] = field(default_factory=list, init=False)  # keys and values of a prompt in chunks
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    queries: Tensor = field(init=False)
    sums: Tensor | None = field(default=None, init=False)

    def append(self, keys: Tensor, values: Tensor) -> None:
        first, self.seen = self.seen, self.seen + keys.shape[2]
        self.slot_bytes = sum(x[0, :, 0].nbytes for x in (keys, values))  # of a slot in every KV head
        self.position_bytes = POSITION_BYTES * keys.shape[1]  # and of its position, where that is not implied
        if keys.shape[2] == self.tokens:
            self.keys, self.values = keys.contiguous(), values.contiguous()  # heads first: policies take rows of slots
            return
        if not first:
            self.whole = [x.new_empty(*x.shape[:2], self.tokens, x.shape[3]) for x in (keys, values)]
        for whole, x in zip(self.whole, (keys, values), strict=True):
            whole[:, :, first : self.seen] = x
        self.keys, self.values = (whole[:, :, : self.seen] for whole in self.whole)

    def restart(self) -> None:
        self.begin = self.seen

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        self.form, self.window = form, form.window
        out, lse = causal_attention(queries, self.keys[:, :, self.begin :], self.values[:, :, self.begin :], form)
        if not self.apart:
            with self.clock.part("observe"):
                self._observe(queries, lse)
            if self.act is not None and self.seen == self.tokens:
                with self.clock.part("compress"):
                    self.left = self.act(self.view())
                del self.keys, self.values, self.queries
                self.whole, self.sums = [], None
        return out

    def _observe(self, queries: Tensor, lse: Tensor | None) -> None:
        """Gather what `needs` asks for from the queries of the tokens just appended. lse: as of `causal_attention`."""
        before = [] if self.seen == queries.shape[2] else [self.queries]
        self.queries = self._last(torch.cat([*before, self._last(queries)], dim=2))
        if self.needs.column_sums:
            sums = column_sums(queries, self.keys, lse, self.form)
            if self.sums is not None:
                sums[..., : self.sums.shape[-1]] += self.sums
            self.sums = sums

    def _last(self, queries: Tensor) -> Tensor:
        return queries[:, :, max(0, queries.shape[2] - self.needs.window) :]

    def view(self) -> LayerView:
        """The layer as policies see it."""
        source = self.sources[self.index] if self.sources else None
        observed = (self.form, self.sums, self.rotate, source, self.doubts, self.module, self.repeated)
        return LayerView(self.index, self.kv(), self.queries, *observed)

    @property
    def apart(self) -> bool:
        """Whether no policy sees it: it sees a sliding window or a chunk."""
        return self.chunked or self.window is not None

    @property
    def slots(self) -> int:
        """Slots of the full cache: the prompt's tokens, those that later tokens can still see, or the last chunk's."""
        return min(self.tokens - self.begin, self.tokens if self.window is None else self.window)

    def kv(self) -> KV:
        """The full cache; of a layer that is `apart`, what later tokens can still see, which is all it keeps then."""
        start = self.tokens - self.slots
        if self.keys.shape[2] > self.slots:
            self.keys, self.values = (x[:, :, start:].clone() for x in (self.keys, self.values))
            self.whole = []
        positions = torch.arange(start, self.tokens, dtype=torch.int32, device=self.keys.device)
        return KV(self.keys, self.values, positions.expand(self.keys.shape[:3]))


@dataclass
class Prefilled:
    """A prompt in the uncompressed cache, but for layers that were compressed on the way.

    compressible: indexes of the layers that policies see. logits: [1, V] float32 after the last token. logprobs: as in
    `PromptView`. protected: as there; set before `view` is asked for. states: by the position of the next token:
    the prompt's last one, and the one after it.
    """

    layers: list[PrefillLayer]
    compressible: list[int]
    logits: Tensor
    logprobs: Tensor | None
    tokens: int
    clock: PhaseClock
    states: dict[int, States]
    protected: tuple[int, ...] = ()

    @cached_property
    def view(self) -> PromptView:
        """The prompt as policies see it; what they memorise of it serves every cell."""
        return PromptView([self.layers[i].view() for i in self.compressible], self.logprobs, self.protected)

    def nbytes(self, budget: int) -> int:
        """Bytes of `budget` slots per layer and KV head with their positions; sliding windows and states at their size.

        A budget of the whole prompt is the full cache, whose positions need not be stored.
        """
        states = self.states[self.tokens].nbytes
        if budget >= self.tokens:
            return states + sum(x.slot_bytes * x.slots for x in self.layers)
        apart = sum(x.slot_bytes * x.slots for x in self.layers if x.apart)
        return states + apart + sum((x.slot_bytes + x.position_bytes) * budget for x in self.layers if not x.apart)

    def least(self, nbytes: int) -> int:
        """The smallest budget whose bytes are no fewer than these; all tokens for those of the full cache or more."""
        full = nbytes >= self.nbytes(self.tokens)  # without positions: a budget just below may take as many
        return self.tokens if full else 1 + bisect_left(range(1, self.tokens), nbytes, key=self.nbytes)


def prefill(
    model: AttachedModel,
    ids: Sequence[int],
    needs: Needs,
    *,
    chunk: int | None = None,
    acts: Sequence[Act] | None = None,
) -> Prefilled:
    """Run a prompt through the model with the full cache, gathering what `needs` asks for.

    Args:
        model: attached.
        ids: token ids, one at least.
        needs: of the policies that are to see the prompt.
        chunk: tokens of a forward; None for all at once.
        acts: what compresses each compressible layer as soon as it is prefilled; None to compress afterwards.

    Raises:
        HarnessError: every layer has a sliding window or chunks; hidden states that a model hides, or in chunks; chunks
            of a model whose layers cannot go on.
        PromptFailed: a token id that the model does not know.
        NotFinite: logits, or log-probabilities that are wanted, are not numbers.
        PolicyError: what `acts` raise, and what they doubted.
    """
    if not model.compressible:
        raise HarnessError("every layer of this model has a sliding window or chunks; there is nothing to compress")
    model.check_ids(ids)
    if needs.hidden_states and chunk is not None and chunk < len(ids):
        raise HarnessError(
            f"hidden states are wanted of a whole prompt, not of chunks of {chunk} tokens; leave --chunk out"
        )
    if needs.repeat and acts is not None:
        raise HarnessError(
            "layers that are compressed on the way cannot be attended to again; compress them afterwards"
        )
    if model.stepwise and chunk is not None and chunk < len(ids):
        raise HarnessError(
            f"this model's recurrent layers take a prompt as a whole, not {chunk} tokens by {chunk}; leave --chunk out"
        )
    clock, wanted = PhaseClock(model.device), needs.window if needs.logprobs else 0
    with clock.part("prefill"), model.sources(needs.hidden_states) as sources:
        act_of = dict(zip(model.compressible, acts or (), strict=acts is not None))
        doubts: list[Doubt] | None = [] if acts is not None else None
        shared: Any = {"clock": clock, "rotate": model.rotate, "sources": sources, "doubts": doubts}
        layers = [
            PrefillLayer(
                needs,
                len(ids),
                index=i,
                chunked=chunk_of is not None,
                act=act_of.get(i),
                module=model.attention[i] if needs.module else None,
                **shared,
            )
            for i, chunk_of in enumerate(model.chunks)
        ]
        logits, logprobs, states = _forward(model, ids, layers, chunk=chunk or len(ids), wanted=wanted)
    settle(doubts or [])
    best = logits.amax(dim=-1)  # as all that is NaN or too large shows; minus infinity bars a token
    if not bool(best.isfinite().all()) or (logprobs is not None and bool(logprobs.isnan().any())):
        raise NotFinite(f"after the prompt's {len(ids)} tokens")
    if needs.repeat:
        with clock.part("prefill"), clock.part("observe"):
            shown = repeat(model, ids, layers, states[len(ids)], needs.repeat, step=chunk or WHOLE)
        for i, own in zip(model.compressible, shown, strict=True):
            layers[i].repeated = own
    return Prefilled(layers, model.compressible, logits, logprobs, len(ids), clock, states)


def _forward(
    model: AttachedModel, ids: Sequence[int], layers: Sequence[LayerCache], *, chunk: int, wanted: int
) -> tuple[Tensor, Tensor | None, dict[int, States]]:
    """Logits [1, V] after the last token, log-probabilities [1, W] of the last `wanted` tokens, None for 0; states.

    States are those of `Prefilled`: where there are any, the last token goes by itself.
    """
    tokens, found, logits = len(ids), list[Tensor](), torch.empty(0)
    given, states = torch.tensor([list(ids)], device=model.device), States()
    starts = sorted({*range(0, tokens, chunk), *([tokens - 1] if model.mixed else [])})
    before_last = States()
    for start, end in pairwise([*starts, tokens]):
        before_last = states.copy() if end == tokens else before_last
        first = max(start, tokens - 1 - wanted)  # the first position whose logits are of use
        keep = max(1, end - first)
        logits = model.forward(given[:, start:end], layers, position=start, states=states, keep=keep).float()
        if wanted and end > first:
            told = given[:, end - keep + 1 : end + 1]
            found.append(logits[:, : told.shape[1]].log_softmax(dim=-1).gather(2, told.unsqueeze(-1)).squeeze(-1))
    logprobs = torch.cat(found, dim=1) if found else None
    return logits[:, -1], logprobs, {tokens - 1: before_last, tokens: states}
