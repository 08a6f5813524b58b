"""HeadKV-style slot budgets: how much answers look, through each KV head, at the sentences they come from.

Source: https://arxiv.org/abs/2410.19258, see `methods.headkv` for what differs. A head's multiple of the mean budget is
an even base and its part of a pool; the pool's share of all slots is chosen on training prompts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.compiler.estimators import STRENGTH_PROMPTS, candidate
from harness.compiler.stage import Workbench
from methods.compilerkv.form import Form

POOLS = (0.05, 0.2, 0.5, 0.8)
"""Shares of all slots that are given out by importance."""


def by_retrieval(bench: Workbench, form: Form, prompts: Sequence[int]) -> Tensor:
    """Return slot multiples [N, L, H], mean 1, from the prompts whose answer stands in them."""
    asked = [at for at in prompts if bench.prompts[at].needle]
    found = bench.measure(
        "retrieval", asked, lambda at: bench.rollout(at).attention_on(bench.prompts[at].needle).tolist()
    )
    importance = found.mean(dim=0)  # [L, H]
    importance = importance / importance.mean()
    tables = [1 - pool + pool * importance for pool in POOLS]
    candidates = [candidate(form, table) for table in tables]
    compared = [(budget, candidates) for budget in bench.spec.budgets]
    losses = bench.compare("retrieval pool", prompts[:STRENGTH_PROMPTS], compared).mean(dim=0)  # [N, pools]
    return torch.stack([tables[int(row.argmin())] for row in losses])
