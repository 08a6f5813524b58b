"""CompilerKV as published: one scan of the last queries, two look-ups, one kept set per layer.

Source: https://arxiv.org/abs/2602.08686, v1 and v2. Acts once, at the end of prefill; the kept set stays as it is.
    utility  u = alpha * rho: attention mass of the last `window` queries, averaged over all layers and heads and scaled
             to a mean of 1 over tokens, times the norm of the token's value over its head's mean
    score    s = max over query heads of head weight * u
    gate     threshold tau from the layer's table, by entropy (nats) of alpha and perplexity of the window's own tokens
    kept     tokens with s >= tau; the best N of them when there are more, all when there are fewer
Differences: without tables nothing is learnt (see `tables.neutral`) and every record says so; a budget that was not
compiled takes the table of the nearest one, and every record says so; when no token reaches tau the best one is kept.
"""

import torch
from torch import Tensor

from methods.base import KV, LayerView, PolicyError, PromptView
from methods.compilerkv.tables import Learned, Tables


def compress(view: PromptView, budget: int, tables: Tables, *, window: int, learned: Learned) -> list[KV]:
    """Return what the published form leaves of every layer of `view`. learned: as in `Tables.lookup`."""
    alpha = prompt_utility(view, window)
    entropy, perplexity = prompt_risk(view, alpha, window)
    weights, thresholds = tables.lookup(budget, entropy=entropy, perplexity=perplexity, learned=learned)
    return [
        layer.kv.take(kept(layer, alpha, weights[i], tau=thresholds[i].item(), budget=budget))
        for i, layer in enumerate(view.layers)
    ]


def prompt_utility(view: PromptView, window: int) -> Tensor:
    """Return alpha, [T] float32: attention of the last `window` queries over layers and heads, mean 1; memoised."""

    def utility(first: LayerView) -> Tensor:
        mass = torch.zeros(view.tokens, device=first.kv.keys.device)
        for layer in view.layers:  # one layer's attention at a time
            mass += layer.attention(window).mean(dim=(0, 1, 2, 3)).to(mass.device)
        return mass * (view.tokens / len(view.layers))

    return view.layers[0].memo(("compilerkv alpha", window), utility)


def prompt_risk(view: PromptView, alpha: Tensor, window: int) -> tuple[float, float]:
    """Return the entropy in nats of alpha, and the perplexity of the last `window` tokens (1 when there is none)."""
    if view.logprobs is None:
        raise PolicyError("compilerkv needs log-probabilities of the prompt; declare them in needs")
    share = alpha / alpha.sum()
    entropy = -torch.xlogy(share, share).sum().item()
    own = view.logprobs[0, max(0, view.logprobs.shape[1] - window) :].float()
    return entropy, own.mean().neg().exp().item() if own.numel() else 1.0


def value_norms(layer: LayerView) -> Tensor:
    """Return rho, [H, T] float32: the norm of every value over the mean norm of its head."""
    norms: Tensor = layer.kv.values[0].float().norm(dim=-1)
    mean: Tensor = norms.mean(dim=-1, keepdim=True)
    return norms / mean.clamp_min(torch.finfo(norms.dtype).tiny)


def kept(layer: LayerView, alpha: Tensor, weights: Tensor, *, tau: float, budget: int) -> Tensor:
    """Return the slots kept in one layer, the same for all its heads: [1, H, S] int64, ascending, 1 <= S <= budget.

    weights: [Hq]. Among equal scores the earlier token is kept.
    """
    rho = value_norms(layer)
    heads = rho.shape[0]
    largest = weights.to(rho.device).view(heads, -1).amax(dim=1)  # [H]: a group shares rho, so its largest weight acts
    scores = layer.finite((largest[:, None] * rho).amax(dim=0) * alpha.to(rho.device), "scores")  # [T]
    count = max(1, min(budget, int((scores >= tau).sum())))
    best = scores.sort(descending=True, stable=True).indices[:count].sort().values
    return best.expand(1, heads, -1)
