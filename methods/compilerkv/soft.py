"""Soft eviction: a slot's logit bias that lets a loss be differentiated by the slot budgets of layers and KV heads.

A token is kept with probability sigmoid((log score - theta) / tau), where theta is solved for so that the expected
number of kept tokens is the head's budget; the bias is the logarithm of that probability. With tau towards 0 this is
the hard choice of the best tokens. Our own estimator; the published one is in `methods.compilerkv.cql`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

HALVINGS = 40
LEAST = 0.5  # expected slots of a head beside its window


def soft_bias(scores: Tensor, counts: Tensor, *, window: int, tau: float) -> Tensor:
    """Return the logarithm of the probability that each token is kept: [R, H, T] float32, at most 0.

    scores: [H, T] float32 >= 0. counts: [R, H] >= window, slots of each head, differentiable. The last `window` tokens
    are kept.
    """
    before = scores.shape[1] - window
    logs = scores[:, :before].clamp_min(torch.finfo(scores.dtype).tiny).log()  # [H, P]
    wanted = (counts - window).clamp(LEAST, before - LEAST)
    theta = _threshold(logs, wanted.detach(), tau)
    z = (logs - theta.unsqueeze(-1)) / tau  # [R, H, P]
    kept = z.sigmoid()
    slope = (kept * (1 - kept)).sum(dim=-1) / tau  # - d count / d theta
    moved = theta - (wanted - wanted.detach()) / slope.clamp_min(1e-6)  # theta as a function of the budget
    bias = logsigmoid((logs - moved.unsqueeze(-1)) / tau)
    return torch.cat([bias, bias.new_zeros(*bias.shape[:2], window)], dim=-1)


def shares_of(weights: Tensor) -> Tensor:
    """Return slot shares with mean 1 from free log-weights: [L, H]."""
    return weights.exp() / weights.exp().mean()


def _threshold(logs: Tensor, wanted: Tensor, tau: float) -> Tensor:
    """Theta [R, H] at which the expected number of kept tokens is `wanted` [R, H]. logs: [H, P]."""
    edge = 60 * tau
    low = (logs.amin(dim=-1) - edge).expand_as(wanted).clone()
    high = (logs.amax(dim=-1) + edge).expand_as(wanted).clone()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        many = ((logs - middle.unsqueeze(-1)) / tau).sigmoid().sum(dim=-1) > wanted
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return (low + high) / 2
