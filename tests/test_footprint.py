"""Predicted memory: its cache parts are the measured live bytes, and more work never takes less."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from harness import footprint
from harness.attach import AttachedModel
from harness.cache import RowsLayer
from harness.footprint import Dims, Work
from harness.isolated import Isolated
from harness.models import LoadedModel
from methods.base import Needs
from methods.registry import load_methods, make_policy

TOKENS, BUDGET, NEW = 90, 20, 6


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model))


def ids() -> list[int]:
    found: list[int] = torch.randint(5, 260, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    return found


def work(label: str, **changed: object) -> Work:
    policy = make_policy(label)
    slots = BUDGET if policy.budgeted else TOKENS
    plain = Work(policy.needs, True, not policy.budgeted, TOKENS, slots, batch=1, new_tokens=NEW, chunk=None)
    return replace(plain, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", ["fullkv", "snapkv", "h2o", "random"])
def test_the_kept_part_is_what_lives(model: AttachedModel, label: str) -> None:
    policy = make_policy(label)
    kvs = Isolated(model, policy, BUDGET if policy.budgeted else None).prefill(ids()).kvs
    dims = Dims.of(model.config, 4)
    positions = 0 if not policy.budgeted else sum(kv.positions.nbytes for kv in kvs)
    assert footprint.kept(dims, work(label)) == sum(kv.nbytes for kv in kvs) + positions


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("label", ["fullkv", "snapkv"])
def test_the_rows_part_is_what_a_batch_allocates(model: AttachedModel, label: str, batch: int) -> None:
    policy = make_policy(label)
    runner = Isolated(model, policy, BUDGET if policy.budgeted else None)
    prompts = [runner.prefill(ids()) for _ in range(batch)]
    session = runner._session(prompts, NEW - 1)
    held = sum(
        tensor.nbytes
        for cache in session.caches
        if isinstance(cache, RowsLayer)
        for group in cache.groups
        for tensor in (group.keys, group.values, group.positions)
    )
    assert footprint.rows(Dims.of(model.config, 4), work(label, batch=batch)) == held


def test_what_is_observed_is_what_a_layer_holds(model: AttachedModel) -> None:
    from harness.cache import PrefillLayer

    layer = PrefillLayer(Needs(window=8, column_sums=True), TOKENS)
    layers = [layer, *(PrefillLayer(Needs(), TOKENS) for _ in range(model.layers - 1))]
    model.forward(torch.tensor([ids()]), layers, position=0, keep=1)
    assert layer.sums is not None
    both = work("snapkv", needs=Needs(window=8, column_sums=True))
    assert footprint.observed(Dims.of(model.config, 4), both) == layer.queries.nbytes + layer.sums.nbytes
    assert footprint.full_layer(Dims.of(model.config, 4), both) == layer.keys.nbytes + layer.values.nbytes


@pytest.mark.parametrize("label", [name for name in load_methods() if name != "compilerkv"])
@pytest.mark.parametrize("chunk", [None, 32])
def test_more_work_never_takes_less(model: AttachedModel, label: str, chunk: int | None) -> None:
    policy = make_policy(label)

    def bytes_of(tokens: int = 200, budget: int = BUDGET, batch: int = 2, new_tokens: int = 8, number: int = 4) -> int:
        own = budget if policy.budgeted else None
        shape = {"tokens": tokens, "batch": batch, "new_tokens": new_tokens, "chunk": chunk}
        return footprint.predict(model.config, number, policy, budget=own, **shape)

    least = bytes_of()
    assert bytes_of(tokens=400) > least
    assert bytes_of(budget=40) >= least
    assert bytes_of(batch=3) > least
    assert bytes_of(batch=64, new_tokens=800) > bytes_of(batch=64)
    assert bytes_of(number=2) < least


def test_what_saves_memory(model: AttachedModel) -> None:
    shape = {"tokens": 4000, "batch": 4}
    full = footprint.predict(model.config, 4, make_policy("fullkv"), budget=None, **shape)
    small = footprint.predict(model.config, 4, make_policy("snapkv"), budget=64, **shape)
    chunked = footprint.predict(model.config, 4, make_policy("snapkv"), budget=64, chunk=128, **shape)
    assert small < full / 2
    dims = Dims.of(model.config, 4)
    assert chunked >= 4 * 4000 * dims.slot  # in chunks, every layer is whole until the last chunk
    assert footprint.activations(dims, work("snapkv", tokens=4000, chunk=128)) < footprint.activations(
        dims, work("snapkv", tokens=4000)
    )


def test_shapes_by_hand() -> None:
    """Two layers, one of them sliding over 10 tokens: 2 KV heads of 8 numbers of 2 bytes."""
    dims = Dims((None, 10), heads=4, kv_heads=2, head_dim=8, hidden=32, intermediate=64, vocab=100, number=2)
    own = work("snapkv", tokens=50, slots=20, new_tokens=6)
    assert dims.slot == 2 * 2 * 8 * 2 == 64
    assert footprint.kept_layer(dims, own) == 20 * (64 + 16)
    assert footprint.kept(dims, own) == 20 * (64 + 16) + 50 * 64
    assert footprint.rows(dims, own) == (20 + 10 + 2 * 5) * (64 + 16)
    assert footprint.logits(dims, own) == 100 * (2 + 4)
