"""The order in which the ranks of low-rank bases fall: those first that matter least to the last hidden states.

Source: cal_adaptive_rate.py at MatryoshkaKV-cache 25b5f13, which lets three quarters of all ranks fall a round. There
hidden states are those of 32 samples of the task; here those of the answers of calibration prompts.
"""

import math

import torch
from torch import Tensor

from harness.compiler.projected import LEVELS, SEEN, Bases, Projected
from harness.compiler.rollouts import Rollout
from harness.compiler.stage import Workbench

FALLING = 0.75
AT_ONCE = 192
"""Falls that are tried in one forward."""
LADDER_TOKENS, LADDER_PROMPTS = 2, 5
"""Answer tokens and prompts, a family each, that the order of falls is found on."""


def ladder(bench: Workbench, bases: Bases) -> Tensor:
    """The order in which ranks fall, each by an eighth at a time down to one: [(LEVELS - 1) * items] int64.

    An item is a place in levels [2, L, H], flat. Every round measures how much each fall alone would change the last
    hidden states from what they are now, and lets those fall that change them least.
    """
    own = [bench.prompts[at] for at in bench.training[:LADDER_PROMPTS]]
    seen = [Projected(Rollout(bench.engine, one.ids, one.answer[:LADDER_TOKENS], SEEN), bases) for one in own]
    levels, order = bases.full(), list[int]()
    with bench.bar("ranks", (LEVELS - 1) * bases.items, 0) as bar:
        while len(order) < bar.total:
            able = (levels.flatten() > 1).nonzero().flatten()
            errors = sum(_changes(one, levels, able) for one in seen)
            fall = able[torch.as_tensor(errors).argsort()[: math.ceil(FALLING * bases.items)]]
            levels.view(-1)[fall] -= 1
            order += fall.tolist()
            bar.update(len(fall))
    return torch.tensor(order)


def _changes(seen: Projected, levels: Tensor, able: Tensor) -> Tensor:
    """How much a fall of each of `able` changes the hidden states: squared, relative to what they are. [n] float32."""
    now, found = seen.hidden(levels.unsqueeze(0)), list[Tensor]()
    for start in range(0, len(able), AT_ONCE):
        items = able[start : start + AT_ONCE]
        rows = levels.repeat(len(items), 1, 1, 1)
        rows.view(len(items), -1).scatter_add_(1, items.unsqueeze(1), torch.full_like(items, -1).unsqueeze(1))
        found.append((seen.hidden(rows) - now).square().sum(dim=(1, 2)))
    return torch.cat(found) / now.square().sum()


def levels_at(bases: Bases, order: Tensor, share: float) -> Tensor:
    """Levels [2, L, H] after the fewest falls that bring the mean rank down to a share of D*."""
    falls = math.ceil((1 - share) * LEVELS * bases.items)
    own = bases.full()
    return own - torch.bincount(order[:falls], minlength=bases.items).view(own.shape).to(own.device)
