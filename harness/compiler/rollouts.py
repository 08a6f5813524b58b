"""Roll-outs of the offline compiler: many ways to keep one prompt's cache, judged on its answer in one forward.

The prompt is prefilled once. Every row of a roll-out reads that same cache through a bias on each slot's logit: 0 keeps
a slot, minus infinity evicts it, and what lies between is a soft eviction that gradients flow through. As in a run, the
last prompt token votes, gives its slot up and is fed again, so the first answer token is compressed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.layer_cache import LayerCache
from methods.base import KV, Needs, PromptView


class BiasedLayer(LayerCache):
    """R rows that read one prompt's slots, each with a bias of its own; takes tokens once.

    kv: the whole prompt, batch 1. bias: [R, H, T] float32, or None where every slot is read (a sliding-window layer).
    watch: slots whose attention is added up in `watched`, [R, H]: mean over the tokens taken and the query group.
    """

    def __init__(self, kv: KV, bias: Tensor | None, watch: Tensor | None = None) -> None:
        self.kv, self.bias, self.watch = kv, bias, watch
        self.watched = torch.empty(0)
        self.position = int(kv.positions[0, 0, -1])

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.own = (keys, values)

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        rows, _, count, dim = queries.shape
        heads = self.kv.keys.shape[1]
        folded = queries.reshape(rows, heads, -1, dim)  # [R, H, G * Q, D]
        group = folded.shape[2] // count
        past = (folded @ self.kv.keys.transpose(2, 3)).float() * scaling  # [R, H, G * Q, T]
        own = (folded @ self.own[0].transpose(2, 3)).float() * scaling  # [R, H, G * Q, Q]
        if self.bias is not None:
            past = past + self.bias.unsqueeze(2)
        at = torch.arange(count, device=queries.device)
        own = own.masked_fill((at[None, :] > at[:, None]).repeat(group, 1), float("-inf"))
        if window is not None:
            seen = self.kv.positions[0, 0] > (self.position + at)[:, None] - window
            seen &= self.kv.positions[0, 0] < self.position  # the last token is fed again
            past = past.masked_fill(~seen.repeat(group, 1), float("-inf"))
        weights = torch.cat([past, own], dim=-1).softmax(dim=-1)
        if self.watch is not None:
            self.watched = weights[..., self.watch].sum(dim=-1).mean(dim=-1)
        weights = weights.to(queries.dtype)
        slots = past.shape[-1]
        out = weights[..., :slots] @ self.kv.values + weights[..., slots:] @ self.own[1]
        return out.reshape(rows, -1, count, out.shape[-1])


@dataclass
class Rollout:
    """A prefilled prompt and its answer. view: as policies see it. full: [A, V] log-probabilities of the full cache."""

    engine: Engine
    view: PromptView
    kvs: list[KV]
    compressible: list[int]
    feed: list[int]
    answer: Tensor
    full: Tensor

    @classmethod
    def prepare(cls, engine: Engine, ids: Sequence[int], answer: Sequence[int], needs: Needs) -> Rollout:
        """Prefill `ids` with the full cache and score `answer` (A >= 1 tokens) on it."""
        prefilled = engine.prefill(ids, needs)
        kvs = []
        for layer in prefilled.layers:
            kv = layer.kv()  # cloned: tensors made in inference mode cannot take part in a gradient
            kvs.append(KV(kv.keys.clone(), kv.values.clone(), kv.positions.clone()))
        compressible = prefilled.compressible
        for seen, i in zip(prefilled.view.layers, compressible, strict=True):
            seen.kv = kvs[i]  # the prefill's own tensors die here
        feed = [int(ids[-1]), *answer[:-1]]
        truth = torch.tensor(list(answer), device=engine.model.device)
        own = cls(engine, prefilled.view, kvs, compressible, feed, truth, torch.empty(0))
        own.full = own.logprobs([own.all_kept(i) for i in compressible])[0]
        return own

    @property
    def nbytes(self) -> int:
        """Memory that this prompt holds: its cache, what was observed of it, and the full cache's answer."""
        seen = [x for layer in self.view.layers for x in (layer.queries, layer.column_sums) if x is not None]
        return sum(kv.nbytes for kv in self.kvs) + sum(x.numel() * x.element_size() for x in [*seen, self.full])

    def all_kept(self, layer: int) -> Tensor:
        kv = self.kvs[layer]
        return torch.zeros(1, kv.keys.shape[1], kv.keys.shape[2], device=kv.keys.device)

    def attention_on(self, tokens: Sequence[int]) -> Tensor:
        """Attention mass that the answer pays to some of the prompt's tokens with the full cache: [L, H] float32."""
        caches = self._caches([self.all_kept(i) for i in self.compressible], torch.tensor(list(tokens)))
        self._forward(caches, 1, grad=False)
        return torch.stack([caches[i].watched[0] for i in self.compressible]).cpu()

    def logprobs(self, biases: Sequence[Tensor], *, grad: bool = False) -> Tensor:
        """Log-probabilities of the answer's tokens: [R, A, V] float32. biases: [R, H, T] of each compressible layer."""
        logits = self._forward(self._caches(biases), biases[0].shape[0], grad=grad)
        return logits.float().log_softmax(dim=-1)

    def _caches(self, biases: Sequence[Tensor], watch: Tensor | None = None) -> list[BiasedLayer]:
        caches = []
        given = dict(zip(self.compressible, biases, strict=True))
        for i, kv in enumerate(self.kvs):
            bias = given.get(i)
            if bias is not None:
                last = torch.zeros_like(bias)
                last[..., -1] = float("-inf")
                bias = bias + last
            caches.append(BiasedLayer(kv, bias, watch))
        return caches

    def _forward(self, caches: Sequence[LayerCache], rows: int, *, grad: bool) -> Tensor:
        ids = torch.tensor([self.feed] * rows, device=self.answer.device)
        return self.engine.model.forward(ids, caches, position=self.view.tokens - 1, grad=grad)

    def kept(self, kvs: Sequence[KV]) -> list[Tensor]:
        """Biases [1, H, T] of what a policy left."""
        biases = []
        for layer, kv in zip(self.compressible, kvs, strict=True):
            bias = torch.full_like(self.all_kept(layer), float("-inf"))
            live = kv.positions >= 0
            bias.scatter_(2, kv.positions.masked_fill(~live, self.view.tokens - 1), 0.0)  # the last slot is shut anyway
            biases.append(bias)
        return biases

    def losses(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence from the full cache, answer NLL) of each row: [R] each, nats a token, mean over the answer."""
        divergence = (self.full.exp() * (self.full - logprobs)).sum(dim=-1).mean(dim=-1)
        nll = -logprobs.gather(2, self.answer.expand(len(logprobs), -1).unsqueeze(-1)).squeeze(-1).mean(dim=-1)
        return divergence, nll
