"""What a policy sees of a prompt (views), what it asks to be observed, and what it leaves (KV).

Shape letters as in `methods.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from methods.budget import PolicyError
from methods.device import Doubt, placed, settle
from methods.needs import Needs as Needs
from methods.repeat import Repeat, Repeated

Rotate = Callable[[Tensor, int | Tensor], Tensor]
POSITION_BYTES = 4  # of a slot: which token it holds, an int32


@dataclass
class KV:
    """What is left of one layer's cache, and all the state a policy has: it dies with its sequence.

    keys, values: [B, H, S, D], RoPE applied to the keys.
    positions: [B, H, S] int32 (made so), the token each slot came from; -1 marks an empty slot.
    extra: side data a method stores with the slots; it counts as cache bytes, of live slots where it is [B, H, S, ...].
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = self.positions.to(torch.int32)

    def load(self) -> tuple[Tensor, Tensor]:
        """Return what attention reads, keys and values [B, H, S, D]. A subclass may store codes and decode here."""
        return self.keys, self.values

    def take(self, slots: Tensor) -> KV:
        """Make a new KV of the given slots. slots: [B, H, S'] int64, -1 leaves one empty. `extra` is not carried."""
        index = slots.clamp(min=0)
        positions = self.positions.gather(2, index).masked_fill(slots < 0, -1)
        first = torch.arange(0, self.positions.numel(), self.positions.shape[2], device=index.device)
        rows = (index + first.view(*index.shape[:2], 1)).flatten()
        return KV(_pick(self.keys, rows, index.shape), _pick(self.values, rows, index.shape), positions)

    @property
    def live(self) -> Tensor:
        """[B, H] int64: slots that hold a token."""
        return (self.positions >= 0).sum(dim=-1)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one head: key and value as they are and the position, without side data."""
        return sum(x.shape[-1] * x.element_size() for x in (self.keys, self.values)) + POSITION_BYTES

    @property
    def nbytes(self) -> int:
        """Measured cache bytes: live slots only, their positions and side data included."""
        return self.bytes_of(int(self.live.sum()))

    def bytes_of(self, live: int) -> int:
        """Return `nbytes`, given the number of live slots of all heads."""
        slots = self.positions.shape
        side = [x.nbytes // slots.numel() * live if x.shape[:3] == slots else x.nbytes for x in self.extra.values()]
        return live * self.slot_bytes + sum(side)

    def reads(self, live: int) -> int:
        """Return the bytes that attention reads for one decoded token, given the number of live slots of all heads.

        Keys and values, or what is stored in their place; positions and side data are not read for it.
        """
        return live * (self.slot_bytes - POSITION_BYTES)


def wide(x: Tensor) -> Tensor:
    """Return x in a type whose products of queries and keys do not overflow: float16 (65,504 at most) as float32."""
    return x.float() if x.dtype == torch.float16 else x


@dataclass(frozen=True, eq=False)
class Form:
    """What a layer's attention makes of the products of its queries and keys.

    scaling: factor of the products. window: tokens that a query looks back, itself included; None for all.
    softcap: c of logits c * tanh(x / c) (Gemma 2), None without.
    sinks: [1, H, G], one more logit in the softmax of each query head, which has no value (gpt-oss), None without.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """Logits of scaled products [...] float32."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def softmax(self, logits: Tensor) -> Tensor:
        """Weights of logits [B, H, G, ..., S] float32, in their place; with a sink they sum to less than 1."""
        if self.sinks is None:  # a second tensor of this size costs as much again
            return torch.softmax(logits, dim=-1, out=None if logits.requires_grad else logits)
        sink = self.sinks.float().view(*self.sinks.shape, *[1] * (logits.dim() - 3)).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]


def _pick(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows of x [B * H * S, D], as [*shape, D]: whole rows at once, which `gather` would copy number by number."""
    return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(*shape, x.shape[-1])


@dataclass(frozen=True)
class LayerSource:
    """Where a layer's keys and values came from.

    model: the whole model. module: the layer's attention. hidden: [B, T, E], what went into it.
    rope: cosines and sines of the prompt's positions, [B, T, D] each, or None for a model without. ids: [B, T], its
    tokens.
    """

    model: torch.nn.Module
    module: torch.nn.Module
    hidden: Tensor
    rope: tuple[Tensor, Tensor] | None
    ids: Tensor | None = None

    def then(self, more: LayerSource) -> LayerSource:
        """Of these tokens and those that came to the same layer after them."""
        rope = None
        if self.rope is not None and more.rope is not None:
            cos, sin = (torch.cat(own, dim=1) for own in zip(self.rope, more.rope, strict=True))
            rope = (cos, sin)
        ids = None if self.ids is None or more.ids is None else torch.cat([self.ids, more.ids], dim=1)
        return LayerSource(self.model, self.module, torch.cat([self.hidden, more.hidden], dim=1), rope, ids)


@dataclass
class LayerView:
    """What a policy sees of one layer after prefill.

    kv: the full cache of the prompt, S = T.
    queries: [B, H * G, W, D], RoPE applied, of the last W tokens (W as declared in `Needs`, at most T).
    form: of the layer's attention, whose window is None.
    column_sums: [B, H, G, T] float32 or None, attention received by token t from the queries t..T-1.
    rotate: turns keys [..., D] by a number of positions (RoPE), or each by its own [...].
    source: None unless `Needs` declares hidden states. module: the layer's attention, None unless it declares that.
    doubts: where `refuse` notes what it doubts, for the prompt's end; None to settle it at once.
    repeated: what each pass of `Needs.repeat` showed (`methods.repeat.repeated`), or what it raised.
    """

    index: int
    kv: KV
    queries: Tensor
    form: Form
    column_sums: Tensor | None = None
    rotate: Rotate | None = None
    source: LayerSource | None = None
    doubts: list[Doubt] | None = field(default=None, repr=False)
    module: torch.nn.Module | None = field(default=None, repr=False)
    repeated: Mapping[Repeat, Repeated | Exception] = field(default_factory=dict, repr=False)
    _memo: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        return int(self.kv.keys.shape[2])

    @property
    def scaling(self) -> float:
        """Factor of the attention logits."""
        return self.form.scaling

    @property
    def seen(self) -> int:
        """Tokens that there were so far: those of the prompt."""
        return self.tokens

    def only_live(self, scores: Tensor) -> Tensor:
        """Return scores [B, H, S] that choose no dead slot: -inf there; only a `GrownView` has any.

        Raises PolicyError for scores that are not finite.
        """
        return self.finite(scores, "scores")

    def finite(self, x: Tensor, what: str) -> Tensor:
        """Return x. Raises PolicyError, as `refuse`, when a number of it is not finite. what: they are, in plural."""
        bad = f"{{}} of {x.numel()} {what} of layer {self.index} are NaN or infinite"
        told = f"{bad}; mend the method, or try --dtype float32"
        self.refuse((x - x).count_nonzero(), told.format)  # a fourth of what `isfinite` costs
        return x

    def refuse(self, flaws: Tensor, told: Callable[[int], str]) -> None:
        """Raise PolicyError where a count [] is not 0: now, or with other layers' (`PromptView.asked_once`)."""
        doubt = Doubt(flaws, told)
        if self.doubts is None:
            settle([doubt])
        else:
            self.doubts.append(doubt)

    def last_queries(self, window: int) -> Tensor:
        """Return the last `window` tokens' queries: [B, Hq, W, D]. Raises PolicyError when fewer were observed."""
        observed = self.queries.shape[2]
        if window > observed:
            raise PolicyError(f"{window} window queries wanted, {observed} observed; declare it in needs")
        return self.queries[:, :, observed - window :]

    def attention(self, window: int) -> Tensor:
        """Return softmax attention of the last `window` tokens (T at most) over the prompt: [B, H, G, W, T] float32."""
        logits = self._logits(min(window, self.tokens))
        window, tokens = logits.shape[3:]
        future = torch.ones(window, window, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., tokens - window :].masked_fill_(future, float("-inf"))
        return self.form.softmax(logits)

    def _logits(self, window: int) -> Tensor:
        """Attention logits of the last `window` tokens, what is to come included: [B, H, G, W, S] float32."""
        queries, keys = wide(self.last_queries(window)), wide(self.kv.keys)
        batch, heads, slots, dim = keys.shape
        grouped = queries.reshape(batch, heads, -1, dim) * self.scaling  # [B, H, G * W, D]
        return self.form.capped((grouped @ keys.transpose(2, 3)).float()).view(batch, heads, -1, window, slots)

    def memo(self, key: Hashable, compute: Callable[[LayerView], Tensor]) -> Tensor:
        """Return `compute(self)`, once per key: scores that do not depend on the budget serve every budget of a run."""
        if key not in self._memo:
            self._memo[key] = compute(self)
        return self._memo[key]

    def forget(self) -> None:
        """Let go of all memos: a search among many policies would keep the scores of each."""
        self._memo.clear()


@dataclass
class OthersView(LayerView):
    """A layer without its protected tokens, which `whole` shows: they have no slots and get no score.

    others: [T'] int64, places of the tokens that are left. Positions are still the prompt's, and attention and column
    sums are what these tokens got in the whole prompt.
    """

    whole: LayerView = field(kw_only=True)
    others: Tensor = field(kw_only=True)

    @property
    def seen(self) -> int:
        return self.whole.seen

    def refuse(self, flaws: Tensor, told: Callable[[int], str]) -> None:
        self.whole.refuse(flaws, told)

    def attention(self, window: int) -> Tensor:
        """Return what the whole layer does, of the tokens that are left: [B, H, G, W, T'] float32."""
        return self.whole.attention(window)[..., self.others]

    @classmethod
    def of(cls, whole: LayerView, others: Tensor) -> OthersView:
        kv, sums = whole.kv, whole.column_sums
        left = KV(kv.keys[:, :, others], kv.values[:, :, others], kv.positions[:, :, others])
        seen = None if sums is None else sums[..., others]
        queries, rotate = whole.queries, whole.rotate
        again = {
            asked: own if isinstance(own, Exception) else replace(own, received=own.received[..., others])
            for asked, own in whole.repeated.items()
        }
        own = cls(whole.index, left, queries, whole.form, seen, rotate, repeated=again, whole=whole, others=others)
        own.module = whole.module
        return own


@dataclass
class GrownView(LayerView):
    """A layer that was compressed before and has grown since: slots that were kept, then those that came.

    Slots are in the order of their tokens, whose true positions they have. All layers and heads have as many; one that
    holds fewer has dead ones, position -1, behind the first `sinks` of its policy, else at the head. A dead slot is
    attended to by nobody, has no column sum, is never to be chosen (`only_live`), and stays dead if it is.

    end: tokens that there were so far. queries: of the last W of them. column_sums: what each slot got since its token
    came, from what was there then.
    """

    end: int = field(kw_only=True)

    @property
    def seen(self) -> int:
        return self.end

    def only_live(self, scores: Tensor) -> Tensor:
        dead = self.kv.positions < 0
        return self.finite(scores.masked_fill(dead, 0.0), "scores").masked_fill_(dead, float("-inf"))

    def attention(self, window: int) -> Tensor:
        """Return softmax attention of the last `window` tokens over the slots: [B, H, G, W, S] float32.

        A query all of whose slots are gone gives none.
        """
        logits = self._logits(min(window, self.tokens))
        asked = torch.arange(self.end - logits.shape[3], self.end, device=logits.device)[:, None]
        slot = self.kv.positions.unsqueeze(2)
        hidden = (slot < 0) | (slot > asked)  # [B, H, W, S]
        return self.form.softmax(logits.masked_fill_(hidden.unsqueeze(2), float("-inf"))).nan_to_num_(0.0)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a prompt and the layers that a policy sees: T tokens, L layers, Hq query heads on H KV heads.

    protected: how many of the tokens are marked to be kept.
    """

    tokens: int
    layers: int
    query_heads: int
    kv_heads: int
    protected: int = 0


@dataclass
class PromptView:
    """What a policy that looks across layers sees: every layer, and the prompt's own log-probabilities.

    layers: the compressible layers in depth order (sliding-window layers are left alone and not shown).
    logprobs: [B, W] float32 or None, log-probability of each of the last W prompt tokens given what precedes it.
    protected: ascending places of the tokens that the prompt's author marks to be kept; only `protect` minds them.
    seen: tokens that there were so far, where layers have grown since they were compressed; None for a prompt.
    """

    layers: list[LayerView]
    logprobs: Tensor | None = None
    protected: tuple[int, ...] = ()
    seen: int | None = None

    @property
    def tokens(self) -> int:
        return self.layers[0].tokens

    @property
    def sizes(self) -> Sizes:
        first = self.layers[0]
        heads, kv_heads = int(first.queries.shape[1]), int(first.kv.keys.shape[1])
        tokens = self.tokens if self.seen is None else self.seen
        return Sizes(tokens, len(self.layers), heads, kv_heads, len(self.protected))

    @cached_property
    def others(self) -> PromptView:
        """The prompt without its protected tokens, made once for all policies and budgets."""
        own = set(self.protected)
        left = placed([at for at in range(self.tokens) if at not in own], self.layers[0].kv.keys.device)
        return PromptView([OthersView.of(layer, left) for layer in self.layers], self.logprobs)

    @contextmanager
    def asked_once(self) -> Iterator[None]:
        """Settle what layers doubt at the end of all that is done inside, by one reading of the device.

        Raises PolicyError, after which nothing is memorised: it may hold what is wrong.
        """
        doubts: list[Doubt] = []
        for layer in self.layers:
            layer.doubts = doubts
        try:
            yield
        finally:
            for layer in self.layers:
                layer.doubts = None
            self._settle(doubts)

    def _settle(self, doubts: Sequence[Doubt]) -> None:
        try:
            settle(doubts)
        except PolicyError:
            for layer in self.layers:
                layer.forget()
            vars(self).pop("others", None)
            raise


@dataclass
class StepView:
    """One layer right after a decoded token attended, for policies that evict while decoding.

    B rows of one policy and budget; fields that a KV subclass adds are shared by them.

    kv: live view of the cache, the new token's slot included; its `extra` may be updated in place.
    attention: [B, H, G, S] float32 of the new token (0 at empty slots), or None when not declared in `Needs`.
    position: the new token's position.
    """

    kv: KV
    attention: Tensor | None
    position: int
    budget: int
