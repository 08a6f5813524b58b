"""Roll-outs of the offline compiler: many ways to keep one prompt's cache, judged on its answer in one forward.

The prompt is prefilled once. Every row of a roll-out reads that same cache through a bias on each slot's logit: 0 keeps
a slot, minus infinity evicts it, and what lies between is a soft eviction that gradients flow through. As in a run, the
last prompt token votes, gives its slot up and is fed again, so the first answer token is compressed too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.layer_cache import LayerCache
from harness.errors import HarnessError
from methods.base import KV, Needs
from methods.views import Form, wide


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

    def attend(self, queries: Tensor, form: Form) -> Tensor:
        rows, _, count, dim = queries.shape
        heads = self.kv.keys.shape[1]
        folded = wide(queries).reshape(rows, heads, -1, dim)  # [R, H, G * Q, D]
        group = folded.shape[2] // count
        both = ((folded @ wide(keys).transpose(2, 3)).float() * form.scaling for keys in (self.kv.keys, self.own[0]))
        past, own = map(form.capped, both)  # [R, H, G * Q, T], [R, H, G * Q, Q]
        if self.bias is not None:
            past = past + self.bias.unsqueeze(2)
        at = torch.arange(count, device=queries.device)
        own = own.masked_fill((at[None, :] > at[:, None]).repeat(group, 1), float("-inf"))
        if form.window is not None:
            seen = self.kv.positions[0, 0] > (self.position + at)[:, None] - form.window
            seen &= self.kv.positions[0, 0] < self.position  # the last token is fed again
            past = past.masked_fill(~seen.repeat(group, 1), float("-inf"))
        logits = torch.cat([past, own], dim=-1).view(rows, heads, group, count, -1)
        weights = form.softmax(logits).view(rows, heads, group * count, -1)
        if self.watch is not None:
            self.watched = weights[..., self.watch].sum(dim=-1).mean(dim=-1)
        weights = weights.to(queries.dtype)
        slots = past.shape[-1]
        out = weights[..., :slots] @ self.kv.values + weights[..., slots:] @ self.own[1]
        return out.reshape(rows, -1, count, out.shape[-1])


class Rollout:
    """A prompt, prefilled with the full cache, and its answer of A >= 1 tokens.

    view: as policies see it. full: [A, V] log-probabilities of the full cache. Raises HarnessError for a model with
    layers through which an answer cannot go at once, or no gradient.
    """

    def __init__(self, engine: Engine, ids: Sequence[int], answer: Sequence[int], needs: Needs) -> None:
        if engine.model.mixed or any(engine.model.chunks):
            raise HarnessError("this model has linear or chunked attention layers, of which no tables are compiled")
        prefilled = engine.prefill(ids, needs)
        self.engine, self.view, self.compressible = engine, prefilled.view, prefilled.compressible
        self.kvs = []
        for layer in prefilled.layers:
            kv = layer.kv()  # cloned: tensors made in inference mode cannot take part in a gradient
            self.kvs.append(KV(kv.keys.clone(), kv.values.clone(), kv.positions.clone()))
        for seen, i in zip(self.view.layers, self.compressible, strict=True):
            seen.kv = self.kvs[i]  # the prefill's own tensors die here
        self.feed = [int(ids[-1]), *answer[:-1]]
        self.answer = torch.tensor(list(answer), device=engine.model.device)
        self.full = self.logprobs(self.all_kept())[0]

    @property
    def nbytes(self) -> int:
        """Memory that this prompt holds: its cache, what was observed of it, and the full cache's answer."""
        seen = [x for layer in self.view.layers for x in (layer.queries, layer.column_sums) if x is not None]
        return sum(kv.nbytes for kv in self.kvs) + sum(x.numel() * x.element_size() for x in [*seen, self.full])

    def all_kept(self) -> list[Tensor]:
        """Biases [1, H, T] of the full cache."""
        return [torch.zeros(self.kvs[i].positions.shape, device=self.answer.device) for i in self.compressible]

    def kept(self, kvs: Sequence[KV]) -> list[Tensor]:
        """Biases [1, H, T] of what a policy left."""
        biases = [torch.full_like(bias, float("-inf")) for bias in self.all_kept()]
        for bias, kv in zip(biases, kvs, strict=True):  # the last slot is shut anyway
            bias.scatter_(2, kv.positions.masked_fill(kv.positions < 0, self.view.tokens - 1).long(), 0.0)
        return biases

    def attention_on(self, tokens: Sequence[int]) -> Tensor:
        """Attention mass that the answer pays to some of the prompt's tokens with the full cache: [L, H] float32."""
        _, caches = self._forward(self.all_kept(), watch=torch.tensor(list(tokens)))
        return torch.stack([caches[i].watched[0] for i in self.compressible]).cpu()

    def logprobs(self, biases: Sequence[Tensor], *, grad: bool = False) -> Tensor:
        """Log-probabilities of the answer's tokens: [R, A, V] float32. biases: [R, H, T] of each compressible layer."""
        logits, _ = self._forward(biases, grad=grad)
        return logits.float().log_softmax(dim=-1)

    def _forward(
        self, biases: Sequence[Tensor], *, watch: Tensor | None = None, grad: bool = False
    ) -> tuple[Tensor, list[BiasedLayer]]:
        given: dict[int, Tensor] = {}
        for i, bias in zip(self.compressible, biases, strict=True):
            last = torch.zeros_like(bias)
            last[..., -1] = float("-inf")
            given[i] = bias + last
        caches = [BiasedLayer(kv, given.get(i), watch) for i, kv in enumerate(self.kvs)]
        ids = torch.tensor([self.feed] * len(biases[0]), device=self.answer.device)
        return self.engine.model.forward(ids, caches, position=self.view.tokens - 1, grad=grad), caches

    def losses(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence from the full cache, answer NLL) of each row: [R] each, nats a token, mean over the answer."""
        divergence = (self.full.exp() * (self.full - logprobs)).sum(dim=-1).mean(dim=-1)
        nll = -logprobs.gather(2, self.answer.expand(len(logprobs), -1).unsqueeze(-1)).squeeze(-1).mean(dim=-1)
        return divergence, nll
