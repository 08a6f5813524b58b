"""CompilerKV as published: one scan of the last queries, two look-ups, one kept set per layer.

Source: https://arxiv.org/abs/2602.08686, v1 and v2. Acts once, at the end of prefill; the kept set stays as it is.
    utility  u = alpha * rho: attention mass of the last `window` queries, averaged over all layers and heads and scaled
             to a mean of 1 over tokens, times the norm of the token's value over its head's mean
    score    s = max over query heads of head weight * u
    gate     threshold tau from the layer's table, by entropy (nats) of alpha and perplexity of the window's own tokens
    kept     tokens with s >= tau; the best N of them when there are more, all when there are fewer
Differences: without tables nothing is learnt (see `tables.neutral`) and every record says so; a budget that was not
compiled, which the authors' second repository (59047a9) refuses, takes the table of the nearest one, and every record
says so; when no token reaches tau the best one is kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.base import KV, LayerView, PolicyError, PromptView
from methods.compilerkv.tables import Learned, Tables
from methods.device import placed, read


def compress(view: PromptView, budget: int, tables: Tables, *, window: int, learned: Learned) -> list[KV]:
    """Return what the published form leaves of every layer of `view`. learned: as in `Tables.lookup`."""
    alpha = prompt_utility(view, window)
    entropy, perplexity = prompt_risk(view, alpha, window)
    weights, thresholds = tables.lookup(budget, entropy=entropy, perplexity=perplexity, learned=learned)
    largest = weights.view(len(view.layers), view.sizes.kv_heads, -1).amax(dim=2).tolist()  # a group shares rho
    scores = [worth(layer, alpha, own) for layer, own in zip(view.layers, largest, strict=True)]
    reached = read([(own >= tau).sum() for own, tau in zip(scores, thresholds.tolist(), strict=True)])
    slots = [kept(own, max(1, min(budget, count))) for own, (count,) in zip(scores, reached, strict=True)]
    return [layer.kv.take(own.expand(1, len(largest[0]), -1)) for layer, own in zip(view.layers, slots, strict=True)]


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
    own = view.logprobs[0, max(0, view.logprobs.shape[1] - window) :].float()
    perplexity = own.mean().neg().exp() if own.numel() else torch.ones_like(alpha[0])
    (entropy,), (surprise,) = read([-torch.xlogy(share, share).sum(), perplexity])
    return entropy, surprise


def value_norms(layer: LayerView) -> Tensor:
    """Return rho, [H, T] float32: the norm of every value over the mean norm of its head."""
    norms: Tensor = layer.kv.values[0].float().norm(dim=-1)
    mean: Tensor = norms.mean(dim=-1, keepdim=True)
    return norms / mean.clamp_min(torch.finfo(norms.dtype).tiny)


def worth(layer: LayerView, alpha: Tensor, largest: Sequence[float]) -> Tensor:
    """Return the score of each token in one layer, [T] float32. largest: weight of each KV head's query heads, [H]."""
    rho = value_norms(layer)
    weights = placed(largest, rho.device)
    return layer.finite((weights[:, None] * rho).amax(dim=0) * alpha.to(rho.device), "scores")


def kept(scores: Tensor, count: int) -> Tensor:
    """Return the best `count` tokens by scores [T], ascending; among equal ones the earlier is kept."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
