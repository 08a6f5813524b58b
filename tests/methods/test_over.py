"""Methods around methods (`over`): each pair of them is compressed within its budget, or refused in one line."""

import pytest

from harness.contract import HEADS, LAYERS, make_view
from methods.base import PolicyError
from methods.budget import BudgetTooSmall
from methods.registry import make_policy
from tests.methods.test_contract import LABELS

TOKENS, DIM = 160, 32
OUTER = {"quant": {"bits": 8, "group": 16, "residual": 8}, "protect": {}, "criticalkv": {}, "criticaladakv": {}}
ATTENTION = {"snapkv", "snapkv@compiled", "adakv", "headkv", "h2o", "tova", "expected_attention"}
EVICTING = {*ATTENTION, "compilerkv", "lagkv", "cur", "leverage", "compactor", "simlayerkv", "kvcompose", "rkv@prefill"}
EVICTING |= {"duoattention", "criticalkv", "criticaladakv"}
SERVED = {
    "quant": {*EVICTING, "finch"},
    "protect": EVICTING,
}
SERVED |= dict.fromkeys(("criticalkv", "criticaladakv"), frozenset({*ATTENTION, "compilerkv", "kvzip"}))
"""What is never to be refused, of each."""


def refusal(outer: str, label: str) -> str:
    """Why a pair is refused; empty where both budgets are kept to."""
    try:
        policy = make_policy(outer, {**OUTER[outer], "over": label})
        view = make_view(TOKENS, policy.needs, dim=DIM)
        view.protected = (0, 1, 30, 31)
        for budget in (12, 60):
            try:
                kept = policy.compress(view, budget)
            except BudgetTooSmall:
                continue  # of this prompt, which is skipped then
            asked = budget * LAYERS * HEADS * view.layers[0].kv.slot_bytes
            spent = sum(kv.nbytes for kv in kept)
            assert spent > 0 and (policy.kind == "own" or spent <= asked)
            assert [kv.positions.shape[:2] for kv in kept] == [(1, HEADS)] * LAYERS
    except PolicyError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("label", LABELS)
def test_a_method_around_a_method_keeps_to_the_budget_or_is_refused_in_a_line(outer: str, label: str) -> None:
    told = refusal(outer, label)
    assert not (told and label in SERVED[outer])
    if told:
        assert told.startswith(f"{outer}.over='{label}'") and "\n" not in told and len(told) < 160
