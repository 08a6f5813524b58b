"""Codes of single slots, whatever the method: bytes by their formula, streams and slots apart and together."""

import copy
import math

import pytest
import torch
from torch import Tensor

from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.row_cache import GrowingRows
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from harness.speed import predicted_memory
from harness.speed.dims import Dims
from harness.speed.one_method import Isolated
from harness.speed.predicted_memory import ProbeShape
from methods.base import KV, Budget, PolicyError
from methods.fp8 import Floats
from methods.q8_0 import Blocks
from methods.registry import make_policy
from methods.slotwise import SlotCoding
from methods.stored import CodedKV, encode
from methods.turboquant import Levels
from methods.views import POSITION_BYTES, Form
from tests.hostile import tried
from tests.methods.test_quant import drawn, held, holes

DIM = 64
CODINGS: dict[SlotCoding, tuple[int, int]] = {
    Floats("e4m3", True): (128, 8),
    Floats("e4m3", False): (128, 0),
    Floats("e5m2", False): (128, 0),
    Blocks("q8_0", "q8_0", True): (136, 0),
    Blocks("q8_0", "q4_0", False): (104, 0),
    Blocks("q4_0", "q4_0", True): (72, 0),
    Levels(2, 2): (36, 0),
    Levels(3, 3): (52, 0),
    Levels(4, 4, corrected=True): (68, 0),
    Levels(3, 4, signs=True): (62, 0),
}
"""Bytes of a slot's codes and of a head's, by hand for keys and values of 64 numbers."""
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=str)


def vectors(streams: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(streams, slots, DIM, generator=draw) for _ in range(2))
    return keys, values, torch.arange(slots).expand(streams, -1)


def read(codes: object, slots: int, streams: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(streams, slots, DIM), torch.empty(streams, slots, DIM)
    codes.decode(*out, torch.arange(slots).expand(streams, -1))  # type: ignore[attr-defined]
    return out


@every_coding
def test_bytes_are_those_of_the_formula(coding: SlotCoding) -> None:
    slot, head = CODINGS[coding]
    codes = coding.encode(*vectors(3, 11))
    assert codes.nbytes == 3 * (11 * slot + head) == sum(x.nbytes for x in codes.tensors())
    assert coding.nbytes(11, DIM, DIM) == 11 * (slot + POSITION_BYTES) + head and coding.nbytes(0, DIM, DIM) == 0
    kv = drawn(30, torch.bfloat16, dim=DIM)
    whole = encode(kv, coding)
    heads = kv.positions.shape[1]
    assert whole.nbytes == heads * (coding.nbytes(29, DIM, DIM) + 2 * DIM * 2 + POSITION_BYTES)


@every_coding
def test_slots_one_by_one_are_slots_at_once(coding: SlotCoding) -> None:
    """And streams alone are streams together, in any order, to the bit."""
    keys, values, positions = vectors(4, 9)
    whole = coding.encode(keys, values, positions)
    grown = coding.encode(keys[:, :6], values[:, :6], positions[:, :6])
    for at in range(6, 9):
        own = slice(at, at + 1)
        grown = grown.then(grown.later(keys[:, own], values[:, own], positions[:, own]))  # type: ignore[arg-type, assignment]
    if not isinstance(coding, Floats) or not coding.scale:
        assert all(map(torch.equal, grown.tensors(), whole.tensors()))
    alone = [coding.encode(keys[at : at + 1], values[at : at + 1], positions[at : at + 1]) for at in (2, 0, 3)]
    joined, taken = type(whole).cat(alone), whole.take(torch.tensor([2, 0, 3]))
    assert all(map(torch.equal, joined.tensors(), taken.tensors()))
    for own, wanted in zip(read(joined, 9, 3), read(whole, 9, 4), strict=True):
        assert torch.equal(own, wanted[[2, 0, 3]])


@every_coding
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e30])
def test_numbers_that_have_no_codes_are_one_line(coding: SlotCoding, number: float) -> None:
    for part in ("keys", "values"):
        kv = drawn(20, dim=DIM)
        getattr(kv, part)[0, 1, 5, 3] = number
        if number == 1e30 and isinstance(coding, Floats):
            encode(kv, coding)  # cut off, or scaled
        else:
            tried("codes of slots", lambda kv=kv: encode(kv, coding))  # type: ignore[misc]


@every_coding
def test_a_step_reads_what_the_codes_stand_for_and_codes_the_tokens_that_came(coding: SlotCoding) -> None:
    """Rows of other sizes and plain ones beside them, against rows that were decoded before each step."""
    kept = [drawn(50, seed=i, dim=DIM).take(holes(own, 50, i)) for i, own in enumerate([(40, 40), (40, 12), (1, 33)])]
    rows: list[KV] = [*(encode(kv, coding) for kv in kept), kept[1]]
    together, alone = GrowingRows(rows, position=50, room=6), [GrowingRows([kv], position=50, room=6) for kv in rows]
    for at in range(6):
        draw = torch.Generator().manual_seed(at)
        feed = [torch.randn(4, heads, 1, DIM, generator=draw) for heads in (4, 2, 2)]
        together.append(*feed[1:])
        out, own = together.attend(feed[0], Form(0.3)), []
        for row, cache in enumerate(alone):
            cache.append(*(x[row : row + 1] for x in feed[1:]))
            own.append(cache.attend(feed[0][row : row + 1], Form(0.3)))
            assert (cache.nbytes(0), cache.stored[0]) == (together.nbytes(row), together.stored[row])
        torch.testing.assert_close(torch.cat(own), out, atol=1e-5, rtol=1e-5)
    sizes = [[40, 40], [40, 12], [1, 33]]
    for row, counts in enumerate(sizes):
        heads = [coding.nbytes(count + 5, DIM, DIM) - 6 * POSITION_BYTES for count in counts]  # of slots that came
        assert together.nbytes(row) == sum(heads) + 2 * (2 * DIM * 4 + POSITION_BYTES)
    assert all(group.coding is None or group.plain + 6 == 1 for group in together.groups)


@pytest.mark.parametrize("label", ["turboquant@bits3", "turboquant@prod4", "fp8", "fp8@unscaled", "fp8@e5m2"])
def test_a_model_answers_in_company_as_alone(tiny: LoadedModel, label: str) -> None:
    model = AttachedModel(copy.deepcopy(tiny.model))
    ids = torch.randint(5, 260, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = Prompt(ids, 90, (70, 80, 90), Limits(8, frozenset()))
    labels = ["snapkv", label, "fullkv", "turboquant@snapkv-bits3"]
    cells = [Cell(make_policy(own), Budget.parse("40") if make_policy(own).budgeted else None) for own in labels]
    together = Engine(model).run(prompt, cells)
    assert [(own.status, own.over_budget) for own in together] == [("ok", False)] * 4
    for cell, own in zip(cells, together, strict=True):
        alone = Engine(model).run(prompt, [cell])[0]
        assert alone.token_ids == own.token_ids
        assert alone.nll_per_token == pytest.approx(own.nll_per_token, abs=1e-4)
        assert (alone.kv_bytes, alone.kv_bytes_end, alone.stored_bytes_end) == (
            own.kv_bytes,
            own.kv_bytes_end,
            own.stored_bytes_end,
        )


@pytest.mark.parametrize("label", ["turboquant@snapkv-bits3", "fp8@snapkv", "q8_0@snapkv-q4_0"])
@pytest.mark.parametrize("budget", [1, 2, 7, 40, 93])
def test_a_budget_buys_more_slots_of_the_same_bytes(label: str, budget: int) -> None:
    policy = make_policy(label)
    kv = drawn(500, torch.bfloat16, dim=DIM)
    plain, heads = kv.slot_bytes, kv.positions.shape[1]
    slots = policy.slots(budget, kv)  # type: ignore[attr-defined]
    assert slots >= budget
    coded = encode(kv.take(torch.arange(slots).expand(1, heads, -1)), policy.coding)  # type: ignore[attr-defined]
    assert isinstance(coded, CodedKV) and coded.nbytes <= heads * budget * plain
    own = policy.coding.nbytes(2, DIM, DIM) - policy.coding.nbytes(1, DIM, DIM)  # type: ignore[attr-defined]
    assert budget == 1 or coded.nbytes > heads * (budget * plain - own)


def test_codes_that_are_no_smaller_are_refused() -> None:
    eight = KV(*(torch.ones(1, 1, 9, 64, dtype=torch.float8_e4m3fn) for _ in range(2)), torch.arange(9).expand(1, 1, 9))
    with pytest.raises(PolicyError, match="q8_0: codes of 140 bytes a slot are no smaller than 132"):
        make_policy("q8_0").slots(4, eight)  # type: ignore[attr-defined]


@pytest.mark.parametrize("label", ["turboquant@bits3", "turboquant@prod4", "fp8", "fp8@unscaled"])
def test_bytes_are_those_that_are_predicted(tiny: LoadedModel, label: str) -> None:
    model, policy = AttachedModel(copy.deepcopy(tiny.model)), make_policy(label)
    ids = torch.randint(5, 260, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    found = Isolated(model, policy, None).prefill(ids)
    dims = Dims.of(model.config, 4)
    shape = ProbeShape(policy.needs, True, False, 200, 200, 1, 4, None, policy.coding)  # type: ignore[attr-defined]
    assert found.layer_bytes == [predicted_memory.kept_layer(dims, shape)] * model.layers
    decoding = Decoding.of(model, [found], room=3)
    for token in (7, 8, 9):
        decoding.step([token])
    assert held(decoding) == predicted_memory.rows(dims, shape)
