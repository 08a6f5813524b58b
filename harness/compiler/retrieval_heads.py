"""Importance of heads in one pass: how much answers look, through each KV head, at the sentences they come from.

Source: https://arxiv.org/abs/2410.19258, see `methods.headkv` for what differs. A head's multiple of the mean budget is
an even base and its part of a pool by importance; for the compiled score the pool's share is chosen on training
prompts, over the shares that HeadKV's authors try.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.compiler.estimators import with_table
from harness.compiler.stage import CHOICE_PROMPTS, Workbench
from methods.compilerkv.form import Form
from methods.compilerkv.tables import one_pass
from methods.headkv import BETAS


def head_importance(bench: Workbench, prompts: Sequence[int]) -> Tensor:
    """Return the importance of every layer and KV head, [1, L, H], mean 1, from the prompts that hold their answer."""
    asked = [at for at in prompts if bench.prompts[at].needle]
    found = bench.measure(
        "importance", asked, lambda at: bench.rollout(at).attention_on(bench.prompts[at].needle).tolist()
    )
    importance = found.mean(dim=0, keepdim=True)
    return importance / importance.mean()


def choose_pool(bench: Workbench, form: Form, importance: Tensor, prompts: Sequence[int]) -> Tensor:
    """Return the share of slots given out by importance that loses least at each budget under a form: [N]."""
    pools = torch.tensor([1 / beta for beta in BETAS])
    candidates = [with_table(form, one_pass(importance[0], pool)) for pool in pools]
    compared = [(budget, candidates) for budget in bench.spec.budgets]
    losses = bench.compare("pool", prompts[:CHOICE_PROMPTS], compared).mean(dim=0)  # [N, pools]
    return pools[losses.argmin(dim=1)]
