"""A Llama that takes a token at a time, with a loop over layers and heads: what cells are compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.engine.types import Outcome, Prompt

LAYERS, HEADS, GROUP, DIM = 4, 2, 2, 16
Visible = list[list[set[int]]]  # token positions that each layer and head sees, the present one's included


def turned(x: Tensor, places: list[int]) -> Tensor:
    """RoPE of vectors [S, D], each at its own place."""
    angle = torch.tensor(places)[:, None] / 10000 ** (torch.arange(0, DIM, 2) / DIM)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class Loops:
    """A Llama that takes a token at a time, with a loop over layers and heads; keys are stored before RoPE.

    in_cache: positions are counted inside what a head sees. sums: attention each token got, per layer and head.
    """

    llama: Any
    in_cache: bool = False
    keys: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    values: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    sums: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def token(self, token: int, position: int, visible: Visible) -> Tensor:
        """Logits [V] after `token` at `position`."""
        hidden = self.llama.model.embed_tokens.weight[token]
        for index, layer in enumerate(self.llama.model.layers):
            states = layer.input_layernorm(hidden)
            attention = layer.self_attn
            for name, store in (("k_proj", self.keys), ("v_proj", self.values)):
                for head, part in enumerate(getattr(attention, name)(states).split(DIM)):
                    store[index, head, position] = part
            parts = attention.q_proj(states).split(DIM)
            mixed = [self._head(part, index, i // GROUP, visible) for i, part in enumerate(parts)]
            hidden = hidden + attention.o_proj(torch.cat(mixed))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits: Tensor = self.llama.lm_head(self.llama.model.norm(hidden))
        return logits

    def _head(self, query: Tensor, layer: int, head: int, visible: Visible) -> Tensor:
        seen = sorted(visible[layer][head])
        places = list(range(len(seen))) if self.in_cache else seen
        keys = turned(torch.stack([self.keys[layer, head, at] for at in seen]), places)
        shares = torch.softmax(keys @ turned(query[None], places[-1:])[0] * DIM**-0.5, dim=0)
        for at, share in zip(seen, shares.tolist(), strict=True):
            self.sums[layer, head, at] = self.sums.get((layer, head, at), 0.0) + share
        return shares @ torch.stack([self.values[layer, head, at] for at in seen])

    def copy(self) -> "Loops":
        return replace(self, keys=dict(self.keys), values=dict(self.values), sums=dict(self.sums))


Evict = Callable[[Loops, Visible, int], None]
Held = tuple[Loops, Visible]


def grown(held: Held, token: int, position: int, evict: Evict | None) -> tuple[Tensor, Held]:
    """One more token on a copy: its logits, and what is then held."""
    loops, visible = held[0].copy(), [[set(head) | {position} for head in layer] for layer in held[1]]
    logits = loops.token(token, position, visible)
    if evict is not None:
        evict(loops, visible, position)
    return logits, (loops, visible)


def decode_by_loops(held: Held, start: int, prompt: Prompt, first: Tensor | None, evict: Evict | None) -> Outcome:
    """Feed what is left of the prompt from `start` on, then score the answer and, from the same state, generate."""
    logits = first
    for position in range(start, len(prompt.ids)):
        logits, held = grown(held, prompt.ids[position], position, evict)
    assert logits is not None
    nll, tokens, now, branch = [], [], logits, held
    for i, token in enumerate(prompt.answer):
        nll.append(-now.log_softmax(-1)[token].item())
        now, branch = grown(branch, token, len(prompt.ids) + i, evict)
    for i in range(prompt.limits.max_new_tokens):
        tokens.append(int(logits.argmax()))
        logits, held = grown(held, tokens[-1], len(prompt.ids) + i, evict)
    return Outcome(token_ids=tuple(tokens), nll_per_token=tuple(nll))


@cache
def prefilled(llama: Any, ids: tuple[int, ...]) -> tuple[Loops, Tensor]:
    """A prompt in loops, and its last logits. Only read; whoever goes on does so on a copy."""
    loops = Loops(llama)
    for at, token in enumerate(ids):
        logits = loops.token(token, at, [[set(range(at + 1))] * HEADS] * LAYERS)
    return loops, logits
