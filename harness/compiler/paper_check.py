"""What the published tables gain on validation prompts, each against its neutral values and its own shuffles.

Both tables are tried with the other one in force, and those compiled alone with the other one neutral. A table that
does not win both comparisons at a budget, by an interval above 0, is left neutral there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.compiler.paper_tables import Observed
from harness.compiler.stage import Workbench
from methods.compilerkv.manifest import PERPLEXITY_BINS, UNSUPPORTED_GATE, UNSUPPORTED_HEAD
from methods.compilerkv.risk import Edges, bins
from methods.compilerkv.selection import gains

SHUFFLES = 4
ARMS = ("head", "gate", "head_alone", "gate_alone")
NEUTRAL = {"head": UNSUPPORTED_HEAD, "gate": UNSUPPORTED_GATE}


def arms(tensors: Mapping[str, Tensor], row: int, *, seed: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return, for each table, what is compared at a budget: the neutral one, the table, and shuffles of it.

    Each is a pair of head weights [L, Hq] and thresholds [L, 20, 4].
    """
    draws = torch.Generator().manual_seed(seed)
    plain = {name: torch.full_like(tensors[name][row], value) for name, value in NEUTRAL.items()}
    found = {}
    for name in ARMS:
        own, kind = tensors[name][row], name.removesuffix("_alone")
        orders = [torch.randperm(own.numel(), generator=draws) for _ in range(SHUFFLES)]
        tried = [plain[kind], own, *(own.flatten()[order].view(own.shape) for order in orders)]
        other = "gate" if kind == "head" else "head"
        beside = plain[other] if name.endswith("_alone") else tensors[other][row]
        found[name] = [(one, beside) if kind == "head" else (beside, one) for one in tried]
    return found


def check_published(
    bench: Workbench, tensors: dict[str, Tensor], prompts: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return the tensors, neutral where a table gained nothing, reasons by table and budget, and all gains."""
    budgets, edges = bench.spec.budgets, Edges(tensors["entropy_edges"], tensors["perplexity_edges"])
    compared = [arms(tensors, row, seed=bench.spec.seed + row) for row in range(len(budgets))]

    def roll(at: int) -> list[Any]:
        seen = Observed(bench.rollout(at))
        place = bins(edges, torch.tensor([seen.entropy]), torch.tensor([seen.perplexity]))
        high, wide = divmod(int(place), PERPLEXITY_BINS)
        found = []
        for budget, own in zip(budgets, compared, strict=True):
            pairs = [pair for name in ARMS for pair in own[name]]
            weights = torch.stack([head for head, _ in pairs])
            thresholds = torch.stack([gate[:, high, wide] for _, gate in pairs])
            found.append(seen.lose(weights, thresholds, budget)[0].view(len(ARMS), -1).tolist())
        return found

    losses = bench.measure("check published", prompts, roll)  # [P, N, arms, 2 + shuffles]
    kept, reasons, report = {name: tensors[name].clone() for name in ARMS}, dict[str, str](), dict[str, Any]()
    for arm, name in enumerate(ARMS):
        for row, budget in enumerate(budgets):
            gained = gains(losses[:, row, arm], seed=bench.spec.seed)
            report[f"{name} {budget}"] = gained
            if why := no_gain(gained, "neutral"):
                kept[name][row] = NEUTRAL[name.removesuffix("_alone")]
                reasons[f"{name} {budget}"] = why
    return tensors | kept, reasons, report


def no_gain(found: Mapping[str, Any], plain: str) -> str:
    """Say why a table of these `gains` is left neutral; empty if it beats both. plain: what `uniform` stands for."""
    for rival, named in (("uniform", plain), ("shuffled", "shuffled")):
        gain = found[f"over_{rival}"]
        if gain["low"] <= 0:
            return f"gain over {named} {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}] nats"
    return ""
