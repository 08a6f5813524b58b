"""Stored bytes: what a row's tensors keep allocated, found by walking from its cache to every tensor."""

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.compress import Compressed, compress
from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.layer_cache import Parts
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.models.load import LoadedModel
from methods.base import Budget
from methods.registry import make_policy
from methods.stored import Coding
from tests.engine.test_engine import LABELS

TOKENS, BUDGET, NEW = 300, 64, 64
IDS: list[int] = torch.randint(5, 260, (TOKENS,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model), tiny.wording)


def tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from a thing through fields, attributes and containers; no methods' own.

    Nor what a coding holds: constants of the model, which no prompt adds to.
    """
    if id(thing) in seen or isinstance(thing, Coding):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from tensors(value, seen)
    elif is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield from tensors(getattr(thing, field.name), seen)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith(("harness.engine.", "methods.")):
        yield from tensors(vars(thing), seen)


def reachable(thing: Any) -> int:
    """Bytes of all storages that can be reached from a thing, each once and whole."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(thing, set())}
    return sum(storages.values())


def compressed(model: AttachedModel, label: str) -> Compressed:
    policy = make_policy(label)
    return compress(Engine(model).prefill(IDS, policy.needs), policy, BUDGET if policy.budgeted else TOKENS)


@pytest.mark.parametrize("label", LABELS)
def test_nothing_that_a_row_holds_is_hidden(model: AttachedModel, label: str) -> None:
    left = compressed(model, label)
    assert left.stored_bytes == reachable(left.layers)
    for again in (False, True):
        decoding = Decoding.of(model, [left], again=again, room=NEW)
        assert decoding.stored_bytes(0) == reachable(decoding.caches)
        for token in range(20, 30):
            decoding.step([token])
            assert decoding.stored_bytes(0) == reachable(decoding.caches) >= decoding.nbytes(0)
            assert decoding.stored_bytes(0) == sum(cache.stored[0] for cache in decoding.caches)


@pytest.mark.parametrize("label", LABELS)
def test_a_row_stores_at_most_a_tenth_more_than_it_fills(model: AttachedModel, label: str) -> None:
    policy = make_policy(label)
    cell = Cell(policy, Budget(tokens=BUDGET) if policy.budgeted else None)
    prompt = Prompt(IDS, TOKENS - 20, list(range(30, 150)), Limits(NEW, frozenset(), NEW))
    [outcome] = Engine(model).run(prompt, [cell])
    assert outcome.status == "ok" and len(outcome.token_ids) == NEW
    assert outcome.kv_bytes <= outcome.stored_bytes <= 1.10 * outcome.kv_bytes
    assert outcome.kv_bytes_end <= outcome.stored_bytes_end <= 1.10 * outcome.kv_bytes_end
    full = policy.reads_a_part  # all is held, beside bounds; the budget is of what is read
    assert (full or outcome.stored_bytes <= 1.01 * outcome.asked_bytes) and not outcome.over_budget
    left = compressed(model, label)
    decoding = Decoding.of(model, [left], again=True, room=NEW)
    for token in range(20, 20 + NEW):
        decoding.step([token])
        assert decoding.stored_bytes(0) <= 1.10 * decoding.nbytes(0), token


@pytest.mark.parametrize("label", LABELS)
def test_byte_steps_are_the_sum_of_what_is_stored_at_each_token(model: AttachedModel, label: str) -> None:
    policy = make_policy(label)
    cell = Cell(policy, Budget(tokens=BUDGET) if policy.budgeted else None)
    answer = list(range(30, 70))  # its likelihood is measured first, and the row goes back
    [outcome] = Engine(model).run(Prompt(IDS, TOKENS - 20, answer, Limits(NEW, frozenset())), [cell])
    decoding = Decoding.of(model, [compressed(model, label)], again=True, room=1 + NEW)
    decoding.answer_nll(decoding.feed(IDS[-1:]), answer)
    held = [reachable(decoding.caches)]
    for token in outcome.token_ids[:-1]:
        decoding.step([token])
        held.append(reachable(decoding.caches))
    assert len(held) == NEW and outcome.byte_steps == sum(held)
    assert outcome.stored_bytes_end == held[-1]


def test_byte_steps_of_a_row_end_with_it_whatever_its_company(model: AttachedModel) -> None:
    labels = ["fullkv", "snapkv", "headkv", "h2o@paper", "streamingllm@paper", "tova@paper"]
    cells = [Cell(p, Budget(tokens=BUDGET) if p.budgeted else None) for p in map(make_policy, labels)]
    plain = Engine(model).run(Prompt(IDS, TOKENS - 20, (), Limits(NEW, frozenset())), cells)
    ends = frozenset(outcome.token_ids[5 + 9 * at] for at, outcome in enumerate(plain))  # rows end one after another
    prompt = Prompt(IDS, TOKENS - 20, (), Limits(NEW, ends))
    together = Engine(model).run(prompt, cells)
    assert len({len(outcome.token_ids) for outcome in together}) > 2
    for cell, outcome in zip(cells, together, strict=True):
        [alone] = Engine(model).run(prompt, [cell])
        assert (outcome.byte_steps, outcome.token_ids) == (alone.byte_steps, alone.token_ids)


@pytest.mark.parametrize("room", [None, 64])
def test_room_comes_in_steps_and_a_rewound_row_gives_it_back(model: AttachedModel, room: int | None) -> None:
    decoding = Decoding.of(model, [compressed(model, "snapkv")], room=room)
    before, slot = decoding.stored_bytes(0), 2 * 16 * 4 * 8  # of a token in 4 layers of 2 KV heads
    marks = [cache.mark() for cache in decoding.caches]
    sizes = []
    for token in range(20, 84):
        decoding.step([token])
        sizes.append((decoding.stored_bytes(0) - before) // slot + 4)
    assert sizes[:9] == [4, 4, 4, 4, 8, 8, 8, 8, 12]
    assert sizes[-1] == (64 if room else 68) or (room is None and 64 <= sizes[-1] <= 72)
    for cache, mark in zip(decoding.caches, marks, strict=True):
        cache.rewind(mark)
    assert decoding.stored_bytes(0) == before


def test_a_policys_padding_and_views_are_not_kept(model: AttachedModel) -> None:
    left = compressed(model, "adakv")
    padded = sum(2 * kv.keys.nbytes + kv.positions.nbytes for kv in left.kvs)
    assert left.stored_bytes == left.kv_bytes < padded
    assert left.kv_bytes == BUDGET * 4 * 2 * (2 * 16 * 4 + 4) == left.asked_bytes


def outcomes(model: AttachedModel, *labels: str) -> list[Outcome]:
    cells = [Cell(p, Budget(tokens=BUDGET) if p.budgeted else None) for p in map(make_policy, labels)]
    return Engine(model).run(Prompt(IDS, TOKENS - 20, (), Limits(4, frozenset())), cells)


def test_the_full_cache_needs_no_positions_and_every_kept_slot_one(model: AttachedModel) -> None:
    full, snap = outcomes(model, "fullkv", "snapkv")
    assert full.kv_bytes == full.stored_bytes == full.asked_bytes == full.full_bytes == TOKENS * 8 * 128
    assert snap.kv_bytes == snap.stored_bytes == snap.asked_bytes == BUDGET * 8 * (128 + 4)
    assert snap.full_bytes == full.full_bytes


def test_an_index_is_part_of_a_row_whose_heads_alternate() -> None:
    parts = Parts([[0, 2], [1]], torch.device("cpu"))
    assert reachable(vars(parts)) == 3 * 8
    assert reachable(vars(Parts([[0, 1], [2]], torch.device("cpu")))) == 0
