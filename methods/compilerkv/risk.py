"""Budgets of the prompts of a batch by their risk, at a fixed total.

In the spirit of the risk gate of https://arxiv.org/abs/2602.08686, which lets a prompt's entropy and perplexity decide
how much of it is kept: a prompt's share of the batch's slots is exp(slope . z), where z are its entropy of attention
and its logarithm of perplexity (`paper.prompt_risk`), standardised by the calibration prompts. Slopes are chosen on
training prompts, and stay 0 when validation prompts do not confirm that moving slots is better than leaving them.

Shape letters: P prompts   N compiled budgets.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from methods.base import spread
from methods.compilerkv.selection import interval

SLOPES = (-0.6, -0.3, 0.0, 0.3, 0.6)
MOST = 2.0
"""Most even shares that one prompt gets; one over it is the least. The total is restored afterwards."""


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
