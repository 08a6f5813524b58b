"""Roll-outs of the compiler: what a row computes is what the engine computes for the cell that keeps the same slots."""

import copy
from typing import Any

import pytest
import torch

from harness.compiler.gradient import Descent
from harness.compiler.rollouts import Rollout
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from methods.base import Budget, Needs
from methods.compilerkv.form import Form, FormPolicy
from methods.registry import make_policy

FORM = Form(window=8, kernel=5)
SHARES = ((1.0, 3.0), (0.5, 1.0), (2.0, 0.2), (1.0, 1.0))
POLICIES = [*map(make_policy, ("fullkv", "snapkv@kvcf", "streamingllm", "compilerkv@paper"))]
POLICIES += [FormPolicy(FORM), FormPolicy(FORM, SHARES)]
NEEDS = Needs(window=64, column_sums=True, logprobs=True)


@pytest.fixture(scope="module")
def engine(tiny: LoadedModel) -> Engine:
    return Engine(AttachedModel(copy.deepcopy(tiny.model)))


def ids(tokens: int = 60) -> list[int]:
    found: list[int] = torch.randint(5, 260, (tokens,), generator=torch.Generator().manual_seed(3)).tolist()
    return found


ANSWER = [70, 80, 90, 75]


def test_attention_of_the_answer_on_some_tokens_is_that_of_the_plain_model(engine: Engine, tiny: LoadedModel) -> None:
    prompt, watch = ids(), [7, 8, 30]
    found = Rollout(engine, prompt, ANSWER, NEEDS).attention_on(watch)
    plain = copy.deepcopy(tiny.model)
    plain.set_attn_implementation("eager")
    out = plain(torch.tensor([[*prompt, *ANSWER[:-1]]]), output_attentions=True)
    rows = slice(len(prompt) - 1, len(prompt) + len(ANSWER) - 1)
    for layer, weights in enumerate(out.attentions):
        mass = weights[0, :, rows][..., watch].sum(dim=-1).mean(dim=-1)  # [Hq]
        torch.testing.assert_close(found[layer], mass.view(found.shape[1], -1).mean(dim=1), rtol=1e-3, atol=1e-5)


def test_rows_compute_what_the_engine_computes(engine: Engine) -> None:
    cells = [Cell(policy, Budget(tokens=20) if policy.budgeted else None) for policy in POLICIES]
    outcomes = engine.run(Prompt(ids(), 40, ANSWER, Limits(2, frozenset())), cells)
    rollout = Rollout(engine, ids(), ANSWER, NEEDS)
    kept = [rollout.kept(policy.compress(rollout.view, 20 if policy.budgeted else 60)) for policy in POLICIES]
    logprobs = rollout.logprobs([torch.cat(rows) for rows in zip(*kept, strict=True)])
    divergence, nll = rollout.losses(logprobs)
    assert {outcome.status for outcome in outcomes} == {"ok"}
    assert nll.tolist() == pytest.approx([sum(outcome.nll_per_token) / len(ANSWER) for outcome in outcomes], abs=1e-4)
    assert divergence[0].item() == pytest.approx(0, abs=1e-5) and bool((divergence[1:] > 0.01).all())


def test_divergence_and_nll_by_hand(engine: Engine) -> None:
    rollout = Rollout(engine, ids(), ANSWER, NEEDS)
    rows = torch.log_softmax(torch.randn(2, len(ANSWER), rollout.full.shape[1]), dim=-1)
    divergence, nll = rollout.losses(rows)
    for row in range(2):
        pairs = [pair for i in range(4) for pair in zip(rollout.full[i], rows[row, i], strict=True)]
        assert divergence[row].item() == pytest.approx(sum((p.exp() * (p - q)).item() for p, q in pairs) / 4, rel=1e-3)
        assert nll[row].item() == pytest.approx(-sum(rows[row, i, ANSWER[i]].item() for i in range(4)) / 4, rel=1e-5)


def test_a_descent_lowers_the_divergence_and_goes_on_where_it_stopped(engine: Engine) -> None:
    rollout = Rollout(engine, ids(), ANSWER, FORM.needs)
    budgets, steps = (16, 28), 30

    def descended(count: int, state: dict[str, Any] | None = None) -> Descent:
        descent = Descent(FORM, budgets, steps=steps, layers=4, heads=2)
        if state is not None:
            descent.at(state)
        for _ in range(count):
            descent.step(rollout)
        return descent

    shares = descended(steps).shares()
    assert shares.shape == (2, 4, 2)
    torch.testing.assert_close(shares.mean(dim=(1, 2)), torch.ones(2))
    assert not torch.equal(shares[0], shares[1])
    state = copy.deepcopy(descended(11).state())
    torch.testing.assert_close(descended(steps - 11, state).shares(), shares)

    def hard(budget: int, *table: tuple[float, ...]) -> float:
        kept = rollout.kept(FormPolicy(FORM, table).compress(rollout.view, budget))
        return rollout.losses(rollout.logprobs(kept))[0].item()

    for own, budget in zip(shares, budgets, strict=True):
        assert hard(budget, *map(tuple, own.tolist())) < hard(budget)


def test_a_rollout_leaves_the_prompt_as_it_was(engine: Engine) -> None:
    rollout = Rollout(engine, ids(), ANSWER, FORM.needs)
    before = [kv.keys.clone() for kv in rollout.kvs]
    first, again = (rollout.logprobs(rollout.all_kept()) for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(kv.keys, old) for kv, old in zip(rollout.kvs, before, strict=True))
