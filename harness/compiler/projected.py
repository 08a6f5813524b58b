"""A roll-out seen through low-rank bases: what MatryoshkaKV's calibration differentiates and compares.

Keys and values of the prompt and of the answer itself, minus their head's mean, go into an orthogonal basis that is cut
to its first columns, each row of the roll-out at ranks of its own. A cut is a mask over the latents, so all rows share
those of the prompt. Letters as in `methods.base`, and R rows, A answer tokens, D* key or value numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from harness.compiler.rollouts import BiasedLayer, Rollout
from harness.engine.layer_cache import LayerCache
from methods.base import KV, Needs
from methods.views import Form

SEEN = Needs(window=1)
LEVELS = 8
"""Ranks that a head's keys (values) may have: so many eighths of D*, one at least. Of 128 numbers the authors' 16."""


@dataclass(frozen=True, eq=False)
class Bases:
    """Of all compressible layers: columns [L, H, D*, D*], orthogonal, the most worth first, and means [L, H, D*]."""

    keys: Tensor
    values: Tensor
    key_mean: Tensor
    value_mean: Tensor

    @cached_property
    def items(self) -> int:
        """How many ranks there are: keys and values of every layer and head."""
        return 2 * self.key_mean.shape[0] * self.key_mean.shape[1]

    def full(self) -> Tensor:
        """Levels [2, L, H] int64, of keys and of values, at which nothing is cut."""
        return torch.full((2, *self.key_mean.shape[:2]), LEVELS, device=self.keys.device)

    def detached(self) -> "Bases":
        return Bases(*(getattr(self, own.name).detach() for own in fields(self)))


class ProjectedLayer(LayerCache):
    """R rows that read one layer's prompt and their own tokens through its bases; takes tokens once.

    kv: the prompt without its last token, batch 1. at: the layer's place in `bases`. levels: [R, 2, H].
    """

    def __init__(self, kv: KV, bases: Bases, at: int) -> None:
        self.columns = bases.keys[at], bases.values[at]
        self.means = bases.key_mean[at].unsqueeze(1), bases.value_mean[at].unsqueeze(1)  # [H, 1, D*]
        self.past = self._latents(kv.keys, kv.values)
        self.masks: tuple[Tensor, ...] = ()

    def cut(self, levels: Tensor) -> None:
        """Set the rows' ranks. levels: [R, 2, H], of keys and of values."""
        places = [torch.arange(own.shape[-1], device=levels.device) * LEVELS // own.shape[-1] for own in self.columns]
        self.masks = tuple((place < levels[:, kind, :, None, None]).float() for kind, place in enumerate(places))

    def _latents(self, *states: Tensor) -> tuple[Tensor, ...]:
        """Latents of keys and values [R, H, S, D*], float32."""
        both = zip(states, self.means, self.columns, strict=True)
        return tuple((x.float() - mean) @ columns for x, mean, columns in both)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.own = self._latents(keys, values)

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        rows, heads, count, dim = queries.shape[0], self.means[0].shape[0], queries.shape[2], queries.shape[3]
        folded = queries.float().reshape(rows, heads, -1, dim)  # [R, H, G * A, D]
        group = folded.shape[2] // count
        latent = folded @ self.columns[0] * self.masks[0]
        constant = folded @ self.means[0].mT  # [R, H, G * A, 1]: of no account but under a soft cap
        both = (_shared(latent, self.past[0].mT), latent @ self.own[0].mT)
        past, own = (form.capped((products + constant) * form.scaling) for products in both)
        ahead = torch.ones(count, count, dtype=torch.bool, device=queries.device).triu(1)
        own = own.masked_fill(ahead.repeat(group, 1), float("-inf"))
        logits = torch.cat([past, own], dim=-1).view(rows, heads, group, count, -1)
        weights = form.softmax(logits).view(rows, heads, group * count, -1)
        slots = past.shape[-1]
        out = _shared(weights[..., :slots], self.past[1]) + weights[..., slots:] @ self.own[1]
        out = out * self.masks[1] @ self.columns[1].mT + self.means[1] * weights.sum(dim=-1, keepdim=True)
        return out.to(queries.dtype).reshape(rows, -1, count, out.shape[-1])


def _shared(rows: Tensor, shared: Tensor) -> Tensor:
    """Products of each row's [R, H, Q, x] with what all rows share [1, H, x, y], which is not copied for each."""
    count, heads, queries, _ = rows.shape
    joined = rows.transpose(0, 1).flatten(1, 2) @ shared[0]
    return joined.view(heads, count, queries, -1).transpose(0, 1)


class Projected:
    """A roll-out's prompt in the latents of some bases."""

    def __init__(self, rollout: Rollout, bases: Bases) -> None:
        self.rollout, self.caches = rollout, list[LayerCache]()
        places = {layer: at for at, layer in enumerate(rollout.compressible)}
        for layer, kv in enumerate(rollout.kvs):
            before = KV(kv.keys[:, :, :-1], kv.values[:, :, :-1], kv.positions[:, :, :-1])
            seen = ProjectedLayer(before, bases, places[layer]) if layer in places else BiasedLayer(kv, None)
            self.caches.append(seen)

    def logprobs(self, levels: Tensor, *, grad: bool = False) -> Tensor:
        """Log-probabilities of the answer's tokens: [R, A, V] float32. levels: [R, 2, L, H]."""
        return self._forward(levels, grad=grad).float().log_softmax(dim=-1)

    def hidden(self, levels: Tensor) -> Tensor:
        """The last hidden states of the answer's tokens: [R, A, E] float32. levels: [R, 2, L, H]."""
        found = list[Tensor]()
        base = self.rollout.engine.model.model.base_model
        hook = base.register_forward_hook(lambda module, given, out: found.append(out.last_hidden_state))
        try:
            self._forward(levels, keep=1)
        finally:
            hook.remove()
        return torch.cat(found, dim=1).float()

    def _forward(self, levels: Tensor, *, grad: bool = False, keep: int = 0) -> Tensor:
        rollout, own = self.rollout, [cache for cache in self.caches if isinstance(cache, ProjectedLayer)]
        for at, cache in enumerate(own):
            cache.cut(levels[:, :, at])
        ids = torch.tensor([rollout.feed] * len(levels), device=rollout.answer.device)
        position = rollout.view.tokens - 1
        return rollout.engine.model.forward(ids, self.caches, position=position, keep=keep, grad=grad)


def losses(rollout: Rollout, bases: Bases, levels: Sequence[Tensor]) -> Tensor:
    """(divergence from the full cache, answer NLL) of some levels: [2, R], nats a token, mean over the answer."""
    return torch.stack(rollout.losses(Projected(rollout, bases).logprobs(torch.stack(list(levels)))))
