"""What our code of a method does on a prompt that is made up for it, as one number each; seconds, no model.

A prompt is random where nothing else is said (`harness.contract.make_view`: 4 layers of 2 KV heads and 6 query heads).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from harness.claims.claim import Found
from harness.contract import make_view
from methods.base import KV, LayerView, PolicyError, PromptView
from methods.compilerkv import paper
from methods.compilerkv.manifest import Shapes
from methods.compilerkv.policy import COMPILED
from methods.compilerkv.tables import Tables, load_tables, neutral
from methods.registry import make_policy
from methods.views import POSITION_BYTES, Form

DIM = 128
FAR = 40.0
"""Logit below which a weight of softmax is 0 in float32, beside others of 0."""


def golden_prompt(attention: tuple[float, ...]) -> PromptView:
    """A layer of two heads and three tokens, whose values are of lengths 1, 1, 1 and 1, 2, 3.

    attention: 1 for each token that the last query sees, 0 for the others; both heads alike. The query before it sees
    the tokens up to itself alike.
    """
    keys = torch.zeros(1, 2, 3, 4)
    keys[..., 0] = (1 - torch.tensor(attention)) * -FAR
    queries = torch.zeros(1, 2, 2, 4)
    queries[:, :, 1, 0] = FAR
    values = torch.zeros(1, 2, 3, 4)
    values[0, :, :, 1] = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    kv = KV(keys, values, torch.arange(3, dtype=torch.int32).expand(1, 2, 3))
    return PromptView([LayerView(0, kv, queries, Form(1.0))], torch.zeros(1, 2))


def golden_tables(weights: tuple[float, ...], tau: float, budget: int) -> Tables:
    """Tables of the published form that weigh two heads so, with one threshold for every risk."""
    tables = neutral(Shapes(layers=1, query_heads=2, kv_heads=2), (budget,))
    tables.head[:] = torch.tensor(weights)
    tables.gate.fill_(tau)
    return tables


def compilerkv_golden(
    *,
    attention: tuple[float, ...],
    weights: tuple[float, ...],
    tau: float,
    budget: int,
    alpha: tuple[float, ...],
    scores: tuple[float, ...],
    kept: tuple[float, ...],
) -> float:
    """Largest difference of utilities and scores from those given; infinite where other tokens are kept."""
    view = golden_prompt(attention)
    found = paper.prompt_utility(view, 2)
    worth = paper.worth(view.layers[0], found, weights)
    (kv,) = paper.compress(view, budget, golden_tables(weights, tau, budget), window=2, learned="both")
    if kv.positions[0].tolist() != [[int(t) for t in kept]] * 2:
        return float("inf")
    return max(_apart(found, alpha), _apart(worth, scores))


def _apart(found: Tensor, told: tuple[float, ...]) -> float:
    return float((found - torch.tensor(told)).abs().max())


def compilerkv_refusals(*, compiled: int, asked: tuple[float, ...]) -> float:
    """Share of some budgets that tables compiled for one other budget refuse, in percent."""
    tables, refused = golden_tables((1.0, 1.5), 0.9, compiled), 0
    for budget in asked:
        try:
            paper.compress(golden_prompt((0.0, 1.0, 1.0)), int(budget), tables, window=2, learned="both")
        except PolicyError:
            refused += 1
    return 100 * refused / len(asked)


def halves_spearman(*, model: str) -> Found:
    """Spearman correlation of the budgets that disjoint halves of the calibration prompts gave, of packaged tables.

    Its 95 % interval over heads is Fisher's, with the variance 1.06 / (n - 3) of Fieller, Hartley and Pearson (1957).
    """
    manifest = load_tables(COMPILED / model).manifest
    told, heads = float(manifest.report["halves_spearman"]), manifest.shapes.layers * manifest.shapes.kv_heads
    half = 1.96 * math.sqrt(1.06 / (heads - 3))
    low, high = (math.tanh(math.atanh(told) + end) for end in (-half, half))
    return Found(told, low, high, heads)


def layer_ratio(*, label: str, tokens: int, budget: int) -> float:
    """How many times more slots outside the window the first layer has than the last."""
    policy = make_policy(label)
    first, *_, last = (kv.positions.shape[2] - policy.needs.window for kv in _left(label, tokens, budget))
    return first / last


def oldest_recent(*, label: str, tokens: int, budget: int, share: float = 1.0, sinks: int = 0) -> float:
    """Percent of the last `share` of the budget's tokens, less the sinks, that every head of every layer keeps."""
    count = int(budget * share) - sinks
    wanted = set(range(tokens - count, tokens))
    kept = (set(head) for kv in _left(label, tokens, budget) for head in kv.positions[0].tolist())
    return min(100 * len(wanted & own) / count for own in kept)


def least_head_percent(*, label: str, tokens: int, budget: int) -> float:
    """The fewest slots outside the window that a head keeps, in percent of an even share."""
    window = make_policy(label).needs.window
    least = min(int(kv.live[0].min()) for kv in _left(label, tokens, budget))
    return 100 * (least - window) / (budget - window)


def stored_bits(*, label: str, tokens: int) -> float:
    """Bits that a method stores of a bfloat16 number, with scales, of heads of 128; positions left out."""
    policy = make_policy(label)
    kvs = policy.compress(make_view(tokens, policy.needs, dim=DIM, dtype=torch.bfloat16), tokens)
    slots = sum(int(kv.live.sum()) for kv in kvs)
    return 8 * (sum(kv.nbytes for kv in kvs) - POSITION_BYTES * slots) / (2 * DIM * slots)


def distortion_percent_of_bound(*, label: str, bits: int, tokens: int) -> float:
    """Mean squared error of keys and values by their squared length, in percent of sqrt(3) pi / 2 / 4^bits."""
    policy = make_policy(label)
    view = make_view(tokens, policy.needs, dim=DIM)
    error = length = 0.0
    for kv, layer in zip(policy.compress(view, tokens), view.layers, strict=True):
        for found, own in zip(kv.load(), (layer.kv.keys, layer.kv.values), strict=True):
            error += float((found - own)[:, :, :-1].square().sum())  # the last one is plain
            length += float(own[:, :, :-1].square().sum())
    return 100 * error / length / (math.sqrt(3) * math.pi / 2 / float(4**bits))


def _left(label: str, tokens: int, budget: int) -> list[KV]:
    """What a method leaves of a random prompt."""
    policy = make_policy(label)
    return policy.compress(make_view(tokens, policy.needs), budget)


PROPERTIES: dict[str, Callable[..., float | Found]] = {
    own.__name__: own
    for own in (
        compilerkv_golden,
        compilerkv_refusals,
        halves_spearman,
        layer_ratio,
        oldest_recent,
        least_head_percent,
        stored_bits,
        distortion_percent_of_bound,
    )
}
