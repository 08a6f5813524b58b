"""Compiled tables of CompilerKV: a folder of `tables.safetensors` and `manifest.json`, checked whenever it is read.

Source: https://arxiv.org/abs/2602.08686 (head weights on [0.8, 1.5], thresholds on [0.8, 1.0], 20 x 4 risk bins; a bin
without calibration support takes 1.0 and 0.8). Deliberate differences: tables whose source is a simulator are refused,
and a hash ties the tensors to the manifest that says where they came from.

Shape letters as in `methods.base`, and N compiled budgets. A layer is a compressible one, counted from the first.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from methods.artefact import read_tensors
from methods.base import PolicyError
from methods.budget import quoted
from methods.compilerkv.manifest import (
    ENTROPY_BINS,
    PERPLEXITY_BINS,
    UNSUPPORTED_GATE,
    UNSUPPORTED_HEAD,
    Manifest,
    Shapes,
)
from methods.plain_files import parsed, place_of, read_plain, stamps_of

MANIFEST, TENSORS = "manifest.json", "tables.safetensors"
REMEDY = "compile the tables again"
Learned = Literal["both", "head", "gate", "independent"]
SHARES = ("budget", "importance")
UNSUPPORTED = dict.fromkeys(("head", "head_alone"), UNSUPPORTED_HEAD)
UNSUPPORTED |= dict.fromkeys(("gate", "gate_alone"), UNSUPPORTED_GATE)
ROUNDING = 1e-6  # a bound such as 0.8 is rounded to float32


@dataclass(frozen=True, eq=False)
class Tables:
    """Look-up tables and what is known of them.

    budget: [N, L, H] float32 > 0, slots of each KV head beyond the window, as a multiple of their mean; mean 1.
    importance: [1, L, H] float32 > 0, how much answers look at the sentences that hold them through each KV head, with
        the full cache, as a multiple of its mean.
    pool: [N] float32, share of the slots beyond the window given out by importance that lost least, the rest evenly.
    risk: [N, 2, 3] float32, see `methods.compilerkv.risk`; slopes of 0 move nothing.
    head: [N, L, Hq] float32, weight of each query head.
    gate: [N, L, 20, 4] float32, score threshold of each risk bin.
    entropy_edges, perplexity_edges: [19] and [3] float32, ascending; a value on an edge belongs to the upper bin.
    head_alone, gate_alone: like head and gate, compiled against the neutral other one instead of in turns.
    head_support, gate_support: like head and gate, int64, calibration samples behind each entry.
    """

    manifest: Manifest
    budget: Tensor
    head: Tensor
    gate: Tensor
    entropy_edges: Tensor
    perplexity_edges: Tensor
    head_support: Tensor
    gate_support: Tensor
    head_alone: Tensor
    gate_alone: Tensor
    importance: Tensor
    pool: Tensor
    risk: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _expected(self.manifest)}

    def nearest_budget(self, budget: int) -> int:
        """Return the compiled budget closest to `budget`; the smaller of two equally close ones."""
        return min(self.manifest.budgets, key=lambda compiled: (abs(compiled - budget), compiled))

    def lookup(
        self, budget: int, *, entropy: float, perplexity: float, learned: Learned = "both"
    ) -> tuple[Tensor, Tensor]:
        """Return the head weights [L, Hq] and thresholds [L] at the nearest compiled budget and these risks.

        learned: `both` tables as compiled in turns, `independent` as compiled alone, or one of the latter with the
        other neutral: `head`, `gate`.
        """
        row = self.manifest.budgets.index(self.nearest_budget(budget))
        high = bisect_right(self.entropy_edges.tolist(), entropy)
        wide = bisect_right(self.perplexity_edges.tolist(), perplexity)
        head, gate = (self.head, self.gate) if learned == "both" else (self.head_alone, self.gate_alone)
        weights, thresholds = head[row], gate[row, :, high, wide]
        if learned == "gate":
            weights = torch.full_like(weights, UNSUPPORTED_HEAD)
        if learned == "head":
            thresholds = torch.full_like(thresholds, UNSUPPORTED_GATE)
        return weights, thresholds

    def at(self, budget: int, name: str = "budget") -> Tensor:
        """Read a tensor [N, ...] at any budget: linear in its logarithm between compiled ones, outside the nearest."""
        table, compiled = self.tensors[name], self.manifest.budgets
        above = min(bisect_right(compiled, budget), len(compiled) - 1)
        below = max(0, above - 1)
        span = math.log(compiled[above] / compiled[below])
        part = math.log(max(budget, compiled[0]) / compiled[below]) / span if span else 0.0
        return torch.lerp(table[below], table[above], min(1.0, part))

    def multiples(self, budget: int, found: Literal["compiled", "onepass"]) -> Tensor:
        """Return slot multiples [L, H], mean 1, at any budget: compiled ones, or those that importance gives.

        Between two compiled budgets the slots beyond the window are linear in the budget, so that no head gets fewer at
        a larger one where none does between these two; outside them multiples are the nearest ones'.
        """
        compiled = self.manifest.budgets
        found_at = self.budget if found == "compiled" else [one_pass(self.importance[0], pool) for pool in self.pool]
        above = min(bisect_right(compiled, budget), len(compiled) - 1)
        below = max(0, above - 1)
        window = self.manifest.form.window if self.manifest.form else 0
        if budget in compiled or not compiled[below] < budget < compiled[above] or compiled[above] <= window:
            return found_at[min(range(len(compiled)), key=lambda row: abs(compiled[row] - budget))]
        low, high = (max(0, compiled[row] - window) * found_at[row] for row in (below, above))
        slots = torch.lerp(low, high, (budget - compiled[below]) / (compiled[above] - compiled[below]))
        return slots / slots.mean()

    def published_neutral(self, budget: int) -> bool:
        """Return whether head weights and thresholds say nothing at the nearest compiled budget."""
        row = self.manifest.budgets.index(self.nearest_budget(budget))
        return all(bool((getattr(self, name)[row] == value).all()) for name, value in UNSUPPORTED.items())

    def validate(self, shapes: Shapes) -> None:
        """Raises PolicyError unless these tables were compiled for a model of `shapes`."""
        if self.manifest.shapes != shapes:
            advice = "compile tables for it, or move these with methods.compilerkv.tables.transfer"
            raise PolicyError(f"tables are for {self.manifest.shapes}, this model has {shapes}; {advice}")


def one_pass(importance: Tensor, pool: float | Tensor) -> Tensor:
    """Return slot multiples [L, H], mean 1, of which the share `pool` follows the importance of heads, [L, H]."""
    return 1 - pool + pool * importance


def neutral(shapes: Shapes, budgets: Sequence[int]) -> Tables:
    """Make tables that know nothing: every head weighs 1.0, every threshold is 0.8, the values of unsupported bins."""
    manifest = Manifest(
        kind="neutral", shapes=shapes, budgets=tuple(budgets), source="unsupported-cell values", corpus="none", seed=0
    )
    tensors = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in _expected(manifest).items()}
    tensors["risk"][:, :, 2] = 1.0
    for name, value in (UNSUPPORTED | dict.fromkeys(SHARES, 1.0)).items():
        tensors[name].fill_(value)
    return Tables(manifest, **tensors)


def transfer(tables: Tables, shapes: Shapes, *, heads: bool = False) -> Tables:
    """Make tables for a model of other `shapes`, by relative depth: linear between layers; support is the lower one.

    Heads are moved the same way only when `heads` is set, because their order means nothing across models. The paper
    reports 0.4-0.8 LongBench points lost by moving tables between models. Raises PolicyError when heads differ
    and were not asked for.
    """
    old = tables.manifest.shapes
    same_heads = (old.query_heads, old.kv_heads) == (shapes.query_heads, shapes.kv_heads)
    if not same_heads and not heads:
        raise PolicyError(f"tables for {old} do not fit the heads of {shapes}; pass heads=True to interpolate them too")
    own = (x for x in tables.tensors.items() if x[1].dim() > 1 and x[0] != "risk")
    moved = {name: _stretch(x, 1, shapes.layers) for name, x in own}
    if not same_heads:
        moved |= {name: _stretch(moved[name], 2, shapes.query_heads) for name in ("head", "head_support", "head_alone")}
        moved |= {name: _stretch(moved[name], 2, shapes.kv_heads) for name in SHARES}
    moved |= {name: moved[name] / moved[name].mean(dim=(1, 2), keepdim=True) for name in SHARES}
    source = f"{tables.manifest.source}; transferred from {old} by relative depth"
    changes = {"shapes": shapes, "source": source, "model_revision": "", "tensors_sha256": "", "created": ""}
    return replace(tables, manifest=tables.manifest.model_copy(update=changes), **moved)


def save_tables(tables: Tables, folder: str | Path) -> Tables:
    """Write `tables` to `folder` and return them as `load_tables` will read them. Raises PolicyError when unsound."""
    _check(tables.manifest, tables.tensors, str(folder))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: x.contiguous().cpu() for name, x in tables.tensors.items()})
    digest, now = hashlib.sha256(data).hexdigest(), datetime.now(UTC).isoformat(timespec="seconds")
    manifest = tables.manifest.model_copy(update={"tensors_sha256": digest, "created": now})
    (folder / TENSORS).write_bytes(data)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return replace(tables, manifest=manifest)


def load_tables(folder: str | Path) -> Tables:
    """Read and check the tables of `folder`; cached until a file changes.

    Raises PolicyError, one line, when files are missing or damaged, do not belong together, hold values that are not
    finite or out of range, or when the tables were simulated.
    """
    folder = place_of(str(folder))
    advice = "compile them, or use tables='neutral'"
    return _load(folder.resolve(), stamps_of(folder, (MANIFEST, TENSORS), what="tables", advice=advice))


@lru_cache(maxsize=8)
def _load(folder: Path, stamps: tuple[int, ...]) -> Tables:
    path = folder / MANIFEST
    manifest = parsed(Manifest, read_plain(path, remedy=REMEDY), path, remedy=REMEDY)
    if manifest.kind == "simulated":
        where = f"{quoted(str(folder))} ({quoted(manifest.source)})"
        raise PolicyError(f"simulated tables are refused: {where}; compile them from a model's roll-outs")
    tensors = read_tensors(folder / TENSORS, manifest.tensors_sha256, remedy=REMEDY)
    _check(manifest, tensors, str(folder))
    return Tables(manifest, **tensors)


def _expected(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Size and type of every tensor that a manifest implies."""
    budgets, shapes = len(manifest.budgets), manifest.shapes
    head = (budgets, shapes.layers, shapes.query_heads)
    gate = (budgets, shapes.layers, ENTROPY_BINS, PERPLEXITY_BINS)
    sizes = {
        **{"budget": (budgets, shapes.layers, shapes.kv_heads), "importance": (1, shapes.layers, shapes.kv_heads)},
        "pool": (budgets,),
        **{"risk": (budgets, 2, 3), "head": head, "gate": gate},
        **{"entropy_edges": (ENTROPY_BINS - 1,), "perplexity_edges": (PERPLEXITY_BINS - 1,)},
        **{"head_support": head, "gate_support": gate, "head_alone": head, "gate_alone": gate},
    }
    return {name: (size, torch.int64 if "support" in name else torch.float32) for name, size in sizes.items()}


def _check(manifest: Manifest, tensors: dict[str, Tensor], where: str) -> None:
    """Raises PolicyError for the first thing in `tensors` that `manifest` rules out."""
    flaw = _layout_flaw(manifest, tensors)
    flaw = flaw or next(filter(None, (_value_flaw(name, x, manifest) for name, x in tensors.items())), None)
    if flaw:
        raise PolicyError(f"tables {quoted(where)}: {flaw}; compile the tables again")


def _layout_flaw(manifest: Manifest, tensors: dict[str, Tensor]) -> str | None:
    budgets, expected = manifest.budgets, _expected(manifest)
    if not budgets or any(a >= b for a, b in pairwise(budgets)):
        return f"budgets {list(budgets)} are not ascending"
    if tensors.keys() != expected.keys():
        return f"tensors {quoted(sorted(tensors))}, expected {sorted(expected)}"
    for name, (size, dtype) in expected.items():
        x = tensors[name]
        if tuple(x.shape) != size or x.dtype != dtype:
            return f"{name} is {x.dtype} {list(x.shape)}, expected {dtype} {list(size)}"
    return None


def _value_flaw(name: str, x: Tensor, manifest: Manifest) -> str | None:
    if not bool(x.isfinite().all()):
        return f"{int((~x.isfinite()).sum())} values of {name} are not finite"
    if name.endswith("edges") and bool((x.diff() < 0).any()):
        return f"{name} {x.tolist()} are not ascending"
    if name in SHARES and bool(((x <= 0) | ((x.mean(dim=(1, 2), keepdim=True) - 1).abs() > 1e-3)).any()):
        return f"{name} multiples are not above 0 with a mean of 1"
    if name == "pool" and bool((x > 1).any()):
        return f"pool {x.tolist()} is more than a whole share"
    lowest = -math.inf if name == "risk" else 0.0
    low, high = manifest.ranges.get(name.removesuffix("_alone"), (lowest, math.inf))
    if bool(((x < low - ROUNDING) | (x > high + ROUNDING)).any()):
        return f"{name} goes from {x.min().item():g} to {x.max().item():g}, outside {low:g} to {high:g}"
    return None


def _stretch(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` resampled to `size` entries along `dim` by relative place, ends on ends; counts take the lower of two."""
    place = torch.linspace(0, x.shape[dim] - 1, size, dtype=torch.float64)
    lower, upper = x.index_select(dim, place.floor().long()), x.index_select(dim, place.ceil().long())
    if not x.is_floating_point():
        return torch.minimum(lower, upper)
    share = (place - place.floor()).to(x.dtype).view([-1 if axis == dim else 1 for axis in range(x.dim())])
    return torch.lerp(lower, upper, share.expand_as(lower))
