"""Choices of the offline compiler and how sure they are: forms by cross-validation, gains of tables, rank agreement."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FOLDS = 4
RESAMPLES = 2000
LEVEL = 0.95


def choose(losses: Tensor, families: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Return the candidate with the least loss, where every family and budget counts the same.

    losses: [P, N, C] of prompts, budgets and candidates; families: [P]. A score is a candidate's mean loss in a family
    at a budget, divided by the mean over candidates, averaged over both. Report: `scores` [C]; from FOLDS-fold
    cross-validation `left_out_ratio`, the score on prompts that had no part in the choice, and `often`, the share of
    folds that chose the same candidate.
    """
    scores = _scores(losses, families)
    best = int(scores.argmin())
    ratios, same = [], 0
    for fold in range(FOLDS):
        out = [i for i in range(len(families)) if (i // len(set(families))) % FOLDS == fold]
        rest = [i for i in range(len(families)) if i not in out]
        if not out or not rest:
            continue
        picked = int(_scores(losses[rest], [families[i] for i in rest]).argmin())
        ratios.append(float(_scores(losses[out], [families[i] for i in out])[picked]))
        same += picked == best
    ratio = sum(ratios) / len(ratios) if ratios else float(scores[best])
    return best, {"scores": scores.tolist(), "left_out_ratio": ratio, "often": same / max(1, len(ratios))}


def gains(losses: Tensor, *, seed: int) -> dict[str, Any]:
    """Return what a table gains, nats a token, with intervals over prompts.

    losses: [P, 2 + S]: uniform, the table, and S shuffles of it.
    """
    uniform, table, shuffled = losses[:, 0], losses[:, 1], losses[:, 2:].mean(dim=1)
    return {
        "uniform": float(uniform.mean()),
        "table": float(table.mean()),
        "shuffled": float(shuffled.mean()),
        "over_uniform": interval(uniform - table, seed=seed),
        "over_shuffled": interval(shuffled - table, seed=seed),
    }


def interval(values: Tensor, *, seed: int) -> dict[str, float]:
    """Return the mean of `values` [P] with its percentile bootstrap interval."""
    draws = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(values), (RESAMPLES, len(values)), generator=draws)
    means = values.double()[picked].mean(dim=1)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = means.quantile(edges).tolist()
    return {"mean": float(values.mean()), "low": low, "high": high}


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the rank correlation of two tables of the same size."""
    return float(torch.corrcoef(torch.stack([_ranks(x.flatten()) for x in (one, other)]))[0, 1])


def _ranks(x: Tensor) -> Tensor:
    """Rank of every entry; equal ones share the mean of theirs."""
    below, same = x[:, None] > x, x[:, None] == x
    return below.sum(dim=1) + (same.sum(dim=1) - 1).double() / 2


def spearman_interval(one: Tensor, other: Tensor, *, seed: int) -> dict[str, float]:
    """Return the rank correlation of two tables, with its percentile bootstrap interval over their entries."""
    a, b = one.flatten(), other.flatten()
    picked = torch.randint(len(a), (RESAMPLES, len(a)), generator=torch.Generator().manual_seed(seed))
    found = torch.tensor([spearman(a[row], b[row]) for row in picked])
    low, high = found.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])).tolist()
    return {"mean": spearman(a, b), "low": low, "high": high}


def _scores(losses: Tensor, families: Sequence[str]) -> Tensor:
    """[C]: mean loss of each candidate, every (family, budget) divided by its mean over candidates."""
    rows = []
    for family in sorted(set(families)):
        own = losses[[i for i, name in enumerate(families) if name == family]].mean(dim=0)  # [N, C]
        rows.append(own / own.mean(dim=1, keepdim=True).clamp_min(1e-9))
    return torch.cat(rows).mean(dim=0)
