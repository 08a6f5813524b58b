"""Balanced foldover designs, and what their losses say: effects by ridge regression, and their reliability.

Many factors (such as the slot share of every layer and KV head) are raised or lowered at once; each row has its mirror
image, so that half the difference of their losses holds no prompt level and no interaction of two factors.
Ours, a cheaper estimator for the offline compiler of https://arxiv.org/abs/2602.08686, which fits one table entry at a
time by conservative Q-learning (`methods.compilerkv.cql`). Running the model is the caller's part.

Signs: an effect is a gain, the nats by which the loss falls when its factor is +1 instead of 0.
Shape letters: P prompts   R = 2 * pairs rows of a prompt, row i + pairs the mirror image of row i   F factors.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from methods.base import PolicyError
from methods.compilerkv.cql import finite_only

PENALTIES: tuple[float, ...] = tuple(10 ** (3 - step / 4) for step in range(25))  # descending: ties shrink more
FOLDS = 8
HALVINGS = 100
ROUNDING = 1e-12  # relative spread below which values count as constant


def foldover(factors: int, pairs: int, seed: int) -> Tensor:
    """Return rows of +-1, [2 * pairs, F] float32: the second half mirrors the first, every column sums to 0.

    The first half is cut from Sylvester-Hadamard matrices of the next power of two n >= pairs, with seeded row signs
    and seeded choice, order and signs of columns. So columns are orthogonal when pairs = n >= F; with fewer pairs two
    columns correlate like random ones or less (mean square at most 1 / pairs). More than n factors take several
    matrices with row signs of their own, orthogonal within each.
    """
    if factors < 1 or pairs < 1:
        raise PolicyError(f"a design of {factors} factors and {pairs} pairs is empty; give at least 1 of each")
    draw = torch.Generator().manual_seed(seed)
    order = 1 << (pairs - 1).bit_length()
    rows = torch.randperm(order, generator=draw)[:pairs]
    blocks = []
    for first in range(0, factors, order):
        columns = torch.randperm(order, generator=draw)[: factors - first]
        signs = _signs(pairs, draw)[:, None] * _signs(columns.shape[0], draw)
        blocks.append(_sylvester(rows, columns) * signs)
    half = torch.cat(blocks, dim=1)[:, torch.randperm(factors, generator=draw)]  # [pairs, F]
    return torch.cat([half, -half])


def foldovers(prompts: int, factors: int, pairs: int, seed: int) -> Tensor:
    """Make one foldover design a prompt, [P, 2 * pairs, F]; all together are one `foldover` of P * pairs pairs."""
    half = foldover(factors, prompts * pairs, seed)[: prompts * pairs].view(prompts, pairs, factors)
    return torch.cat([half, -half], dim=1)


def foldover_levels(factors: int, pairs: int, levels: int, seed: int) -> Tensor:
    """Return levels 0 to levels - 1, [2 * pairs, F] int64: the mirror image of level a is levels - 1 - a.

    Each column takes every level equally often, to within 2 rows; columns are shuffled independently.
    """
    if factors < 1 or pairs < 1 or levels < 2:
        raise PolicyError(f"{factors} factors, {pairs} pairs, {levels} levels: give at least 1, 1 and 2")
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(levels, (factors,), generator=draw)
    half = (start + torch.arange(pairs)[:, None]) % levels  # [pairs, F]
    half = half.gather(0, torch.rand(pairs, factors, generator=draw).argsort(dim=0))
    return torch.cat([half, levels - 1 - half])


def _signs(count: int, draw: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=draw).float() * 2 - 1


def _sylvester(rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of the Sylvester-Hadamard matrix: -1 to the number of bits that row and column share."""
    bits = rows[:, None] & columns
    for shift in (32, 16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return 1.0 - 2.0 * (bits & 1)


class Effects(NamedTuple):
    """values: [F] float64, gain of each factor in nats. penalty: ridge penalty per row."""

    values: Tensor
    penalty: float


def ridge(designs: Tensor, losses: Tensor, *, penalty: float | Literal["cv"] = "cv", seed: int = 0) -> Effects:
    """Fit effects of all factors on the odd part of the losses, (L_i - L_mirror) / 2, centred by construction.

    designs: [P, R, F] of foldovers. losses: [P, R], nats. penalty: added to the mean square of a column; "cv" takes the
    one that predicts left-out prompts best, in 8 folds drawn from `seed`.
    Raises PolicyError for fewer than 2 prompts, losses that are not finite, or designs without mirror images.
    """
    moments = _moments(designs, losses)
    if penalty == "cv":
        penalty = _best_penalty(moments, seed)
    if penalty < 0:
        raise PolicyError(f"penalty {penalty:g} is negative; give 0 or more, or 'cv'")
    return Effects(_solve(moments.of(None), penalty), penalty)


class _Moments(NamedTuple):
    """Sums over rows, with prompts as first dimension or summed: x x^T [F, F], x y [F], y^2 [], rows []."""

    gram: Tensor
    gain: Tensor
    square: Tensor
    rows: Tensor

    def of(self, prompts: Tensor | None) -> _Moments:
        """Summed over these prompts, or over all."""
        return _Moments(*((x if prompts is None else x[prompts]).sum(dim=0) for x in self))


def _moments(designs: Tensor, losses: Tensor) -> _Moments:
    prompts, rows = losses.shape if losses.dim() == 2 else (0, 0)
    if prompts < 2 or designs.dim() != 3 or designs.shape[:2] != losses.shape or rows % 2:
        found = f"designs {list(designs.shape)} and losses {list(losses.shape)}"
        raise PolicyError(f"{found}; give [P, R, F] and [P, R] of at least 2 prompts and an even number of rows")
    finite_only(losses, "losses")
    pairs = rows // 2
    if not torch.equal(designs[:, :pairs], -designs[:, pairs:]):
        raise PolicyError(f"row i + {pairs} of a design is not the mirror image of row i; make designs with foldover")
    odd = (losses.double()[:, pairs:] - losses.double()[:, :pairs]) / 2  # gain over the mean of a row and its mirror
    half = designs[:, :pairs].double()
    counts = torch.full((prompts,), pairs, dtype=torch.float64)
    return _Moments(half.mT @ half, (half.mT @ odd[..., None])[..., 0], odd.square().sum(dim=1), counts)


def _solve(sums: _Moments, penalty: float) -> Tensor:
    ridged = sums.gram + penalty * sums.rows * torch.eye(sums.gram.shape[0], dtype=torch.float64)
    if penalty > 0:
        return cast(Tensor, torch.linalg.solve(ridged, sums.gain))
    # fewer rows than factors have no unique answer: the shortest one
    return cast(Tensor, torch.linalg.pinv(ridged, hermitian=True) @ sums.gain)


def _best_penalty(moments: _Moments, seed: int) -> float:
    prompts = moments.gain.shape[0]
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed))
    penalties, total = torch.tensor(PENALTIES, dtype=torch.float64), moments.of(None)
    error = torch.zeros_like(penalties)
    for fold in order.tensor_split(min(FOLDS, prompts)):
        left = moments.of(fold)
        gram, gain, _, rows = (t - x for t, x in zip(total, left, strict=True))
        scale, axes = torch.linalg.eigh(gram)
        values = axes @ ((axes.T @ gain)[:, None] / (scale.clamp_min(0)[:, None] + penalties * rows))  # [F, penalties]
        error += (values * (left.gram @ values)).sum(dim=0) - 2 * left.gain @ values + left.square
    return PENALTIES[int(error.argmin())]


class Reliability(NamedTuple):
    """Correlation of effects from disjoint halves of the prompts.

    mean: over splits. corrected: Spearman-Brown, what the effects of all prompts would reach. low, high: the middle
    95 % of splits; splits share prompts, so this is a spread and no confidence interval.
    """

    mean: float
    corrected: float
    low: float
    high: float


def split_half(designs: Tensor, losses: Tensor, *, seed: int, splits: int = 100) -> Reliability:
    """Correlate effects (Pearson) from random halves of the prompts. designs: [P, R, F]. losses: [P, R].

    The penalty is chosen once, on all prompts. Raises PolicyError for fewer than 4 prompts, and as `ridge` does.
    """
    moments = _moments(designs, losses)
    prompts = moments.gain.shape[0]
    if prompts < 4 or splits < 1:
        raise PolicyError(f"{prompts} prompts and {splits} splits make no halves; give at least 4 prompts and 1 split")
    penalty, draw, found = _best_penalty(moments, seed), torch.Generator().manual_seed(seed), []
    for _ in range(splits):
        halves = torch.randperm(prompts, generator=draw).tensor_split(2)
        found.append(correlation(*(_solve(moments.of(half), penalty) for half in halves)))
    mean = sum(found) / splits
    low, high = (torch.tensor(found).quantile(at).item() for at in (0.025, 0.975))
    return Reliability(mean, 2 * mean / (1 + mean) if mean > -1 else -1.0, low, high)


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the Pearson correlation of two lists; 0 when one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = (a.norm() * b.norm()).item()
    return (a @ b).item() / size if size > 0 else 0.0


def multipliers(values: Tensor, *, strength: float, low: float = 0.25, high: float = 4.0) -> Tensor:
    """Return slot shares from effects, or from design rows: [..., F] float64 in [low, high], mean 1 to rounding.

    exp(strength * z + shift), clamped, with z the values less their mean over their standard deviation and the shift
    solved for by halving; constant values give 1 everywhere. Where nothing is clamped, two factors a standard deviation
    apart differ by a factor of e^strength, and the two levels of a design row by about e^(2 * strength).
    Raises PolicyError unless 0 < low <= 1 <= high and values are finite.
    """
    if not 0 < low <= 1 <= high < float("inf"):
        raise PolicyError(f"shares from {low:g} to {high:g} cannot have mean 1; give 0 < low <= 1 <= high")
    finite_only(values, "values")
    z = values.double() - values.double().mean(dim=-1, keepdim=True)
    scale = z.std(dim=-1, keepdim=True, correction=0)
    flat = scale <= ROUNDING * values.double().abs().amax(dim=-1, keepdim=True)
    logs = (strength * z / scale).masked_fill(flat, 0.0)  # [..., F]
    bounds = torch.tensor([low, high], dtype=torch.float64).log()
    least = bounds[0] - logs.amax(dim=-1, keepdim=True)  # everything at low, mean <= 1
    most = bounds[1] - logs.amin(dim=-1, keepdim=True)
    for _ in range(HALVINGS):
        shift = (least + most) / 2
        over = (logs + shift).exp().clamp(low, high).mean(dim=-1, keepdim=True) > 1
        least, most = torch.where(over, least, shift), torch.where(over, shift, most)
    return (logs + most).exp().clamp(low, high).masked_fill(flat, 1.0)
