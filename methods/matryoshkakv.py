"""MatryoshkaKV: every token in fewer numbers, in an orthogonal basis of its head that is cut to its first columns.

Source: https://arxiv.org/abs/2410.14731. Keys after RoPE and values of a KV head, less their mean, are held as their
first r numbers in a basis that `harness compile` made on calibration text: by PCA (`@pca`), or turned from there so
that the frozen model's answers change least at any ranks. r differs by layer and head, and between keys and values: the
ranks whose fall changes the last hidden states least fall first, an eighth of the head at a time, down to one eighth
(cal_adaptive_rate.py at MatryoshkaKV-cache 25b5f13), as far as the stored bytes ask. On top of another method (`over`)
that one keeps as many slots as fit at `share` of the width, and ranks fall until the bytes of what it kept fit.
Differences: bases of KV heads, where the authors repeat them to query heads, G times the bytes under grouped queries.
The prompt is prefilled by the full cache. The last `residual` tokens stay as they are, where the authors project all:
beside one token with its whole logit those of projected ones are too small, which calibration prompts show at one plain
token. It is an eighth of the budget at most, and less where ranks can fall no lower. Ranks fall by the calibration
text, not by samples of the task; those of `@pca` all alike, which its bases bear better. How bases are found:
`harness/compiler/matryoshka.py`.
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
from methods.artefact import CompiledPolicy, Constants
from methods.base import KV, KVPolicy, LayerView, PolicyError, PromptView, Sizes, at_least, at_most
from methods.budget import BudgetTooSmall, quoted
from methods.device import read
from methods.low_rank import Basis, LowRank
from methods.registry import method
from methods.stored import encode
from methods.views import POSITION_BYTES

LEVELS = 8
"""Ranks that a head's keys (values) may have: so many eighths of their numbers, one at least."""
PRESETS: dict[str, dict[str, Any]] = {
    "pca": {"bases": "pca"},
    "snapkv": {"over": "snapkv"},
    "compilerkv": {"over": "compilerkv"},
}


def orthonormal(columns: Tensor) -> Tensor:
    """The nearest orthogonal matrices to rounded ones [..., D, D], float32 (Newton-Schulz)."""
    x = columns.double()
    for _ in range(3):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x.float()


def rank_of(level: int, dim: int) -> int:
    """Columns of a head of `dim` numbers at a level of 1 to `LEVELS`."""
    return max(1, level * dim // LEVELS)


@dataclass(frozen=True, eq=False)
class Bases:
    """Columns [L, H, D*, D*] and means [L, H, D*] of keys and of values; items in the order in which ranks fall.

    An item is a place in [2, L, H], flat: keys or values, layer, head. It falls `LEVELS` - 1 times.
    """

    columns: tuple[Tensor, Tensor]
    means: tuple[Tensor, Tensor]
    order: Sequence[int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, KV heads, numbers of a key and of a value."""
        layers, heads, key_dim = self.means[0].shape
        return layers, heads, key_dim, self.means[1].shape[2]

    def levels(self, counts: Sequence[int], need: int) -> list[list[list[int]]] | None:
        """Levels [2][L][H] after the fewest falls that free `need` numbers; None where all do not.

        counts: slots of each layer and head that are coded, [L * H].
        """
        layers, heads, *dims = self.shape
        found = [LEVELS] * (2 * len(counts))
        for item in self.order:
            if need <= 0:
                break
            dim, level = dims[item // len(counts)], found[item]
            need -= counts[item % len(counts)] * (rank_of(level, dim) - rank_of(level - 1, dim))
            found[item] -= 1
        parts = [found[start : start + heads] for start in range(0, len(found), heads)]
        return None if need > 0 else [parts[:layers], parts[layers:]]


@method(
    "matryoshkakv",
    paper="https://arxiv.org/abs/2410.14731",
    code="https://github.com/The-kamisato/MatryoshkaKV-cache at 25b5f13",
    presets=PRESETS,
)
@dataclass(frozen=True)
class MatryoshkaKV(Around, CompiledPolicy):
    """All tokens, or those that the method `over` keeps, in the first numbers of a compiled basis of their head.

    share: of the numbers of a token, that `over` chooses slots by. Without constants of the model a basis is the head's
    own numbers, and ranks fall in turn.
    """

    METHOD = "matryoshkakv"

    bases: Literal["trained", "pca"] = "trained"
    residual: int = 16
    share: float = 0.5

    def __post_init__(self) -> None:
        at_least(self, 1, "residual")
        at_least(self, 1 / LEVELS, "share")
        at_most(self, 1, "share")
        if self.bases not in ("trained", "pca"):
            raise PolicyError(f"matryoshkakv.bases={quoted(self.bases)} are none; give trained or pca")
        super().__post_init__()

    def suits(self, policy: KVPolicy) -> None:
        if not policy.budgeted or policy.evicts_while_decoding or isinstance(policy, MatryoshkaKV):
            raise PolicyError(f"{self.asked} does not evict once, after the prompt; name a method that does")

    def least_share(self, bits: int) -> float:
        return 1 / LEVELS

    def for_model(self, revision: str) -> Self:
        own = super().for_model(revision)
        _bases(own)  # or it is refused
        return own

    @property
    def method_bytes(self) -> int:
        own = sum(x.nbytes for name, x in self.constants().items() if name.startswith((self.bases, "order")))
        return own + self.chooser.method_bytes

    def check(self, view: PromptView) -> None:
        self._fitting(view)
        super().check(view)

    def _at(self, budget: int, tokens: int) -> Self:
        """This policy with as many plain slots as a budget bears beside the lowest ranks of all tokens."""
        spare = budget if self.inner is not None else (LEVELS * budget - tokens) // (LEVELS - 1)
        return self.changed(residual=max(1, min(self.residual, budget // LEVELS, spare)))

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        return self._at(budget, view.tokens)._compressed(view, budget)

    def _compressed(self, view: PromptView, budget: int) -> list[KV]:
        bases, first = self._fitting(view), view.layers[0].kv
        if budget >= view.tokens:
            return [_whole(layer) for layer in view.layers]
        kept, heads = [layer.kv for layer in view.layers], first.keys.shape[1]
        live = [[view.tokens] * heads] * len(kept)
        if self.inner is not None:
            kept = self.inner.compress(view, min(self._slots(budget, first), view.tokens))
            for kv in kept:
                self.plain(kv)
            live = read([kv.live for kv in kept])
        levels = self._levels(bases, live, budget, view.tokens, first.keys.element_size())
        each = zip(view.layers, kept, live, strict=True)
        return [self._encoded(bases, at, *own, levels) for at, own in enumerate(each)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        bases = _bases(self)
        if self.inner is not None or bases is None:
            return None  # ranks are those of the slots of all layers
        if budget >= sizes.tokens:
            return [_whole] * sizes.layers
        live, policy = [sizes.tokens] * sizes.kv_heads, self._at(budget, sizes.tokens)

        @cache
        def levels(each: int) -> list[list[list[int]]]:
            return policy._levels(bases, [live] * sizes.layers, budget, sizes.tokens, each)

        def act(layer: LayerView, at: int) -> KV:
            return policy._encoded(bases, at, layer, layer.kv, live, levels(layer.kv.keys.element_size()))

        return [partial(act, at=at) for at in range(sizes.layers)]

    def _fitting(self, view: PromptView) -> Bases:
        """The bases of the model at hand. Raises PolicyError where they are of another shape."""
        kv = view.layers[0].kv
        seen = len(view.layers), kv.keys.shape[1], kv.keys.shape[-1], kv.values.shape[-1]
        found = _bases(self) or _neutral(*seen)
        if seen != found.shape:
            have = "{} layers of {} KV heads, keys of {} and values of {} numbers"
            told = f"{quoted(self.compiled)} is of {have.format(*found.shape)}, this model has {have.format(*seen)}"
            raise PolicyError(f"{told}; compile its own")
        return found

    def _slots(self, budget: int, kv: KV) -> int:
        """Slots per head, on average, that take the bytes of `budget` plain ones at `share` of their numbers."""
        plain = kv.slot_bytes
        coded = (plain - POSITION_BYTES) * self.share + POSITION_BYTES
        return max(budget, self.residual + int((budget - self.residual) * plain / coded))

    def _levels(
        self, bases: Bases, live: Sequence[Sequence[int]], budget: int, tokens: int, each: int
    ) -> list[list[list[int]]]:
        """Levels at which the slots `live` [L][H] of each head take the bytes of `budget` plain ones.

        each: bytes of a number. Positions of a whole prompt are not stored. Raises BudgetTooSmall where an eighth of
        every head takes more.
        """
        counts, numbers = [own for layer in live for own in layer], sum(bases.shape[2:])
        place = 0 if min(counts) == tokens else POSITION_BYTES
        spare = sum(counts) * (numbers * each + place) - budget * len(counts) * (numbers * each + POSITION_BYTES)
        found = bases.levels([max(0, own - self.residual) for own in counts], -(-spare // each))
        if found is None:
            least = f"an eighth of the numbers of {max(counts)} tokens"
            raise BudgetTooSmall(f"budget {budget} is below {least}, where ranks end; ask for more")
        return found

    def _encoded(
        self,
        bases: Bases,
        at: int,
        layer: LayerView,
        kv: KV,
        live: Sequence[int],
        levels: Sequence[Sequence[Sequence[int]]],
    ) -> KV:
        """The slots of a layer, the `at`-th of those that policies see, each head at its levels."""
        own = [
            self._coding(bases, at, head, ranks, kv.keys.device)
            for head, ranks in enumerate(zip(levels[0][at], levels[1][at], strict=True))
        ]
        return encode(kv, own, live, layer.refuse)

    def _coding(self, bases: Bases, at: int, head: int, levels: tuple[int, int], device: torch.device) -> LowRank:
        kind = (bases, self.residual, at, head, levels, device)
        found = _CODINGS.get(kind)
        if found is None:
            cuts = list[Basis]()
            for columns, mean, level in zip(bases.columns, bases.means, levels, strict=True):
                own = columns[at, head, :, : rank_of(level, columns.shape[-1])]
                cuts.append(Basis.orthonormal(mean[at, head].to(device), own.to(device)))
            found = _CODINGS[kind] = LowRank(cuts[0], cuts[1], residual=self.residual)
        return found


def _whole(layer: LayerView) -> KV:
    return KV(layer.kv.keys.clone(), layer.kv.values.clone(), layer.kv.positions.clone())


_CODINGS: WeakValueDictionary[Any, LowRank] = WeakValueDictionary()
"""Those in use: latents of one coding are rebuilt together, and none outlives its rows."""


def _bases(policy: MatryoshkaKV) -> Bases | None:
    """The bases of a policy whose model is known. Raises PolicyError where there are none of the kind."""
    loaded = policy._loaded()
    if loaded is not None and f"{policy.bases}_keys" not in loaded.tensors:
        name = quoted(policy.compiled)
        raise PolicyError(f"{name} has no {policy.bases} bases; compile it with steps, or take matryoshkakv@pca")
    return None if loaded is None else _made(loaded, policy.bases)


@lru_cache(maxsize=8)
def _made(loaded: Constants, kind: str) -> Bases:
    found = loaded.tensors
    keys, values = (orthonormal(found[f"{kind}_{name}"]) for name in ("keys", "values"))
    means = found[f"{kind}_key_mean"].float(), found[f"{kind}_value_mean"].float()
    layers, heads = means[0].shape[:2]
    return Bases((keys, values), means, found["order"].tolist() if kind == "trained" else _in_turn(layers, heads))


def _in_turn(layers: int, heads: int) -> list[int]:
    """An order in which all ranks stay alike."""
    return [*range(2 * layers * heads)] * (LEVELS - 1)


@lru_cache(maxsize=8)
def _neutral(layers: int, heads: int, *dims: int) -> Bases:
    """A head's own numbers, of which the last go first, in all heads alike."""
    keys, values = (torch.eye(dim).expand(layers, heads, dim, dim) for dim in dims)
    means = (keys.new_zeros(keys.shape[:3]), values.new_zeros(values.shape[:3]))
    return Bases((keys, values), means, _in_turn(layers, heads))
