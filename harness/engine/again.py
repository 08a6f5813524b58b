"""Compress again: what a policy left of a prompt has grown by a turn of a conversation, and is compressed anew.

The turn, whose tokens are known by then, goes through what the policy had left once more, all at once, to be observed
as a prompt is: so decoding gathers nothing. What it computes is what decoding computed, up to rounding. Window queries
and column sums go on from those of the prompt; a prompt's last token that was held back and fed again has been asked
for twice in the sums, as in `h2o@paper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.engine.compress import Compressed, weighed
from harness.engine.kernels import slot_attention
from harness.engine.layer_cache import LayerCache, visible
from harness.engine.packed import without
from harness.engine.prefill import Prefilled
from harness.engine.states import States
from harness.engine.transformers_seam import AttachedModel
from methods.base import KV, KVPolicy, PolicyError, PromptView
from methods.device import read
from methods.views import Form, GrownView, Rotate, wide

UNKNOWN = {"hidden_states": "hidden states are", "logprobs": "logprobs are", "repeat": "its repetition is"}
"""Of `Needs`, what no turn brings."""


@dataclass(frozen=True)
class Noted:
    """What was observed of a compressible layer, for the next time that it is compressed.

    queries: [1, Hq, W, D], of the last tokens. sums: [1, H, G, S] float32, column sums of the slots that are left; None
    where the policy needs none.
    """

    queries: Tensor
    sums: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.queries.nbytes + (0 if self.sums is None else self.sums.nbytes)


def why_not(prefilled: Prefilled, left: Compressed) -> str | None:
    """Why what a policy left of a prompt cannot be compressed again; None where it can."""
    needs, name = left.policy.needs, type(left.policy).__name__
    if prefilled.protected:
        return f"{name} cannot compress again: tokens are marked to be kept, which is known of the prompt alone"
    unknown = [told for what, told in UNKNOWN.items() if getattr(needs, what)]
    if unknown:
        return f"{name} cannot compress again: {unknown[0]} observed of a whole prompt alone"
    for kv in (left.kvs[i] for i in left.compressible):
        if type(kv) is not KV or kv.extra:
            what = ", ".join(kv.extra) or type(kv).__name__
            return f"{name} cannot compress again: it leaves more than keys and values ({what})"
    return None


def note(prefilled: Prefilled, left: Compressed) -> list[Noted]:
    """What there is to go on from after a prompt was compressed: of each compressible layer."""
    noted, wanted = [], left.policy.needs
    for view, index in zip(prefilled.view.layers, left.compressible, strict=True):
        sums = view.column_sums if wanted.column_sums else None
        if sums is not None:
            sums = _of_slots(sums, left.kvs[index].positions)
        noted.append(Noted(_last(view.queries, wanted.window).clone(), sums))
    return noted


def compress_again(
    model: AttachedModel, held: Compressed, noted: Sequence[Noted], ids: Sequence[int], start: int
) -> tuple[Compressed, list[Noted]]:
    """What the policy of `held` leaves of it once the tokens `ids` have come, the first of them at position `start`.

    noted: of the compressible layers of `held`. Raises PolicyError when it leaves not one KV for each of them, and
    whatever else the policy raises.
    """
    layers, states = pass_turn(model, held, noted, ids, start)
    shown = [layers[i] for i in held.compressible]
    slots, sinks = max(map(max, read([layer.most for layer in shown]))), _sinks(held.policy)
    views = [layer.view(at, slots=slots, sinks=sinks, rotate=model.rotate) for at, layer in enumerate(shown)]
    end = start + len(ids)
    view = PromptView([*views], seen=end)
    with torch.inference_mode(), view.asked_once():
        kept = held.policy.compress(view, held.budget)
    if len(kept) != len(views):
        name = type(held.policy).__name__
        raise PolicyError(f"{name} left {len(kept)} layers of {len(views)}; return one KV a layer")
    left = dict(zip(held.compressible, kept, strict=True))
    kvs = [left[i] if i in left else layer.in_window() for i, layer in enumerate(layers)]
    now = replace(held, tokens=end, states={end: states}, **weighed(kvs, held.compressible, end, states))
    kvs = now.kvs
    return now, [_carried(view, kvs[i]) for view, i in zip(views, held.compressible, strict=True)]


def pass_turn(
    model: AttachedModel, held: Compressed, noted: Sequence[Noted], ids: Sequence[int], start: int
) -> tuple[list[GrownLayer], States]:
    """Every layer of `held` after the tokens of a turn. Arguments as of `compress_again`."""
    of_layer = dict(zip(held.compressible, noted, strict=True))
    modules = model.attention if held.policy.needs.module else [None] * len(held.kvs)
    pairs = zip(held.kvs, modules, strict=True)
    layers = [GrownLayer(kv, held, of_layer.get(i), start, own) for i, (kv, own) in enumerate(pairs)]
    given, states = torch.tensor([list(ids)], device=model.device), held.states[start].copy()
    model.forward(given, layers, position=start, states=states, keep=1)
    return layers, states


class GrownLayer(LayerCache):
    """What was kept of a layer (R = 1), to which the tokens of a turn come in one forward. noted: None: no policy's."""

    def __init__(
        self, kv: KV, held: Compressed, noted: Noted | None, start: int, module: torch.nn.Module | None
    ) -> None:
        self.module = module
        kv = without(kv, start)  # the prompt's last token, which is fed again
        self.keys, self.values = kv.load()
        self.positions, self.end = kv.positions, start
        self.window: int | None = None
        self.wanted, self.noted = held.policy.needs, noted
        if noted is not None:
            known = noted.queries.shape[2] - (held.tokens - start)
            sums = None if noted.sums is None else noted.sums[..., : kv.positions.shape[2]]
            self.noted = Noted(noted.queries[:, :, :known], sums)

    @property
    def most(self) -> Tensor:
        """Live slots of the head that has most, []."""
        return (self.positions >= 0).sum(dim=-1).max()

    def append(self, keys: Tensor, values: Tensor) -> None:
        new = torch.arange(self.end, self.end + keys.shape[2], dtype=torch.int32, device=keys.device)
        self.keys, self.values = (torch.cat(x, dim=2) for x in ((self.keys, keys), (self.values, values)))
        self.positions = torch.cat([self.positions, new.expand(keys.shape[:3])], dim=2)
        self.end += keys.shape[2]

    def restart(self) -> None:
        self.keys, self.values, self.positions = (x[:, :, :0] for x in (self.keys, self.values, self.positions))

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        self.form, self.window = form, form.window
        asked = torch.arange(self.end - queries.shape[2], self.end, device=queries.device)
        mask = visible(self.positions, asked, form.window)
        if self.noted is not None:
            self.noted = self._noted(self.noted, queries, mask)
        return slot_attention(queries, self.keys, self.values, form, mask=mask)

    def _noted(self, before: Noted, queries: Tensor, mask: Tensor) -> Noted:
        last = _last(torch.cat([before.queries, queries], dim=2), self.wanted.window)
        if before.sums is None:
            return Noted(last, None)
        heads, (new, slots) = self.keys.shape[1], mask.shape[2:]
        logits = wide(queries).reshape(1, heads, -1, queries.shape[3]) @ wide(self.keys).transpose(2, 3)
        logits = self.form.capped(logits.float() * self.form.scaling).view(1, heads, -1, new, slots)
        weights = self.form.softmax(logits.masked_fill_(~mask.unsqueeze(2), float("-inf")))
        return Noted(last, weights.sum(dim=3) + pad(before.sums, (0, slots - before.sums.shape[3])))

    def view(self, index: int, *, slots: int, sinks: int, rotate: Rotate) -> GrownView:
        """The layer as its policy sees it, with `slots` slots in every head: at least as many as one has live ones."""
        assert self.noted is not None
        order = _in_order(self.positions, slots, sinks)
        kv, sums = KV(self.keys, self.values, self.positions).take(order), self.noted.sums
        if sums is not None:
            at = order.clamp(min=0).unsqueeze(2).expand(-1, -1, sums.shape[2], -1)
            sums = sums.gather(3, at).masked_fill(kv.positions.unsqueeze(2) < 0, 0.0)
        own = GrownView(index, kv, self.noted.queries, self.form, sums, rotate, end=self.end)
        own.module = self.module
        return own

    def in_window(self) -> KV:
        """The slots that later tokens can still see of a layer with a window or chunks, which is all it keeps."""
        slots = int(self.most) if self.window is None else min(self.window, int(self.most))
        order = _in_order(self.positions, slots, 0)
        return KV(self.keys, self.values, self.positions).take(order)


def _in_order(positions: Tensor, slots: int, sinks: int) -> Tensor:
    """Columns of positions [1, H, S], ascending, dead ones behind the first `sinks`: [1, H, slots] int64.

    -1 where there are not so many columns.
    """
    order = pad(positions.argsort(dim=-1, stable=True), (max(0, slots - positions.shape[2]), 0), value=-1)
    order = order[..., order.shape[2] - slots :]
    live = (positions >= 0).sum(dim=-1, keepdim=True)
    dead, first = slots - live, live.clamp(max=sinks)
    at = torch.arange(slots, device=positions.device).expand(order.shape)
    return order.gather(2, torch.where(at < first, at + dead, torch.where(at < first + dead, at - first, at)))


def _of_slots(x: Tensor, positions: Tensor) -> Tensor:
    """What each slot [1, H, S] has of x [1, H, G, T], a number a token; 0 for a dead one."""
    at = positions.clamp(min=0).long().unsqueeze(2).expand(-1, -1, x.shape[2], -1)
    return x.gather(3, at).masked_fill(positions.unsqueeze(2) < 0, 0.0)


def _carried(view: GrownView, kept: KV) -> Noted:
    """What was observed by `view`, for the slots that are `kept` of it."""
    if view.column_sums is None:
        return Noted(view.queries, None)
    positions, sums = view.kv.positions, view.column_sums
    at = positions.masked_fill(positions < 0, view.end).long().unsqueeze(2).expand(sums.shape)
    of_tokens = sums.new_zeros(*sums.shape[:3], view.end + 1).scatter(3, at, sums)
    return Noted(view.queries, _of_slots(of_tokens, kept.positions))


def _last(queries: Tensor, window: int) -> Tensor:
    return queries[:, :, max(0, queries.shape[2] - window) :]


def _sinks(policy: KVPolicy) -> int:
    """First slots that a policy always keeps, its own or those of the one that it goes around."""
    return int(getattr(getattr(policy, "inner", None) or policy, "sinks", 0))
