"""Slots moved between the prompts of a batch by their risk: totals, slopes found again, nothing where risk is idle."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.contract import HEADS, LAYERS
from methods.base import Needs
from methods.compilerkv.policy import CompilerKV
from methods.compilerkv.risk import batch_budgets, fit_risk, multiples, risk_gain
from methods.compilerkv.tables import save_tables
from tests.methods.compiled import prompt, saved

BUDGETS = (64, 128, 256, 512)


def signals(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.stack([4 + torch.randn(count, generator=draw), 20 * torch.rand(count, generator=draw) + 1], dim=1)


def test_the_total_of_a_batch_stays_and_risk_decides_the_parts() -> None:
    risk = torch.tensor([[0.5, 4.0, 1.0], [0.0, 2.0, 1.0]])
    seen = torch.tensor([[3.0, 5.0], [4.0, 9.0], [5.0, 2.0]])
    shares = multiples(seen, risk)
    torch.testing.assert_close(shares / shares[1], torch.tensor([-0.5, 0.0, 0.5]).exp().double())
    found = batch_budgets(100, seen, risk)
    assert sum(found) == 300 and found[0] < 100 < found[2]
    still = torch.tensor([[0.0, 4.0, 1.0], [0.0, 2.0, 1.0]])
    assert batch_budgets(100, seen, still) == [100, 100, 100]


def test_slopes_are_found_where_risk_needs_slots_and_nowhere_else() -> None:
    seen = signals(200)
    need = (1.5 * (seen[:, 0] - seen[:, 0].mean()) / seen[:, 0].std()).exp()  # loss of a prompt: (need / budget) ** 2
    losses = (need[:, None] / torch.tensor(BUDGETS)) ** 2
    risk = fit_risk(losses, seen, BUDGETS)
    assert (risk[:, 0, 0] > 0).all() and (risk[:, 1, 0] == 0).all()
    report = risk_gain(losses, seen, BUDGETS, risk=risk, seed=0)
    assert report["128"]["over_uniform"]["low"] > 0 and report["128"]["over_shuffled"]["low"] > 0
    same = (100 / torch.tensor(BUDGETS)) ** 2
    assert (fit_risk(same.expand(200, -1), seen, BUDGETS)[:, :, 0] == 0).all()


def test_a_loss_between_two_budgets_is_a_power_of_the_budget() -> None:
    seen = torch.tensor([[3.0, 5.0], [5.0, 5.0]])
    risk = torch.tensor([[0.3, 4.0, 1.0], [0.0, 1.0, 1.0]])
    losses = torch.tensor([3.0, 5.0])[:, None] * torch.tensor(BUDGETS) ** -1.5
    gain = risk_gain(losses, seen, BUDGETS, risk=risk.expand(4, -1, -1), seed=0)["128"]["over_uniform"]["mean"]
    shares = torch.tensor([-0.3, 0.3]).exp()
    moved = torch.tensor([3.0, 5.0]) * (128 * shares / shares.mean()) ** -1.5
    assert gain == pytest.approx((losses[:, 1] - moved).mean().item(), rel=1e-4)


def test_a_batch_keeps_what_each_prompt_keeps_alone_unless_risk_pays(tmp_path: Path) -> None:
    views = [prompt(tokens) for tokens in (50, 60, 70)]
    tables = saved(tmp_path)
    policy = CompilerKV(tables=str(tmp_path))
    for own, view in zip(policy.compress_batch(views, 16), views, strict=True):
        for kv, alone in zip(own, policy.compress(view, 16), strict=True):
            assert torch.equal(kv.positions, alone.positions) and torch.equal(kv.keys, alone.keys)
    risk = torch.tensor([[0.6, 3.5, 0.1], [0.0, 1.0, 1.0]]).expand(2, 2, 3).contiguous()
    save_tables(replace(tables, risk=risk), tmp_path / "moved")
    moving = CompilerKV(tables=str(tmp_path / "moved"))
    assert moving.needs == Needs(window=64, column_sums=True, logprobs=True)
    totals = [sum(int(kv.live.sum()) for kv in own) for own in moving.compress_batch(views, 16)]
    assert sum(totals) == 3 * 16 * LAYERS * HEADS and len(set(totals)) > 1
