"""Rows that evict while decoding: each sees its budget, whatever the company that it is held and evicted with."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from harness.engine import gpu
from harness.engine.evicting_cache import EvictingRow, EvictingRows, with_room
from harness.engine.packed import each_tensor, without
from harness.engine.transformers_seam import AttachedModel
from harness.models.load import LoadedModel
from harness.speed.one_method import Isolated
from methods.base import KV, KVPolicy, LayerPolicy, LayerView, PolicyError, StepView
from methods.fullkv import FullKV
from methods.registry import make_policy
from methods.streamingllm import ReassignedKV
from tests.engine.test_row_cache import HEADS, SLOT, TOKENS, ask, kept, new, plain, tokens_of

PROMPT, BUDGET = 40, 12
POLICIES = ["h2o@paper", "streamingllm@paper", "compilerkv@streaming"]


@dataclass(frozen=True)
class Oldest(LayerPolicy):
    """Frees the oldest slot of every head once there are more than the budget."""

    lazy: bool = False

    @property
    def evicts_while_decoding(self) -> bool:
        return True

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        return view.kv.take(view.kv.positions[..., -budget:])

    def after_step(self, step: StepView) -> Tensor:
        old = step.kv.positions.masked_fill(step.kv.positions < 0, 10**9).argmin(dim=-1)
        return old.masked_fill((step.kv.live <= step.budget) | torch.tensor(self.lazy), -1)


@dataclass(frozen=True)
class OldestOfEach(Oldest):
    """Heads of unlike numbers of slots, which are side data, beside the age of every slot."""

    def after_step(self, step: StepView) -> Tensor:
        kv = step.kv
        kv.extra["age"].masked_fill_(kv.positions == step.position, 0.0)
        kv.extra["age"] += 1
        oldest = kv.extra["age"].masked_fill(kv.positions < 0, -1.0).argmax(dim=-1)
        return oldest.masked_fill((kv.live <= kv.extra["slots"]) | torch.tensor(self.lazy), -1)


def evicting(policy: KVPolicy, feed: Sequence[Tensor], *, room: int = 1) -> EvictingRows:
    keys, values = (x[:, :, :TOKENS] for x in feed[1:])
    rows = [EvictingRow(policy, 3, with_room(kept(keys, values, [[7, 8, 9]] * HEADS), room)) for _ in range(2)]
    return EvictingRows(rows, TOKENS)


def test_an_evicting_row_sees_its_budget_and_the_new_token() -> None:
    queries, keys, values = feed = tokens_of(TOKENS + 5)
    cache = evicting(Oldest(), feed)
    assert cache.nbytes(0) == 3 * HEADS * (SLOT + 4)
    for at in range(TOKENS, TOKENS + 5):
        out = ask(cache, *new(feed, at, 2))
        gold = plain(queries[:, :, at : at + 1], keys, values, [[at - 3, at - 2, at - 1, at]] * HEADS)
        torch.testing.assert_close(out, gold.expand(2, -1, -1, -1))
        assert cache.nbytes(1) == 3 * HEADS * (SLOT + 4)
    assert cache.position == TOKENS + 5


@pytest.mark.parametrize("again", [False, True])
def test_heads_of_unlike_sizes_store_what_they_fill(again: bool) -> None:
    queries, keys, values = feed = tokens_of(TOKENS + 5)

    def cache(policy: KVPolicy) -> EvictingRows:
        kv = kept(keys[:, :, :TOKENS], values[:, :, :TOKENS], [[5, 6, 7, 8, 9], [8, 9, -1, -1, -1]])
        kv.extra["age"] = (TOKENS - kv.positions).float()
        kv.extra["slots"] = kv.live.to(torch.int32)
        roomy = with_room(kv, 1)
        return EvictingRows([EvictingRow(policy, 3, without(roomy, TOKENS - 1) if again else roomy)], TOKENS - again)

    def check(row: EvictingRows, at: int) -> None:
        out = ask(row, *new(feed, at, 1))
        given_up = int(at == TOKENS - 1)  # the token comes again, and nothing has to go
        seen = [list(range(at - 5 + given_up, at + 1)), list(range(at - 2 + given_up, at + 1))]
        torch.testing.assert_close(out, plain(queries[:, :, at : at + 1], keys, values, seen))
        assert row.nbytes(0) == row.stored_bytes(0) == 7 * (SLOT + 4 + 4) + HEADS * 4

    row = cache(OldestOfEach())
    for at in range(TOKENS - again, TOKENS + 1):
        check(row, at)
    mark = row.mark()
    for at in (*range(TOKENS + 1, TOKENS + 5), TOKENS + 1, TOKENS + 2):
        if at == TOKENS + 1:
            row.rewind(mark)
        check(row, at)
    lazy = cache(OldestOfEach(lazy=True))
    for at in range(TOKENS - again, TOKENS + 1):
        ask(lazy, *new(feed, at, 1))
    with pytest.raises(PolicyError, match="OldestOfEach left no slot for the next token"):
        lazy.append(*new(feed, TOKENS + 1, 1)[1:])


def test_an_evicting_row_comes_back_to_its_snapshot() -> None:
    feed = tokens_of(TOKENS + 3)
    cache = evicting(Oldest(), feed)
    feeds = [new(feed, at, 2) for at in (10, 11, 12)]
    state = cache.mark()
    first = [ask(cache, *own) for own in feeds]
    cache.rewind(state)
    assert all(torch.equal(a, ask(cache, *own)) for a, own in zip(first[:2], feeds, strict=False))
    cache.keep([1])
    assert torch.equal(ask(cache, *(x[1:] for x in feeds[2])), first[2][1:])
    assert cache.nbytes(0) == 3 * HEADS * (SLOT + 4)
    with pytest.raises(IndexError, match="row 1 of 1"):
        cache.nbytes(1)


def test_a_sliding_layer_of_an_evicting_row_follows_its_window() -> None:
    queries, keys, values = feed = tokens_of(TOKENS + 4)
    cache = evicting(FullKV(), feed, room=4)
    for at in range(TOKENS, TOKENS + 4):
        out = ask(cache, *new(feed, at, 2), window=3)
        gold = plain(queries[:, :, at : at + 1], keys, values, [[at - 2, at - 1, at]] * HEADS)
        torch.testing.assert_close(out[:1], gold)
        assert cache.nbytes(0) == 2 * HEADS * (SLOT + 4)  # what the next token's window still reaches


def compressed(tiny: LoadedModel, names: Sequence[str]) -> list[EvictingRow]:
    """Rows of the first layer, each of a prompt of its own."""
    model, rows = AttachedModel(copy.deepcopy(tiny.model)), []
    for name in names:
        policy = make_policy(name)
        kv = Isolated(model, policy, BUDGET).prefill(torch.randint(5, 250, (PROMPT,)).tolist()).kvs[0]
        rows.append(EvictingRow(policy, BUDGET, with_room(kv, 1)))
    return rows


def layer(rows: Sequence[EvictingRow]) -> EvictingRows:
    return EvictingRows(
        [EvictingRow(row.policy, row.budget, each_tensor(Tensor.clone, row.kv)) for row in rows], PROMPT
    )


def step(rows: Sequence[EvictingRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one token, another for every row."""
    _, heads, _, dim = rows[0].kv.keys.shape
    return (torch.randn(len(rows), 2 * heads, 1, dim), *torch.randn(2, len(rows), heads, 1, dim))


def check_company(rows: Sequence[EvictingRow], batches: int) -> None:
    """`rows` compute together, bit for bit, what they compute alone; so do those left when one is dropped."""
    together, alone = layer(rows), [layer([row]) for row in rows]
    assert len(together.batches) == batches
    left = list(range(len(rows)))
    for at in range(30):
        feed = step(rows)
        if at == 15:
            left = left[1:]
            together.keep(left)
        out = ask(together, *(x[left] for x in feed))
        for i, row in enumerate(left):
            own = ask(alone[row], *(x[row : row + 1] for x in feed))
            assert torch.equal(out[i : i + 1], own), (at, row)
            assert together.nbytes(i) == alone[row].nbytes(0)


@pytest.mark.parametrize("name", POLICIES)
def test_rows_of_one_policy_are_one_batch_and_compute_what_each_computes_alone(tiny: LoadedModel, name: str) -> None:
    check_company(compressed(tiny, [name] * 5), 1)


def test_rows_of_several_policies_come_back_in_their_order(tiny: LoadedModel) -> None:
    check_company(compressed(tiny, [*POLICIES, *POLICIES[::-1], POLICIES[1]]), 3)


def test_rows_whose_kvs_are_in_different_states_are_apart(tiny: LoadedModel) -> None:
    rows = compressed(tiny, ["streamingllm@paper"] * 4)
    other, fewer = rows[1].kv, rows[2].kv
    assert isinstance(other, ReassignedKV)
    rows[1].kv = replace(other, shift=other.shift + 3)
    rows[2].kv = replace(fewer, positions=fewer.positions.masked_fill(fewer.positions == PROMPT - 1, -1))
    check_company(rows, 3)


def test_side_data_of_no_head_stays_with_its_row(tiny: LoadedModel) -> None:
    rows = compressed(tiny, ["h2o@paper"] * 3)
    rows[1].kv.extra["scales"] = torch.ones(5)
    check_company(rows, 2)
    assert layer(rows).nbytes(1) == layer(rows).nbytes(0) + 5 * 4


@pytest.mark.parametrize("name", [*POLICIES, "tova@paper"])
def test_on_a_gpu_a_step_asks_the_host_nothing(tiny: LoadedModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compressed(tiny, [name] * 2)
    feeds = [step(rows) for _ in range(6)]
    cpu, card = layer(rows), layer(rows)
    wanted = [ask(cpu, *feed) for feed in feeds]

    def asked(*_: object) -> None:
        raise AssertionError("a step asked the device")

    monkeypatch.setattr(gpu, "is_gpu", lambda device: True)
    with monkeypatch.context() as within:
        for method in ("item", "tolist", "__bool__", "__int__"):
            within.setattr(Tensor, method, asked)
        found = [ask(card, *feed) for feed in feeds]
    card.check()
    torch.testing.assert_close(found, wanted)


def test_on_a_gpu_faults_are_told_after_the_steps(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, rows = tokens_of(TOKENS + 2), compressed(tiny, ["h2o@paper"])
    cache = evicting(Oldest(lazy=True), feed)
    monkeypatch.setattr(gpu, "is_gpu", lambda device: True)
    for at in (10, 11):
        ask(cache, *new(feed, at, 2))
    with pytest.raises(PolicyError, match="Oldest left no slot"):
        cache.check()
    spoilt = layer(rows)
    queries, keys, values = step(rows)
    ask(spoilt, queries * torch.nan, keys, values)
    with pytest.raises(PolicyError, match=f"attention weights of the token at {PROMPT} are NaN"):
        spoilt.check()
    spoilt.check()  # told once


@dataclass(frozen=True)
class Single(Oldest):
    """A policy that answers for its first row alone."""

    def after_step(self, step: StepView) -> Tensor:
        return super().after_step(step)[:1]


def test_a_policy_that_frees_nothing_or_forgets_a_row_is_told_so() -> None:
    feed = tokens_of(TOKENS + 2)
    cache = evicting(Oldest(lazy=True), feed)
    ask(cache, *new(feed, 10, 2))
    with pytest.raises(PolicyError, match="Oldest left no slot"):
        ask(cache, *new(feed, 11, 2))
    with pytest.raises(PolicyError, match=r"Single.after_step returned shape \[1, 2\]; .* \[2, 2\]"):
        ask(evicting(Single(), feed), *new(feed, 10, 2))
