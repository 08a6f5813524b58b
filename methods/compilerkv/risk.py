"""Risk of prompts: the bins of the published gate, and budgets of the prompts of a batch, at a fixed total.

In the spirit of the risk gate of https://arxiv.org/abs/2602.08686, which lets a prompt's entropy and perplexity decide
how much of it is kept: a prompt's share of the batch's slots is exp(slope . z), where z are its entropy of attention
and its logarithm of perplexity (`paper.prompt_risk`), standardised by the calibration prompts. Slopes are chosen on
training prompts, and stay 0 when validation prompts do not confirm that moving slots is better than leaving them.

Shape letters: P prompts   N compiled budgets.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from methods.base import PolicyError, spread
from methods.compilerkv.cql import finite_only
from methods.compilerkv.manifest import ENTROPY_BINS, PERPLEXITY_BINS
from methods.compilerkv.selection import interval

SLOPES = (-0.6, -0.3, 0.0, 0.3, 0.6)
MOST = 2.0
"""Most even shares that one prompt gets; one over it is the least. The total is restored afterwards."""


class Edges(NamedTuple):
    """Quantile bounds of the risk bins: [19] and [3] float32, ascending."""

    entropy: Tensor
    perplexity: Tensor


def bin_edges(entropy: Tensor, perplexity: Tensor) -> Edges:
    """Return edges that cut calibration signals into 20 and 4 equally filled bins. entropy, perplexity: [P].

    Raises PolicyError for fewer prompts than entropy bins, or for signals that are not finite.
    """
    if entropy.shape != perplexity.shape or entropy.dim() != 1 or entropy.shape[0] < ENTROPY_BINS:
        given = f"{list(entropy.shape)} entropies and {list(perplexity.shape)} perplexities"
        bins = f"{ENTROPY_BINS} x {PERPLEXITY_BINS} risk bins"
        raise PolicyError(f"{given} do not fill {bins}; give at least {ENTROPY_BINS} calibration prompts")
    edges = []
    for name, x, count in (("entropies", entropy, ENTROPY_BINS), ("perplexities", perplexity, PERPLEXITY_BINS)):
        finite_only(x, name)
        at = torch.arange(1, count, dtype=torch.float64) / count
        edges.append(x.double().cpu().quantile(at).float())
    return Edges(*edges)


def bins(edges: Edges, entropy: Tensor, perplexity: Tensor) -> Tensor:
    """Return the risk bin of each prompt, [P] int64 = entropy bin * 4 + perplexity bin; a value on an edge goes up."""
    high = torch.bucketize(entropy.double().cpu(), edges.entropy.double(), right=True)
    wide = torch.bucketize(perplexity.double().cpu(), edges.perplexity.double(), right=True)
    return high * PERPLEXITY_BINS + wide


def multiples(signals: Tensor, risk: Tensor) -> Tensor:
    """Return the share of each prompt, [P] float64, mean 1.

    signals: [P, 2], entropy in nats and perplexity. risk: [2, 3], slope, mean and standard deviation of the entropy and
    of the logarithm of the perplexity.
    """
    slope, mean, scale = risk.double().unbind(dim=1)
    share = ((_logged(signals) - mean) / scale.clamp_min(1e-9) @ slope).exp().clamp(1 / MOST, MOST)
    return share / share.mean()


def batch_budgets(budget: int, signals: Tensor, risk: Tensor) -> list[int]:
    """Share out P * budget: slots per layer and KV head of each prompt. Slopes of 0 give every prompt `budget`."""
    shares = multiples(signals, risk).tolist()
    return spread(budget * len(shares), shares, budget * len(shares))


def fit_risk(losses: Tensor, signals: Tensor, budgets: Sequence[int]) -> Tensor:
    """Return the slopes of least mean loss at each budget, with the signals' means and deviations: [N, 2, 3] float32.

    losses: [P, N] of prompts at every compiled budget, 2 at least; between and beyond them a loss is taken to be a
    power of the budget.
    """
    logged = _logged(signals)
    scale = torch.stack([logged.mean(dim=0), logged.std(dim=0)], dim=1)  # [2, 2]
    found = []
    for budget in budgets:
        tried = [torch.cat([torch.tensor(pair).double()[:, None], scale], dim=1) for pair in product(SLOPES, repeat=2)]
        means = torch.stack([_moved(losses, signals, budgets, risk=risk, budget=budget).mean() for risk in tried])
        still = len(tried) // 2  # slopes of 0 win a tie
        found.append(tried[still if means[still] <= means.min() else int(means.argmin())])
    return torch.stack(found).float()


def risk_gain(losses: Tensor, signals: Tensor, budgets: Sequence[int], *, risk: Tensor, seed: int) -> dict[str, Any]:
    """Report what moving slots gains at each budget over even shares and over shares of shuffled prompts."""
    order = torch.randperm(len(signals), generator=torch.Generator().manual_seed(seed))
    report = {}
    for i, budget in enumerate(budgets):
        moved, other = (_moved(losses, x, budgets, risk=risk[i], budget=budget) for x in (signals, signals[order]))
        report[str(budget)] = {
            "slopes": risk[i, :, 0].tolist(),
            "over_uniform": interval(losses[:, i] - moved, seed=seed),
            "over_shuffled": interval(other - moved, seed=seed),
        }
    return report


def _logged(signals: Tensor) -> Tensor:
    entropy, perplexity = signals.double().unbind(dim=1)
    return torch.stack([entropy, perplexity.log()], dim=1)


def _moved(losses: Tensor, signals: Tensor, budgets: Sequence[int], *, risk: Tensor, budget: int) -> Tensor:
    """Loss of every prompt at its share of P * budget slots: [P] float64."""
    logs = torch.tensor(budgets).double().log()
    asked = (budget * multiples(signals, risk)).log()
    above = torch.bucketize(asked, logs).clamp(1, len(logs) - 1)
    part = (asked - logs[above - 1]) / (logs[above] - logs[above - 1])
    curve = losses.double().clamp_min(1e-6).log()
    low, high = (curve.gather(1, at[:, None])[:, 0] for at in (above - 1, above))
    return torch.lerp(low, high, part).exp()
