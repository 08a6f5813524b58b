"""Bytes that attention reads for a decoded token, and side buffers of methods, which are held and not read."""

import copy

import pytest
import torch
from torch import Tensor

from harness.engine.compress import Compressed
from harness.engine.engine import Engine
from harness.engine.packed import survey
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Outcome, Prompt
from harness.models.load import LoadedModel
from methods.base import KV, Budget
from methods.registry import make_policy
from methods.stored import CodedKV
from methods.views import POSITION_BYTES
from tests.engine.test_engine import LABELS
from tests.engine.test_stored_bytes import BUDGET, IDS, TOKENS, compressed

PLAIN, HEADS, LAYERS = 2 * 16 * 4, 2, 4  # bytes of a key and a value


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model), tiny.wording)


def outcome(model: AttachedModel, label: str, *, new: int = 8, budget: int = BUDGET) -> Outcome:
    policy = make_policy(label)
    cell = Cell(policy, Budget(tokens=budget) if policy.budgeted else None)
    [found] = Engine(model).run(Prompt(IDS, TOKENS - 20, list(range(30, 40)), Limits(new, frozenset())), [cell])
    assert found.status == "ok", found.error
    return found


def sides(left: Compressed) -> list[Tensor]:
    """Side data of every layer, without what lies in dead slots."""
    return [x for kv in left.kvs for name, x in sorted(kv.extra.items())]


@pytest.mark.parametrize("label", LABELS)
def test_side_buffers_are_counted_where_they_live_and_are_not_read(model: AttachedModel, label: str) -> None:
    left = compressed(model, label)
    for kv, held, nbytes in zip(left.kvs, left.known, left.layer_bytes, strict=True):
        slots, live = kv.positions.numel(), sum(held.sizes)
        side = sum(
            x.nbytes * live // slots if x.shape[:3] == kv.positions.shape else x.nbytes for x in kv.extra.values()
        )
        positions = 0 if held.implied else live * POSITION_BYTES
        if type(kv) is KV:
            assert (held.read, nbytes) == (live * PLAIN, live * PLAIN + positions + side)
        elif isinstance(kv, CodedKV):
            assert held.read == nbytes - positions < live * PLAIN
        else:
            assert 0 < held.read <= nbytes - positions and nbytes > side
    assert left.read_bytes == sum(own.read for own in left.known) + left.state_bytes <= left.kv_bytes
    assert left.stored_bytes >= left.read_bytes + sum(x.nbytes for x in sides(left)) * (not left.policy.reads_a_part)


def test_some_methods_here_have_side_buffers(model: AttachedModel) -> None:
    """Or the test above would say nothing of them."""
    held = {label for label in LABELS if sides(compressed(model, label))}
    assert {"h2o@paper", "compilerkv@streaming", "quest"} & set(LABELS) <= held and len(held) > 2


@pytest.mark.parametrize("label", ["fullkv", "snapkv", "adakv", "quant", "quant@snapkv-int4", "h2o@paper"])
def test_an_outcome_has_what_is_read_right_after_compression(model: AttachedModel, label: str) -> None:
    found = outcome(model, label)
    assert found.read_bytes == compressed(model, label).read_bytes <= found.kv_bytes
    if label == "fullkv":
        assert found.read_bytes == found.full_bytes == TOKENS * LAYERS * HEADS * PLAIN
    if label == "snapkv":
        assert found.read_bytes == BUDGET * LAYERS * HEADS * PLAIN


@pytest.mark.parametrize("label", ["quest", "quest@shared"])
def test_quest_holds_all_reads_a_part_and_is_not_over_its_budget(model: AttachedModel, label: str) -> None:
    found = outcome(model, label)
    bounds = 2 * -(-TOKENS // 16) * 16 * 4 * HEADS  # of a layer
    layers = {"whole": TOKENS * HEADS * PLAIN, "paged": BUDGET * HEADS * PLAIN + bounds}
    least = 2 * layers["whole"] + 2 * layers["paged"]
    assert found.kept_slots == (TOKENS * HEADS,) * LAYERS and found.stored_bytes > 1.01 * found.asked_bytes
    assert found.asked_bytes == found.full_bytes and not found.over_budget
    assert found.read_bytes is not None and found.kv_bytes > found.read_bytes
    if label == "quest@shared":  # the last page is not full
        assert least - 2 * HEADS * 16 * PLAIN < found.read_bytes <= least
    else:
        assert found.read_bytes > least


def test_what_quest_reads_depends_on_no_company(model: AttachedModel) -> None:
    labels = ("quest", "snapkv", "quest@shared", "h2o@paper")
    cells = [Cell(make_policy(label), Budget(tokens=n)) for n in (48, 80) for label in labels]
    prompt = Prompt(IDS, TOKENS - 20, list(range(30, 40)), Limits(12, frozenset()))
    for cell, together in zip(cells, Engine(model).run(prompt, cells), strict=True):
        [alone] = Engine(model).run(prompt, [cell])
        assert (alone.read_bytes, alone.token_ids) == (together.read_bytes, together.token_ids)


def test_a_budget_of_all_pages_gives_the_full_caches_tokens(model: AttachedModel) -> None:
    whole, full = outcome(model, "quest", budget=TOKENS - 1, new=4), outcome(model, "fullkv", new=4)
    assert whole.token_ids == full.token_ids
    assert whole.read_bytes is not None and whole.read_bytes <= whole.kv_bytes


class Denser(KV):
    """Of a method that stores less than it shows."""

    @property
    def nbytes(self) -> int:
        return 10


def test_no_more_is_read_than_is_there() -> None:
    x = torch.zeros(1, HEADS, 5, 16)
    kv = Denser(x, x, torch.arange(5).expand(1, HEADS, 5))
    [held] = survey([kv], 9, [False])
    assert (held.nbytes, held.read) == (10, 10)
