"""Conservative Q-learning: its loss by hand, planted effects recovered, and the alternation of the two tables."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from torch import Tensor

from methods.base import PolicyError
from methods.compilerkv.cql import (
    PUBLISHED,
    Fitted,
    Records,
    Settings,
    Space,
    alternate,
    balanced_epoch,
    checksum,
    fit,
    gate_reward,
    gate_space,
    head_space,
    loss,
)
from methods.compilerkv.designs import correlation, foldover_levels
from methods.compilerkv.risk import bin_edges, bins
from methods.compilerkv.tables import Shapes, neutral

FAST = Settings(lr=0.05, epochs=60)


def learn(
    states: Tensor, actions: Tensor, rewards: Tensor, *, shape: tuple[int, int] = (2, 2), **changes: Any
) -> Fitted:
    """shape: states and actions. The last action is the neutral one."""
    space = Space(shape[:1], 0.0, 1.0, shape[1], 1.0)
    return fit([Records(states, actions, rewards, opposite="")], space, **{"seed": 0, **changes})


def test_published_settings_are_the_default() -> None:
    assert Settings(0.75, 0.5, 3e-4, 0.01, 4096, 10) == PUBLISHED
    for space, *expected in ((head_space(1, 3, 6), 29, 0.8, 1.5, 1.0), (gate_space(1, 3), 21, 0.8, 1.0, 0.8)):
        values = space.values.tolist()
        assert [len(values), values[0], values[-1], values[space.fallback]] == pytest.approx(expected)


def test_loss_of_a_two_by_two_table_by_hand() -> None:
    q = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]])
    states, actions, rewards = torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([-1.0, 3.0])
    first = 0.75 * (math.log(4) - 0.0) + 0.5 * (0.0 + 1.0) ** 2
    second = 0.75 * math.log(2) + 0.5 * (1.0 - 3.0) ** 2
    assert loss(q, states, actions, rewards).item() == pytest.approx((first + second) / 2)


def test_one_published_step_moves_q_by_the_learning_rate_against_the_gradient() -> None:
    # at Q = 0 the untried action has gradient 0.75 / 2, the tried one 0.75 * (1 / 2 - 1) - r
    records = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0.5, -0.5])
    found = learn(*records, settings=Settings(epochs=1))
    expected = 3e-4 * torch.tensor([[1.0, -1.0], [-1.0, -1.0]])  # -(-0.375 - 0.5) and -(-0.375 + 0.5)
    assert torch.allclose(found.q, expected, rtol=1e-4)
    assert found.reach == pytest.approx(3e-4)


@pytest.mark.parametrize("levels", [2, 5])
def test_balanced_designs_recover_planted_effects(levels: int) -> None:
    factors, draw = 24, torch.Generator().manual_seed(0)
    gains = torch.randn(factors, generator=draw)
    tried = [foldover_levels(factors, 10, levels, seed) for seed in range(64)]
    actions = torch.cat(tried)  # [R, F]
    spread = actions / (levels - 1) * 2 - 1.0
    rewards = spread @ gains * 0.2 + 0.1 * torch.randn(len(actions), generator=draw)
    records = Records.of(actions, rewards, states=torch.arange(factors), opposite="")
    found = fit([records], Space((factors,), 0.0, 1.0, levels, 0.0), seed=0, settings=Settings(lr=0.02, epochs=30))
    assert found.reach == pytest.approx(0.02 * 30 * math.ceil(actions.numel() / 4096))
    slope = found.q[:, -1] - found.q[:, 0]
    assert correlation(slope, gains) > 0.9
    strong = gains.abs() > 0.5
    best = torch.where(gains > 0, levels - 1, 0)
    assert int((found.actions - best)[strong].abs().max()) <= (levels > 2)  # a neighbour is nearly as good
    assert int(found.support.min()) == int(found.support.max())


def test_unbalanced_designs_pick_what_was_tried_most() -> None:
    """The conservative term outweighs a reward of 0.3: why designs must be balanced."""
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, 0.3, 0.0])
    for share, chosen in (([0.9, 0.05, 0.05], 0), ([1.0, 1.0, 1.0], 1)):
        actions = torch.multinomial(torch.tensor(share), 20_000, replacement=True, generator=draw)
        rewards = values[actions] + 0.1 * torch.randn(20_000, generator=draw)
        found = learn(torch.zeros_like(actions), actions, rewards, shape=(2, 3), settings=FAST)
        assert found.actions[0] == chosen


def test_states_without_records_take_the_neutral_action_and_are_counted() -> None:
    states, actions = torch.tensor([1, 1, 3]), torch.tensor([0, 1, 1])
    found = learn(states, actions, torch.tensor([1.0, 0.0, 2.0]), shape=(5, 3), settings=FAST)
    assert found.actions.tolist() == [2, 0, 2, 1, 2]
    assert found.support.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert (found.unsupported, found.untried) == (3, 0)
    found = Fitted(torch.zeros(3, 2), torch.tensor([[0, 0], [2, 0], [0, 3]]), torch.tensor([0, 1, 1]), 0.0)
    assert (found.unsupported, found.untried) == (1, 1)  # one chose what none of its records tried


def test_the_same_seed_gives_the_same_q_and_another_seed_another() -> None:
    draw = torch.Generator().manual_seed(5)
    records = torch.randint(2, (500,), generator=draw), torch.randint(2, (500,), generator=draw), torch.rand(500)
    small = Settings(batch=64)
    first, again, other = (learn(*records, seed=seed, settings=small) for seed in (1, 1, 2))
    assert torch.equal(first.q, again.q)
    assert not torch.equal(first.q, other.q)


@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), seed=st.integers(0, 9))
@example_settings(max_examples=60, deadline=None)
def test_every_state_with_records_is_drawn_equally_often(counts: list[int], seed: int) -> None:
    states = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    picks = balanced_epoch(states, torch.Generator().manual_seed(seed))
    assert picks.shape == states.shape
    drawn = torch.bincount(states[picks], minlength=len(counts))
    present = drawn[torch.tensor(counts) > 0]
    assert int(present.max() - present.min()) <= 1
    assert int(drawn.sum()) == int(present.sum())
    for state, count in enumerate(counts):  # its records in turn
        uses = torch.bincount(picks[states[picks] == state], minlength=len(states))[states == state]
        assert not count or int(uses.max() - uses.min()) <= 1


def test_rewards_by_hand() -> None:
    compressed, full = torch.tensor([2.0, 1.0]), torch.tensor([1.5, 1.25])
    found = gate_reward(compressed, full, passing=torch.tensor([150, 90]), budget=100, tokens=200)
    assert found.tolist() == [-0.75, 0.25]


def test_bins_agree_with_the_lookup_of_tables_and_edges_go_up() -> None:
    draw = torch.Generator().manual_seed(0)
    entropy, perplexity = 5 + torch.rand(200, generator=draw), 3 + 9 * torch.rand(200, generator=draw)
    edges = bin_edges(entropy, perplexity)
    assert (edges.entropy.shape, edges.perplexity.shape) == ((19,), (3,))
    entropy[:19], perplexity[:3] = edges.entropy, edges.perplexity
    cells = bins(edges, entropy, perplexity)
    tables = neutral(Shapes(layers=1, query_heads=1, kv_heads=1), (64,))
    tables.entropy_edges.copy_(edges.entropy)
    tables.perplexity_edges.copy_(edges.perplexity)
    tables.gate.copy_(torch.arange(80.0).view(1, 1, 20, 4))
    for i in range(200):
        _, gate = tables.lookup(64, entropy=entropy[i].item(), perplexity=perplexity[i].item())
        assert gate.item() == cells[i].item()
    assert [cell // 4 for cell in cells[:19].tolist()] == list(range(1, 20))


def test_quantile_bins_are_equally_filled() -> None:
    signal = torch.arange(400.0)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    cells = bins(bin_edges(signal, signal), signal, signal)
    assert torch.bincount(cells // 4).tolist() == [20] * 20
    assert torch.bincount(cells % 4).tolist() == [100] * 4
    assert len(set(cells.tolist())) == 20


HEAD, GATE = Space((1, 2, 2), 0.8, 1.5, 3, 0.8), Space((1, 2, 1, 1), 0.8, 1.0, 3, 0.8)


def alternated(head: Any, gate: Any, **changes: Any) -> Any:
    return alternate(head, gate, **({"head": HEAD, "gate": GATE, "seed": 0, "settings": FAST} | changes))


def follow(
    space: Space, other: Space, wanted: Callable[[int], int], *, stale: bool = False
) -> Callable[[Tensor], list[Records]]:
    """Roll-outs of every action in every state, best at what `wanted` says of the opposite table's level."""

    def rollouts(opposite: Tensor) -> list[Records]:
        level = int((other.values - opposite.flatten()[0]).abs().argmin())
        actions = torch.arange(space.count)[:, None].expand(-1, space.states)  # [R, F]
        rewards = -(actions - min(wanted(level), space.count - 1)).abs().float()
        name = checksum(opposite + 1 if stale else opposite)
        return [Records.of(actions, rewards, states=torch.arange(space.states), opposite=name)] * 2

    return rollouts


CLIMB, SAME = follow(HEAD, GATE, lambda at: at + 1), follow(GATE, HEAD, lambda at: at)


def test_alternation_stops_when_no_action_changes() -> None:
    found = alternated(CLIMB, SAME)  # heads 1, gate 1; heads 2, gate 2; nothing
    assert found.changed == ((4, 2), (4, 2), (0, 0))
    assert (found.rounds, found.converged) == (3, True)
    assert torch.equal(found.head_table, torch.full((1, 2, 2), 1.5))
    assert torch.equal(found.gate_table, torch.full((1, 2, 1, 1), 1.0))
    independent = alternated(follow(HEAD, GATE, lambda _: 1), follow(GATE, HEAD, lambda _: 2))
    assert independent.changed == ((4, 2), (0, 0))


def test_alternation_that_never_settles_stops_after_max_rounds() -> None:
    found = alternated(follow(HEAD, GATE, lambda at: 2 - at), SAME, max_rounds=3)
    assert (found.changed, found.converged) == (((4, 2),) * 3, False)


def test_checksums_follow_the_bytes() -> None:
    table = torch.arange(6.0).view(2, 3)
    assert checksum(table) == checksum(table.clone()) == checksum(table.t().contiguous().t())
    assert checksum(table) != checksum(table.t())
    assert checksum(table) != checksum(table + 1e-6)


ONE = torch.zeros(3, dtype=torch.int64)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "nan": (lambda: learn(ONE, ONE, torch.tensor([0.0, torch.nan, torch.inf])), "2 of 3 rewards .* number 1; drop"),
    "lengths": (lambda: learn(ONE, ONE[:2], torch.zeros(3)), "the same length"),
    "stale": (
        lambda: alternated(follow(HEAD, GATE, lambda _: 1, stale=True), SAME),
        "record 0 was rolled out against table [0-9a-f]{12}, the current one is",
    ),
    "no roll-outs": (lambda: alternated(lambda _: [], SAME), "no records"),
    "rounds": (lambda: alternated(CLIMB, SAME, max_rounds=0), "max_rounds=0"),
    "none": (lambda: learn(ONE[:0], ONE[:0], torch.zeros(0)), "no records"),
    "state": (lambda: learn(ONE + 2, ONE, torch.zeros(3)), "states go from 2 to 2, the table has 0 to 1"),
    "action": (lambda: learn(ONE, ONE - 1, torch.zeros(3)), "actions go from -1 to -1"),
    "corpus": (lambda: bin_edges(torch.rand(19), torch.rand(19)), "at least 20 calibration prompts"),
    "signal": (lambda: bin_edges(torch.rand(30), torch.rand(30) / 0), "30 of 30 perplexities are not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(PolicyError, match=f"^.*{message}.*$"):
        call()
