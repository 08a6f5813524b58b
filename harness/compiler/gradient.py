"""Slot budgets by gradient: Adam on the divergence from the full cache, through a soft eviction.

The estimator of the compiled form: log-weights of every layer and KV head, shared by all budgets, plus each budget's
own deviation from them. One step is one calibration prompt at all budgets; every budget's loss is divided by its
running mean, so that the small losses of large budgets count as much.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from harness.compiler.rollouts import Rollout
from harness.errors import HarnessError
from methods.compilerkv.form import Form, shares_of, soft_bias

RATE = 0.05
WARM, COLD = 0.6, 0.25
"""Temperature of the soft eviction at the first and at the last step, in nats of the score's logarithm."""
OWN_PENALTY = 0.01
"""Weight of the squared deviation of a budget from what all budgets share, beside losses near 1."""
MEMORY = 0.9
"""Weight of the past in the running mean of a budget's loss."""


class Descent:
    """One estimate. shared: [L, H], own: [N, L, H] log-weights. losses: of every step taken, at each budget."""

    def __init__(self, form: Form, budgets: Sequence[int], *, steps: int, layers: int, heads: int) -> None:
        self.form, self.budgets, self.steps = form, budgets, steps
        self.shared = torch.zeros(layers, heads, requires_grad=True)
        self.own = torch.zeros(len(budgets), layers, heads, requires_grad=True)
        self.losses: list[list[float]] = []
        self._mean: Tensor | None = None
        self._optimizer = torch.optim.Adam([self.shared, self.own], lr=RATE)

    def state(self) -> dict[str, Any]:
        """Return everything that `at` needs to go on from here: tensors, numbers and lists."""
        tensors = {"shared": self.shared.detach().clone(), "own": self.own.detach().clone(), "mean": self._mean}
        return {**tensors, "losses": self.losses, "optimizer": self._optimizer.state_dict()}

    def at(self, state: dict[str, Any]) -> Self:
        """Return this estimate as it was when `state` was taken."""
        with torch.no_grad():
            self.shared.copy_(state["shared"])
            self.own.copy_(state["own"])
        self.losses, self._mean = [list(losses) for losses in state["losses"]], state["mean"]
        self._optimizer.load_state_dict(state["optimizer"])
        return self

    def shares(self) -> Tensor:
        """Return slot multiples [N, L, H], mean 1 for each budget."""
        return torch.stack([shares_of(self.shared + own) for own in self.own])

    def step(self, rollout: Rollout) -> None:
        """Take one step, and note the divergence at every budget before it, in nats a token."""
        done = len(self.losses) / max(1, self.steps - 1)
        found = self._divergence(rollout, tau=WARM + (COLD - WARM) * min(1.0, done))
        if not bool(found.isfinite().all()):
            raise HarnessError(f"step {len(self.losses)} has losses {found.tolist()}; try --dtype float32")
        now = found.detach().clamp_min(1e-4)
        self._mean = now if self._mean is None else MEMORY * self._mean + (1 - MEMORY) * now
        loss = (found / self._mean).mean() + OWN_PENALTY * self.own.square().sum(dim=(1, 2)).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.losses.append(found.tolist())

    def _divergence(self, rollout: Rollout, *, tau: float) -> Tensor:
        beyond = (torch.tensor(self.budgets) - self.form.window).clamp(min=0)
        counts = self.form.window + beyond[:, None, None] * self.shares()
        biases = [
            soft_bias(scores[0].clone(), counts[:, i], window=self.form.window, tau=tau)
            for i, scores in enumerate(self.form.scores(rollout.view))
        ]
        return rollout.losses(rollout.logprobs(biases, grad=True))[0]
