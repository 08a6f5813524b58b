"""One method at one budget by itself, as it would serve: prefill, compress, decode, with the seconds of each.

Nothing is shared with other methods. A policy whose layers need no other (`KVPolicy.per_layer`) compresses a layer as
soon as the prompt's last token has passed it, so the full cache never exists at once. A prompt may be prefilled in
chunks, which bounds the activations. The first token comes from the prefill, as it does when serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engine.decode import Session
from harness.engine.evicting_cache import EvictingLayer, EvictingRow, with_room
from harness.engine.row_cache import LayerCache, PrefillLayer, RowsLayer
from harness.engine.transformers_seam import AttachedModel
from harness.speed.clock import PhaseClock
from methods.base import KV, KVPolicy, LayerView, Needs, PromptView


class IsolatedLayer(PrefillLayer):
    """A layer that is compressed as soon as the whole prompt has passed it. compress: None to keep everything."""

    def __init__(self, needs: Needs, tokens: int, *, index: int, model: AttachedModel, clock: PhaseClock) -> None:
        super().__init__(needs, tokens)
        self.index, self.model, self.clock = index, model, clock
        self.compress: Callable[[LayerView], KV] | None = None
        self.left: KV | None = None

    def attend(self, queries: Tensor, *, scaling: float, window: int | None) -> Tensor:
        out = super().attend(queries, scaling=scaling, window=window)
        if self.compress is not None and self.seen == self.tokens:
            with self.clock.part("compress"):
                self.left = self.compress(self.view())
            self.release()
        return out

    def observe(self, queries: Tensor, lse: Tensor | None) -> None:
        with self.clock.part("observe"):
            super().observe(queries, lse)

    def view(self) -> LayerView:
        return LayerView(self.index, self.kv(), self.queries, self.scaling, self.sums, self.model.rotate)

    def release(self) -> None:
        """Give the full cache and what was observed of it back."""
        del self.keys, self.values, self.queries
        self.whole, self.sums = [], None


@dataclass
class Compressed:
    """A prompt after compression. kvs: of every model layer. logits: [1, V] after its last token.

    prefill_s, observe_s, compress_s: seconds apart; their sum is the time to the first token but for its choice.
    """

    kvs: list[KV]
    logits: Tensor
    tokens: int
    prefill_s: float
    observe_s: float
    compress_s: float

    @property
    def layer_bytes(self) -> list[int]:
        """Live key, value and side-data bytes of each layer."""
        return [kv.nbytes for kv in self.kvs]


@dataclass
class Decoded:
    """Tokens of each prompt and the seconds of every step after the first token, which the prefill gave."""

    tokens: list[list[int]]
    step_s: list[float]


class Isolated:
    """Runs prompts under one policy and budget. chunk: tokens of a prefill forward, None for all at once."""

    def __init__(self, model: AttachedModel, policy: KVPolicy, budget: int | None, *, chunk: int | None = None) -> None:
        self.model, self.policy, self.budget, self.chunk = model, policy, budget, chunk

    def prefill(self, ids: Sequence[int]) -> Compressed:
        """Prefill and compress one prompt. Raises what the policy raises."""
        clock, tokens = PhaseClock(self.model.device), len(ids)
        budget = tokens if self.budget is None else self.budget
        with clock.part("all"), torch.inference_mode():
            layers = [
                IsolatedLayer(self.policy.needs, tokens, index=i, model=self.model, clock=clock)
                for i in range(self.model.layers)
            ]
            own = [layers[i] for i in self.model.compressible]
            acts = self.policy.per_layer(budget, self.model.sizes(tokens))
            for layer, act in zip(own, acts or (), strict=bool(acts)):
                layer.compress = act
            logits, logprobs = self._forward(ids, layers)
            if acts is None:
                with clock.part("compress"):
                    kept = self.policy.compress(PromptView([layer.view() for layer in own], logprobs), budget)
                for layer, kv in zip(own, kept, strict=True):
                    layer.left = kv
            kvs = [layer.kv() if layer.left is None else layer.left for layer in layers]
        observe, compress = clock.seconds("observe"), clock.seconds("compress")
        return Compressed(kvs, logits, tokens, clock.seconds("all") - observe - compress, observe, compress)

    def decode(self, prompts: list[Compressed], new_tokens: int) -> Decoded:
        """Greedy tokens of prompts of the same length, as one batch, end-of-text ignored. Takes the prompts' caches."""
        picked = [int(prompt.logits.argmax()) for prompt in prompts]
        decoded = Decoded([[token] for token in picked], [])
        with torch.inference_mode():
            session = self._session(prompts, new_tokens - 1)
            for _ in range(new_tokens - 1):
                start = time.perf_counter()
                picked = session.step(picked).max(dim=-1).indices.tolist()  # waits for a GPU
                decoded.step_s.append(time.perf_counter() - start)
                for own, token in zip(decoded.tokens, picked, strict=True):
                    own.append(token)
        return decoded

    def _forward(self, ids: Sequence[int], layers: Sequence[LayerCache]) -> tuple[Tensor, Tensor | None]:
        """Logits [1, V] after the last token, and log-probabilities [1, W] of the last tokens where they are needed."""
        tokens, wanted = len(ids), self.policy.needs.window if self.policy.needs.logprobs else 0
        given = torch.tensor([list(ids)], device=self.model.device)
        found: list[Tensor] = []
        step, logits = self.chunk or tokens, torch.empty(0)
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            first = max(start, tokens - 1 - wanted)  # the first position whose logits are of use
            keep = max(1, end - first)
            logits = self.model.forward(given[:, start:end], layers, position=start, keep=keep).float()
            if wanted and end > first:
                told = given[:, end - keep + 1 : end + 1]
                found.append(logits[:, : told.shape[1]].log_softmax(dim=-1).gather(2, told.unsqueeze(-1)).squeeze(-1))
        return logits[:, -1], torch.cat(found, dim=1) if found else None

    def _session(self, prompts: list[Compressed], room: int) -> Session:
        """Layer caches of a batch; a layer's compressed KV is let go once it is copied."""
        tokens = prompts[0].tokens
        if any(prompt.tokens != tokens for prompt in prompts):
            raise ValueError(f"prompts of {sorted({p.tokens for p in prompts})} tokens; a batch has one length")
        caches: list[RowsLayer | EvictingLayer] = []
        for i in range(self.model.layers):
            kvs = [prompt.kvs.pop(0) for prompt in prompts]
            if self.policy.evicts_while_decoding:
                free = 1 if i in self.model.compressible else room
                rows = [
                    EvictingRow(self.policy, self.budget or tokens, with_room(kv, kv.positions.shape[2] + free))
                    for kv in kvs
                ]
                caches.append(EvictingLayer(rows, tokens))
            else:
                caches.append(RowsLayer(kvs, position=tokens, room=room))
        return Session(self.model, caches, len(prompts))
