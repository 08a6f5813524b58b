"""What a policy asks to be observed of a prompt, besides its keys and values. `methods.base` offers it too."""

from __future__ import annotations

from dataclasses import dataclass, fields

from methods.repeat import Repeat


@dataclass(frozen=True)
class Needs:
    """What a policy wants observed. The engine gathers the union over the policies of a run and nothing else.

    window: queries of the last `window` prompt tokens, per layer. stretch: tokens that each attends to, a KV head
    after the other, which decides the memory; 0 for the whole prompt, all heads at once.
    column_sums: attention that each token received from every later query, per layer, streamed over query blocks.
    logprobs: log-probabilities of the last `window` prompt tokens under the model.
    decode_attention: the attention of every decoded token, for policies that evict while decoding.
    hidden_states: what goes into each layer's attention, and the module it goes into.
    module: that module alone, for its weights; nothing is held for it.
    repeat: passes over the prompt once it is there, each about as long as the prefill.
    """

    window: int = 0
    column_sums: bool = False
    logprobs: bool = False
    decode_attention: bool = False
    hidden_states: bool = False
    module: bool = False
    stretch: int = 0
    repeat: frozenset[Repeat] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        pairs = [(own.name, getattr(self, own.name), getattr(other, own.name)) for own in fields(self)]
        return Needs(**{name: a | b if isinstance(a, frozenset) else max(a, b) for name, a, b in pairs})
