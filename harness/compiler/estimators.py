"""Estimators of slot budgets behind one interface: (workbench, name, form, prompts, steps) to multiples [N, L, H].

gradient  Adam through a soft eviction (harness.compiler.gradient)
ridge     effects of foldover designs (methods.compilerkv.designs): every layer and KV head up or down at once, each
          row with its mirror image; the strength of the table is chosen on training prompts
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from harness.compiler.gradient import Descent
from harness.compiler.stage import Workbench
from methods.compilerkv.designs import foldovers, multipliers, ridge, split_half
from methods.compilerkv.form import Form, FormPolicy

Estimator = Callable[[Workbench, str, Form, Sequence[int], int], Tensor]

KEEP_EVERY = 20
"""Steps of a descent between two stored states."""
PAIRS = 16
"""Mirrored pairs of rows of a prompt at a budget."""
SWING = 0.5
"""Logarithm by which a design moves a head's budget up or down, about."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
STRENGTH_PROMPTS = 16


def by_gradient(bench: Workbench, name: str, form: Form, prompts: Sequence[int], steps: int) -> Tensor:
    """Return slot multiples by descent; every prompt in turn, in a seeded order."""
    generator = torch.Generator().manual_seed(bench.spec.seed)
    rounds = -(-steps // len(prompts))
    order = [prompts[i] for _ in range(rounds) for i in torch.randperm(len(prompts), generator=generator).tolist()]
    order = order[:steps]
    size = {"layers": bench.shapes.layers, "heads": bench.shapes.kv_heads}
    descent = bench.saved.restore(name, Descent(form, bench.spec.budgets, steps=len(order), **size))
    done = len(descent.losses)
    with bench.bar(f"budgets ({name})", len(order), done) as bar:
        for step, at in enumerate(order[done:], start=done + 1):
            descent.step(bench.rollout(at))
            bar.update()
            if step % KEEP_EVERY == 0 or step == len(order):
                bench.saved.keep(name, descent)
    return descent.shares().detach()


def by_ridge(bench: Workbench, name: str, form: Form, prompts: Sequence[int], steps: int) -> Tensor:
    """Return slot multiples from ridge regression on balanced foldover designs, a table for each budget; no steps."""
    layers, heads = bench.shapes.layers, bench.shapes.kv_heads
    designs = _designs(bench, prompts)
    place = {at: i for i, at in enumerate(prompts)}

    def roll(at: int) -> list[list[float]]:
        rows = multipliers(designs[place[at]], strength=SWING).view(-1, layers, heads)
        candidates = [with_table(form, row) for row in rows]
        return [bench.divergences(at, candidates, budget) for budget in bench.spec.budgets]

    found = bench.measure(f"ridge {name}", prompts, roll)  # [P, N, R]
    tables = []
    for i, budget in enumerate(bench.spec.budgets):
        effects = ridge(designs, found[:, i], seed=bench.spec.seed).values
        own = [multipliers(effects, strength=strength).view(layers, heads) for strength in STRENGTHS]
        tried = partial(bench.divergences, candidates=[with_table(form, table) for table in own], budget=budget)
        losses = bench.measure(f"ridge {name} strength at {budget}", prompts[:STRENGTH_PROMPTS], tried)
        tables.append(own[int(losses.mean(dim=0).argmin())])
    return torch.stack(tables).float()


def ridge_reliability(bench: Workbench, name: str, prompts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return how far the effects of `by_ridge` from random halves of its prompts agree, at each budget."""
    designs, losses = _designs(bench, prompts), bench.found(f"ridge {name}", prompts)
    halves = (split_half(designs, losses[:, i], seed=bench.spec.seed) for i in range(len(bench.spec.budgets)))
    return {str(budget): half._asdict() for budget, half in zip(bench.spec.budgets, halves, strict=True)}


def _designs(bench: Workbench, prompts: Sequence[int]) -> Tensor:
    """[P, R, F]: rows of every prompt, a factor for each layer and KV head."""
    return foldovers(len(prompts), bench.shapes.layers * bench.shapes.kv_heads, PAIRS, bench.spec.seed)


def with_table(form: Form, table: Tensor) -> FormPolicy:
    """Return a form with a table [L, H] of slot multiples."""
    return FormPolicy(form, tuple(map(tuple, table.tolist())))


ESTIMATORS: Mapping[str, tuple[Estimator, str]] = {
    "gradient": (by_gradient, "budgets by gradient through soft eviction"),
    "ridge": (by_ridge, "budgets by ridge on foldover designs"),
}
