"""Compress: what a policy leaves of a prefilled prompt, and what that weighs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.engine.clock import PhaseClock
from harness.engine.packed import Held, Packed, pack, storage_bytes, survey, tensors_of
from harness.engine.prefill import Prefilled
from harness.engine.states import States
from methods.base import KV, KVPolicy, PolicyError
from methods.codes import MinMax
from methods.device import placed, read


@dataclass
class Compressed:
    """A prompt under one policy at one budget.

    budget: slots per layer and KV head. layers: one per layer of keys and values, those that no policy sees included.
    known: what the host knows of each. compressible: indexes of the others. states: as of `Prefilled`. logits: [1, V]
    float32 after the last token, of the full cache. kept_slots: live slots of each compressible layer, summed over its
    KV heads. layer_bytes: live bytes of each layer. stored_bytes: that all of them and the states keep allocated
    (`harness.engine.packed` on both). read_bytes: of them, those that are read for one decoded token. asked_bytes,
    full_bytes: of the budget, and of the uncompressed cache. prefill_s, observe_s, compress_s: seconds apart; their sum
    is the time to the first token but for its choice.
    """

    policy: KVPolicy
    budget: int
    layers: list[Packed | KV]
    compressible: list[int]
    logits: Tensor
    tokens: int
    states: dict[int, States]
    known: Sequence[Held] = ()
    kept_slots: tuple[int, ...] = ()
    layer_bytes: Sequence[int] = ()
    stored_bytes: int = 0
    read_bytes: int = 0
    asked_bytes: int = 0
    full_bytes: int = 0
    prefill_s: float = 0.0
    observe_s: float = 0.0
    compress_s: float = 0.0

    @property
    def kv_bytes(self) -> int:
        """Live bytes of all layers."""
        return sum(self.layer_bytes) + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Those of layers without keys and values."""
        return self.states[self.tokens].nbytes

    def reads(self, told: Sequence[int | None]) -> int:
        """Bytes that are read for a decoded token. told: of each layer what tokens read on average, where it varies."""
        pairs = zip(told, self.known, strict=True)
        return self.state_bytes + sum(own.read if mean is None else min(mean, own.nbytes) for mean, own in pairs)

    @property
    def kvs(self) -> list[KV]:
        """What each layer holds, in the form in which methods leave it."""
        return [layer.kv() if isinstance(layer, Packed) else layer for layer in self.layers]

    @property
    def one_buffer(self) -> bool:
        """Whether a GPU can read all of its heads in one call: they are numbers, or min/max codes."""
        coded = (layer.coded for layer in self.layers if isinstance(layer, Packed))
        return all(isinstance(own, MinMax) for codes in coded if codes is not None for own in codes.codings)

    def same(self, other: "Compressed") -> bool:
        """Whether another one of the same prompt decodes the same: both only grow, from the same slots."""
        pairs = zip(self.layers, other.layers, strict=True)
        grow = not (self.policy.evicts_while_decoding or other.policy.evicts_while_decoding)
        return grow and all(isinstance(a, Packed) and isinstance(b, Packed) and a.same(b) for a, b in pairs)

    def needle_kept(self, needle: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Tokens of `needle` that each compressible layer and KV head holds; empty without a needle."""
        if not needle:
            return ()
        wanted, kvs = placed(needle, self.logits.device), self.kvs
        own = [kvs[i].positions[0] for i in self.compressible]
        return tuple(map(tuple, read([torch.isin(positions, wanted).sum(dim=-1) for positions in own])))


def compress(prefilled: Prefilled, policy: KVPolicy, budget: int) -> Compressed:
    """What `policy` leaves of a prompt at `budget` slots per layer and KV head.

    A prompt whose layers were compressed on the way is taken as it is. Raises PolicyError when the policy does not
    leave one KV for each layer that it saw, and whatever else it raises.
    """
    on_the_way, after = prefilled.clock, PhaseClock(prefilled.logits.device)
    kept = [layer.left for layer in prefilled.layers if layer.left is not None]
    if not kept:
        with after.part("compress"), torch.inference_mode(), prefilled.view.asked_once():
            kept = policy.compress(prefilled.view, budget)
    if len(kept) != len(prefilled.compressible):
        name, seen = type(policy).__name__, len(prefilled.compressible)
        raise PolicyError(f"{name} left {len(kept)} layers of {seen}; return one KV a layer")
    left = dict(zip(prefilled.compressible, kept, strict=True))
    kvs = [left[i] if i in left else layer.kv() for i, layer in enumerate(prefilled.layers)]
    observe_s, compress_s = on_the_way.seconds("observe"), on_the_way.seconds("compress")
    return Compressed(
        policy,
        budget,
        compressible=prefilled.compressible,
        logits=prefilled.logits,
        tokens=prefilled.tokens,
        states=prefilled.states,
        **weighed(kvs, prefilled.compressible, prefilled.tokens, prefilled.states[prefilled.tokens]),
        asked_bytes=prefilled.nbytes(budget),
        full_bytes=prefilled.nbytes(prefilled.tokens),
        prefill_s=on_the_way.seconds("prefill") - observe_s - compress_s,
        observe_s=observe_s,
        compress_s=compress_s + after.seconds("compress"),
    )


def weighed(kvs: Sequence[KV], compressible: Sequence[int], tokens: int, states: States) -> dict[str, Any]:
    """The fields of `Compressed` that follow from what each layer holds of `tokens` tokens."""
    known = survey(kvs, tokens, [i not in compressible for i in range(len(kvs))])
    layers = [pack(kv, tokens, own) for kv, own in zip(kvs, known, strict=True)]
    return {
        "layers": layers,
        "known": known,
        "kept_slots": tuple(sum(known[i].sizes) for i in compressible),
        "layer_bytes": [own.nbytes for own in known],
        "stored_bytes": storage_bytes(x for layer in layers for x in tensors_of(layer)) + states.nbytes,
        "read_bytes": sum(own.read for own in known) + states.nbytes,
    }


def distinct(rows: Sequence[Compressed]) -> tuple[list[Compressed], list[int]]:
    """Those of some rows of one prompt that decode differently, and for every row its number among them."""
    found, numbers = list[Compressed](), list[int]()
    for row in rows:
        numbers.append(next((i for i, other in enumerate(found) if row.same(other)), len(found)))
        found += [row] if numbers[-1] == len(found) else []
    return found, numbers
