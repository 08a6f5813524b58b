"""The compiled form of CompilerKV: how tokens are scored, and how slots are shared out between layers and KV heads.

Ours, in the sense of the abstract of https://arxiv.org/abs/2602.08686 v2: at run time one observation scan, look-ups
and a budget clamp. What is looked up is the slot budget of each layer and KV head, where the published form looks up
score weights and thresholds.
    score   attention of the last `window` queries, spread over `kernel` tokens, plus a share of the attention that the
            whole prompt paid (H2O's column sums); both are distributions over the prompt
    spread  forward: slot t takes the mean of slots t-kernel+1..t, because a token matters for what is read next
    basis   scores of each KV head, or their mean over the heads of a layer, or over all layers
    kept    the last `window` tokens, then the best; each head at its own budget
    gate    only tokens of at least `gate` times the mean score are candidates, so a head may keep fewer than its budget
`soft_bias` lets a loss be differentiated by slot budgets: a token is kept with probability sigmoid((log score - theta)
/ tau), theta such that the expected number of kept tokens is the head's budget; with tau towards 0, the hard choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from methods.base import KV, KVPolicy, LayerView, Needs, PolicyError, PromptView, Sizes, best, spread
from methods.device import placed
from methods.window import before_window, pooled, votes

MOST_WINDOW = 65_536
HALVINGS = 40
LEAST = 0.5  # expected slots of a head beside its window


class Form(BaseModel):
    """Parameters of the score. whole: share of whole-prompt attention in it, 0 to leave it out. gate: 0 for none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int = Field(default=16, ge=1, le=MOST_WINDOW)
    kernel: int = Field(default=13, ge=1, le=MOST_WINDOW)
    forward: bool = True
    whole: float = Field(default=0.2, ge=0, le=1, allow_inf_nan=False)
    basis: Literal["head", "layer", "global"] = "head"
    gate: float = Field(default=0.0, ge=0, le=1e6, allow_inf_nan=False)

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window, column_sums=self.whole > 0)

    def scores(self, view: PromptView) -> list[Tensor]:
        """Return the worth of every token in each layer: [B, H, T] float32, distributions over the prompt.

        Raises PolicyError when column sums are wanted and not there, or heads to be averaged hold unlike tokens.
        """
        key = self.model_copy(update={"basis": "head", "gate": 0.0})
        own = [layer.memo(key, self._score) for layer in view.layers]
        if self.basis == "head":
            return own
        if view.seen is not None:
            raise PolicyError(f"basis {self.basis!r} averages heads, which hold unlike tokens here; use basis 'head'")
        means = [scores.mean(dim=1, keepdim=True) for scores in own]
        if self.basis == "global":
            means = [torch.stack(means).mean(dim=0)] * len(own)
        return [mean.expand_as(scores) for mean, scores in zip(means, own, strict=True)]

    def _score(self, layer: LayerView) -> Tensor:
        found = layer.memo(("spread", self.window, self.kernel, self.forward), self._spread)
        if self.whole == 0:
            return found
        if layer.column_sums is None:
            raise PolicyError("this form needs column sums; declare them in needs, or use compilerkv@window")
        sums = layer.column_sums.sum(dim=2)
        return (1 - self.whole) * found + self.whole * sums / sums.sum(dim=-1, keepdim=True)

    def _spread(self, layer: LayerView) -> Tensor:
        return before_window(votes(layer, self.window), self.window, self.pooled)

    def pooled(self, attention: Tensor) -> Tensor:
        """Spread attention [B, H, S] of slots in the order of their tokens over `kernel` of them."""
        return pooled(attention, self.kernel, "avg", forward=self.forward)


@dataclass(frozen=True)
class FormPolicy(KVPolicy):
    """A form with a slot share for each layer and KV head. shares: [L][H], any scale; () is uniform."""

    form: Form
    shares: tuple[tuple[float, ...], ...] = ()

    @property
    def needs(self) -> Needs:
        return self.form.needs

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        if self.form.basis != "global":
            return super().compress(view, budget)
        counts = slot_counts(self.shares, budget, view.sizes, window=self.form.window)
        return [self._kept(*own) for own in zip(view.layers, self.form.scores(view), counts, strict=True)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        if self.form.basis == "global":
            return None
        return [partial(self._alone, own) for own in slot_counts(self.shares, budget, sizes, window=self.form.window)]

    def _alone(self, counts: list[int], layer: LayerView) -> KV:
        return self._kept(layer, self.form.scores(PromptView([layer]))[0], counts)

    def _kept(self, layer: LayerView, scores: Tensor, counts: list[int]) -> KV:
        scores, tokens = layer.only_live(scores), scores.shape[-1]
        slots = best_slots(scores, counts, recent=self.form.window)
        if self.form.gate:
            candidate = scores * tokens >= self.form.gate
            candidate[..., max(0, tokens - self.form.window) :] = True
            slots = slots.masked_fill(~candidate.gather(2, slots.clamp(min=0)), -1)
        return layer.kv.take(slots)


def slot_counts(shares: Sequence[Sequence[float]], budget: int, sizes: Sizes, *, window: int) -> list[list[int]]:
    """Return the slots of each layer and KV head, [L][H]; budget * L * H in all, none above the prompt.

    Every head holds the window, as far as the budget goes; what is beyond it is shared out in proportion to `shares`.
    """
    layers, heads = sizes.layers, sizes.kv_heads
    flat = [max(share, 1e-6) for row in shares for share in row] or [1.0] * (layers * heads)
    if len(flat) != layers * heads:
        what = f"{len(flat)} slot shares for {layers} layers of {heads} KV heads"
        raise PolicyError(f"{what}; compile them for this model")
    least = min(window, budget, sizes.tokens)
    slots = [least + own for own in spread((budget - least) * layers * heads, flat, sizes.tokens - least)]
    return [slots[i * heads : (i + 1) * heads] for i in range(layers)]


def best_slots(scores: Tensor, counts: Sequence[int], *, recent: int) -> Tensor:
    """Return the slots kept by each head: [1, H, max(counts)] int64, ascending, -1 behind a head's own number.

    scores: [1, H, T], distributions over the prompt. The last `recent` tokens come first, the latest of them when a
    head has fewer slots. Among equal scores the earlier token is kept.
    """
    tokens = scores.shape[-1]
    forced = scores.clone()
    size = min(recent, tokens)
    forced[..., tokens - size :] = scores.amax() + torch.arange(1, size + 1, device=scores.device)
    most = max(counts)
    beyond = torch.arange(most, device=scores.device) >= placed(counts, scores.device)[None, :, None]
    slots = best(forced, most).masked_fill(beyond, tokens).sort(dim=-1).values
    return slots.masked_fill(slots == tokens, -1)


def soft_bias(scores: Tensor, counts: Tensor, *, window: int, tau: float) -> Tensor:
    """Return the logit bias of each token, the logarithm of its probability to be kept: [R, H, T] float32, at most 0.

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
