"""ReCalKV: every token as latents that groups of heads share, from which its keys and values are rebuilt when attended.

Source: https://arxiv.org/abs/2505.24357 and its released code. Keys are k = W x, then RoPE. A group of heads keeps r
numbers z = R x instead, and k is rebuilt as L z. Since L R = U U^T W for the leading r columns of an orthogonal U
(`harness/compiler/recalkv.py` derives and finds it), z is, but for a factor a latent, U^T k: latents of the layer's
true input are made from the keys before RoPE, less the bias, and nothing of the input is needed. Heads that are most
alike by CKA share a group, four at most, of KV heads; values of all heads of a layer are one group. Ranks follow each
layer's Fisher information of keys and of values, as `fisher_uniform` does (rank_search.py:184-261 at ReCalKV ea548d5),
or are the same in all layers (`@uniform`). A budget of N slots gives the ranks whose bytes of all tokens fit into
those of N plain slots.
`@cache`, the default, takes the prompt's exact prefill, which all cells share. Its authors change W, so their prefill
is another model's: `@paper` runs the prompt through the model again with keys and values of these ranks, and keeps the
latents of that pass; its seconds count as compression. The token that is being decoded has exact keys and values in
both.
With `over` that method keeps as many slots as fit at `share` of the numbers; its heads must keep the same tokens, as a
group's latents are one token's of all its heads.
Differences: ranks are not rounded to multiples of 32, which serves their kernels. Calibration is our text. The last
`residual` tokens stay as they are, an eighth of the budget at most. A bias stays with its head, where
svd_linear.py:799-820 leaves biases in the heads' old order. Left out: 3-bit latents with a Hadamard rotation. A model
of at most four KV heads has one group, so their reordering is idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from methods.around import Around
from methods.artefact import CompiledPolicy
from methods.base import KV, KVPolicy, LayerView, Needs, PolicyError, PromptView, Sizes, at_least, at_most
from methods.budget import BudgetTooSmall, quoted
from methods.low_rank import LowRank
from methods.registry import method
from methods.shared_latents import Factors, Ranks, bases, own_pass
from methods.stored import encode
from methods.views import POSITION_BYTES

PRESETS: dict[str, dict[str, Any]] = {
    "cache": {},
    "paper": {"prefill": "own"},
    "uniform": {"ranks": "uniform"},
    "snapkv_shared": {"over": "snapkv_shared"},
}


@method(
    "recalkv",
    paper="https://arxiv.org/abs/2505.24357",
    code="https://github.com/XIANGLONGYAN/ReCalKV at ea548d5",
    presets=PRESETS,
)
@dataclass(frozen=True)
class ReCalKV(Around, CompiledPolicy):
    """All tokens, or those that the method `over` keeps, as latents that heads share; keys before RoPE.

    prefill: exact, or the own one of a model with keys and values of these ranks. share: of a token's numbers, that
    `over` chooses slots by.
    """

    METHOD = "recalkv"

    prefill: Literal["exact", "own"] = "exact"
    ranks: Literal["fisher", "uniform"] = "fisher"
    residual: int = 16
    share: float = 0.5

    def __post_init__(self) -> None:
        at_least(self, 1, "residual")
        at_least(self, 0.01, "share")
        at_most(self, 1, "share")
        for name, known in (("prefill", ("exact", "own")), ("ranks", ("fisher", "uniform"))):
            if getattr(self, name) not in known:
                raise PolicyError(f"recalkv.{name}={quoted(getattr(self, name))} is none; give {' or '.join(known)}")
        super().__post_init__()

    def suits(self, policy: KVPolicy) -> None:
        if not policy.budgeted or policy.evicts_while_decoding or isinstance(policy, ReCalKV):
            raise PolicyError(f"{self.asked} does not evict once, after the prompt; name a method that does")

    def least_share(self, bits: int) -> float:
        return 0.0

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(hidden_states=self.prefill == "own")

    def neutral(self, view: PromptView) -> dict[str, Tensor]:
        """Make latents of all heads that are their first numbers."""
        kv, layers = view.layers[0].kv, len(view.layers)
        heads = kv.keys.shape[1]
        key, value = heads * kv.keys.shape[-1], heads * kv.values.shape[-1]
        bases = {
            f"{name}_bases": torch.eye(size).repeat(layers, 1, 1) for name, size in (("key", key), ("value", value))
        }
        biases = {f"{name}_bias": torch.zeros(layers, size) for name, size in (("key", key), ("value", value))}
        order = torch.arange(heads).repeat(layers, 1)
        bases["key_bases"].unsqueeze_(1)
        return {**bases, **biases, "key_order": order, "fisher": torch.ones(layers, 2, heads)}

    def check(self, view: PromptView) -> None:
        self._fitting(view)
        first = view.layers[0]
        if first.rotate is None:
            raise PolicyError("recalkv takes RoPE off keys, and this model's is not known")
        first.rotate(first.kv.keys[..., :1, :], -1)  # refuses RoPE of a layout that was not checked
        super().check(view)

    def _at(self, budget: int) -> Self:
        """This policy with at most an eighth of a budget in plain slots."""
        return self.changed(residual=max(1, min(self.residual, budget // 8)))

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        return self._at(budget)._compressed(view, budget)

    def _compressed(self, view: PromptView, budget: int) -> list[KV]:
        factors, first = self._fitting(view), view.layers[0].kv
        each = first.keys.element_size()
        if self.inner is None:
            ranks = self._ranks(factors, budget, view.tokens, each)
            kept = [layer.kv for layer in view.layers]
        else:
            ranks = factors.allotted(int(self.share * factors.full), self.ranks)
            kept = self._chosen(view, budget, [own * each for own in factors.numbers(ranks)])
        if self.prefill == "own":
            cuts = [bases(factors, at, own, first.keys.device) for at, own in enumerate(ranks)]
            kept = [mine.take(kv.positions.long()) for mine, kv in zip(own_pass(view, cuts), kept, strict=True)]
        return [self._encoded(*own, factors) for own in zip(view.layers, kept, range(len(kept)), ranks, strict=True)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        if self.inner is not None or self.prefill == "own":
            return None
        factors = _factors(self)
        if factors is None:
            return None
        policy = self._at(budget)

        @cache
        def ranks(each: int) -> list[Ranks]:
            return policy._ranks(factors, budget, sizes.tokens, each)

        def act(layer: LayerView, at: int) -> KV:
            return policy._encoded(layer, layer.kv, at, ranks(layer.kv.keys.element_size())[at], factors)

        return [partial(act, at=at) for at in range(sizes.layers)]

    def _fitting(self, view: PromptView) -> Factors:
        """The factors of the model at hand. Raises PolicyError where they are of another shape."""
        found, kv = _factors(self) or Factors.of(self.neutral(view)), view.layers[0].kv
        heads = kv.keys.shape[1]
        seen = len(view.layers), heads, heads * kv.keys.shape[-1], heads * kv.values.shape[-1]
        if seen != found.shape:
            have = "{} layers of {} KV heads, in all of {} key and {} value numbers"
            made = have.format(*found.shape)
            raise PolicyError(
                f"{quoted(self.compiled)} is of {made}, this model has {have.format(*seen)}; compile its own"
            )
        return found

    def _ranks(self, factors: Factors, budget: int, tokens: int, each: int) -> list[Ranks]:
        """Ranks whose latents of all tokens fit into `budget` plain slots a head. each: bytes of a number.

        Positions of a whole prompt are not stored, those of the slots of a budget are. Raises BudgetTooSmall.
        """
        layers, heads = factors.shape[:2]
        asked = budget * (factors.full * each + layers * heads * POSITION_BYTES)
        coded = tokens - self.residual
        fit = (asked - self.residual * factors.full * each) // (each * coded) if coded > 0 else 0
        if fit < factors.least:
            raise BudgetTooSmall(f"budget {budget} is below one latent a group of {coded} tokens; ask for more")
        return factors.allotted(min(fit, factors.full), self.ranks)

    def _chosen(self, view: PromptView, budget: int, coded: Sequence[int]) -> list[KV]:
        """What `over` keeps in the bytes of `budget` plain slots. coded: bytes of a token's latents, of each layer."""
        first, residual = view.layers[0].kv, self.residual
        heads, number = first.keys.shape[1], (first.slot_bytes - POSITION_BYTES) * first.keys.shape[1]
        asked = budget * heads * first.slot_bytes * len(coded)

        def spent(sizes: Sequence[int]) -> int:
            plain = sum(min(size, residual) * number + size * heads * POSITION_BYTES for size in sizes)
            return plain + sum(max(0, size - residual) * own for size, own in zip(sizes, coded, strict=True))

        each, none = (spent([own] * len(coded)) for own in (residual + 1, residual))
        slots = min(view.tokens, max(budget, residual + (asked - none) // (each - none)))
        while True:  # a method that gives some layers more slots may give them to those of larger ranks
            kept = self.chooser.compress(view, slots)
            total = spent([kv.positions.shape[2] for kv in kept])
            if total <= asked or slots == 1:
                return kept
            slots = max(1, min(slots - 1, slots * asked // total))

    def _encoded(self, layer: LayerView, kv: KV, at: int, ranks: Ranks, factors: Factors) -> KV:
        """The slots of a layer, the `at`-th of those that policies see. Raises PolicyError where heads keep others."""
        self.plain(kv)
        heads, slots = kv.positions.shape[1:]
        if self.inner is not None:
            other = (kv.positions != kv.positions[:, :1]).sum() + (kv.positions < 0).sum()
            layer.refuse(other, self._apart)
        keys, values = bases(factors, at, ranks, kv.keys.device)
        kind = (self, at, ranks, kv.keys.device, layer.rotate)
        coding = _CODINGS.get(kind) or LowRank(keys, values, heads, layer.rotate, residual=self.residual)
        _CODINGS[kind] = coding
        return encode(kv, coding, [slots] * heads, layer.refuse)

    def _apart(self, count: int) -> str:
        told = f"{self.asked} keeps other tokens in each head, whose latents are of all heads"
        return f"{told}; name a method that keeps the same, as snapkv_shared"


_CODINGS: WeakValueDictionary[Any, LowRank] = WeakValueDictionary()
"""Those in use: latents of one coding are rebuilt together, and none outlives its model."""


@lru_cache(maxsize=8)
def _factors(policy: ReCalKV) -> Factors | None:
    """The factors of a policy whose model is known."""
    loaded = policy._loaded()
    return None if loaded is None else Factors.of(loaded.tensors)
