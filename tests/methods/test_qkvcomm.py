"""Q-KVComm's codes against its formulas by hand, its bits against a table, and its bytes."""

import copy
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from methods.artefact import COMPILED, load_constants
from methods.base import KV, Budget, Needs, PolicyError
from methods.qkvcomm import PerTensor, QKVComm, bits_of
from methods.registry import make_policy
from methods.stored import encode

HEADS, DIM = 3, 8


def drawn(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> KV:
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, HEADS, tokens, DIM, generator=draw).to(dtype) for _ in range(2))
    return KV(keys * 3 + 1, values, torch.arange(tokens).expand(1, HEADS, tokens))


def by_hand(x: Tensor, bits: int) -> tuple[list[int], float, float, list[float]]:
    """Codes, scale, zero and what the codes stand for: quantization.py:45-54 and 75."""
    numbers = x.flatten().tolist()
    scale = (max(numbers) - min(numbers)) / (2**bits - 1)
    zero = -min(numbers) / scale
    codes = [min(max(round(own / scale + zero), 0), 2**bits - 1) for own in numbers]
    return codes, scale, zero, [(code - zero) * scale for code in codes]


def unpacked(held: Tensor, bits: int) -> list[int]:
    """Codes of [..., D * bits / 8] bytes: 6 bits are planes of 4 and 2, in each of which channels lie in parts."""
    found = []
    for row in held.reshape(-1, held.shape[-1]).tolist():
        planes = {8: [(8, 0)], 4: [(4, 0)], 6: [(4, 0), (2, 4)]}[bits]
        codes, first = [0] * DIM, 0
        for width, low in planes:
            count = DIM * width // 8
            for i in range(DIM):
                code = row[first + i % count] >> i // count * width & (1 << width) - 1
                codes[i] |= code << low
            first += count
        found += codes
    return found


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_codes_are_those_of_the_formulas(bits: int) -> None:
    kv = drawn(7)
    made = PerTensor(bits, HEADS).encode(kv.keys[0], kv.values[0], kv.positions[0])
    out = [torch.empty_like(x[0]) for x in (kv.keys, kv.values)]
    made.decode(*out, kv.positions[0])
    for i, (x, held, read) in enumerate(zip((kv.keys, kv.values), made.held, out, strict=True)):
        codes, scale, zero, stand_for = by_hand(x, bits)
        assert held.shape == (HEADS, 7, DIM * bits // 8) and held.dtype == torch.uint8
        found = unpacked(held, bits)
        assert sum(a != b for a, b in zip(found, codes, strict=True)) <= 1  # a number half way between two
        assert {0, 2**bits - 1} <= {*found}
        torch.testing.assert_close(made.fixed[0][:, 2 * i : 2 * i + 2], torch.tensor([[scale, zero]] * HEADS))
        torch.testing.assert_close(read.flatten(), torch.tensor(stand_for), atol=scale / 1e3, rtol=0)
        assert float((read - x[0]).abs().max()) <= scale / 2 * 1.001


def test_six_bits_have_four_codes_in_three_bytes() -> None:
    codes = torch.arange(64).repeat(2).view(1, 16, DIM).float()  # scale 1, zero 0
    made = PerTensor(6).encode(codes, codes.flip(2), torch.zeros(1, 16))
    assert [x.nbytes for x in made.held] == [16 * DIM * 3 // 4] * 2
    assert unpacked(made.held[0], 6) == [int(x) for x in codes.flatten()]


def test_bits_are_by_the_rank_of_ten_sensitivities() -> None:
    """Layers 7, 2, 9 suffer most, 4, 0, 5 least: quantization.py:155-177."""
    table = {0: 0.02, 1: 0.5, 2: 8.0, 3: 0.3, 4: 0.01, 5: 0.1, 6: 0.7, 7: 9.0, 8: 0.6, 9: 3.0}
    assert bits_of(table) == {0: 4, 1: 6, 2: 8, 3: 6, 4: 4, 5: 4, 6: 6, 7: 8, 8: 6, 9: 8}
    assert sum(bits_of(table).values()) == 60
    assert [*bits_of({i: float(i) for i in range(6)}).values()] == [4, 6, 6, 6, 6, 8]  # a share is rounded down
    assert [*bits_of({3: 1.0, 8: 2.0}).values()] == [6, 6]
    assert [*bits_of(table, 0.5).values()].count(8) == 5


@pytest.mark.parametrize(("bits", "dtype"), [*product((8, 6, 4), (torch.float32, torch.bfloat16))])
def test_packed_bytes_are_measured_bytes(bits: int, dtype: torch.dtype) -> None:
    kv = drawn(40, dtype)
    left = encode(kv, PerTensor(bits, HEADS))
    assert left.counts == (39,) * HEADS
    codes, scales, plain = 39 * 2 * DIM * bits // 8, 4 * 4, 2 * DIM * dtype.itemsize
    assert left.nbytes == HEADS * (codes + scales + plain + 40 * 4)
    held = sum(x.nbytes for _, own in left.parts for x in own.tensors())
    assert held + left.keys.nbytes + left.values.nbytes + left.positions.nbytes == left.nbytes


def test_what_comes_later_has_the_prompts_scale_and_is_cut_off() -> None:
    kv, more = drawn(20), drawn(3, seed=1)
    made = PerTensor(6, HEADS).encode(kv.keys[0], kv.values[0], kv.positions[0])
    later = made.later(more.keys[0] * 100, more.values[0], more.positions[0])
    both = made.then(later)
    assert both is not None and both.slots == 23 and torch.equal(both.fixed[0], made.fixed[0])
    keys, values = (torch.empty(HEADS, 23, DIM) for _ in range(2))
    both.decode(keys, values, torch.zeros(HEADS, 23))
    assert float(keys.max()) <= float(kv.keys.max()) * 1.001 and float(keys.min()) >= float(kv.keys.min()) * 1.001
    inside = (more.values > kv.values.min()) & (more.values < kv.values.max())
    reach = float(kv.values.max() - kv.values.min()) / 63
    assert float((values[:, 20:] - more.values[0])[inside[0]].abs().max()) <= reach / 2 * 1.001


def test_numbers_that_are_all_equal_keep_their_value() -> None:
    level = KV(torch.full((1, 1, 9, 4), 2.5), torch.full((1, 1, 9, 4), -7.0), torch.arange(9).expand(1, 1, 9))
    assert all(map(torch.equal, encode(level, PerTensor(4)).load(), (level.keys, level.values)))


def test_numbers_without_codes_are_refused() -> None:
    kv = drawn(9)
    kv.keys[0, 1, 3, 2] = float("nan")
    with pytest.raises(PolicyError, match="NaN, infinite"):
        encode(kv, PerTensor(4, HEADS))


@pytest.fixture
def model(tiny: LoadedModel) -> Iterator[AttachedModel]:
    """The tiny model, of whose four layers the second suffers most and the last least."""
    table = {"layers": torch.arange(4), "sensitivity": torch.tensor([0.3, 0.9, 0.2, 0.1])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QKVComm, "_loaded", lambda self: SimpleNamespace(tensors=table))
        yield AttachedModel(copy.deepcopy(tiny.model))


def prompt(tokens: int = 200, new: int = 8) -> Prompt:
    ids = torch.randint(5, 260, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    return Prompt(ids, tokens - 50, (70, 80, 90), Limits(new, frozenset()))


def test_the_whole_cache_is_codes_of_each_layers_bits(model: AttachedModel) -> None:
    policy = make_policy("qkvcomm")
    assert not policy.budgeted and isinstance(policy, QKVComm)
    assert policy.bits == {0: 6, 1: 8, 2: 6, 3: 4}
    view = Engine(model).prefill(prompt().ids, Needs(window=1)).view
    for kv, bits in zip(policy.compress(view, 200), (6, 8, 6, 4), strict=True):
        codes, scales, plain = 199 * 2 * 16 * bits // 8, 16, 2 * 16 * 4
        assert kv.nbytes == 2 * (codes + scales + plain + 200 * 4)
        of_layer = kv.parts[0][1].tensors()[-1]  # type: ignore[attr-defined]
        assert torch.equal(of_layer[0], of_layer[1])  # one scale and zero of both heads
    full, own = Engine(model).run(prompt(), [Cell(make_policy("fullkv"), None), Cell(policy, None)])
    assert own.status == "ok" and own.kv_bytes < full.kv_bytes / 4.8
    off = (torch.tensor(own.nll_per_token) - torch.tensor(full.nll_per_token)).abs().max()
    assert 0 < off < 1


def test_decoded_tokens_become_codes_too(model: AttachedModel) -> None:
    full, own = (make_policy(name) for name in ("fullkv", "qkvcomm"))
    grown = [Engine(model).run(prompt(new=new), [Cell(own, None), Cell(full, None)]) for new in (1, 41)]
    (first, plain), (last, plain_last) = grown
    assert plain_last.kv_bytes_end - plain.kv_bytes_end == 40 * 4 * 2 * 2 * 16 * 4
    slot = sum(2 * 2 * 16 * bits // 8 for bits in (6, 8, 6, 4))
    assert last.kv_bytes_end - first.kv_bytes_end == 40 * slot


@pytest.mark.parametrize("over", ["snapkv", "pyramidkv", "adakv", "streamingllm", "random"])
def test_over_another_method_the_bytes_are_those_of_the_budget(model: AttachedModel, over: str) -> None:
    policy = make_policy("qkvcomm", {"over": over})
    for budget in (9, 40, 77):
        (own,) = Engine(model).run(prompt(), [Cell(policy, Budget(budget))])
        assert own.status == "ok" and own.stored_bytes <= own.asked_bytes, own
        slots = sum(own.kept_slots) / 8
        assert slots == 200 or slots > 2.5 * budget


def test_heads_that_pack_no_four_codes_are_refused(model: AttachedModel) -> None:
    with pytest.raises(PolicyError, match="keys of 6 and values of 8 numbers are no multiples of 4"):
        QKVComm().slots(20, KV(torch.ones(1, 1, 9, 6), torch.ones(1, 1, 9, 8), torch.arange(9).expand(1, 1, 9)))
    with pytest.raises(PolicyError, match="makes codes itself"):
        make_policy("qkvcomm", {"over": "quant"})


def test_the_packaged_sensitivities_are_those_of_one_model() -> None:
    manifest = load_constants(COMPILED / "qkvcomm" / "smollm2-135m").manifest
    policy = make_policy("qkvcomm@snapkv").for_model(manifest.model_revision)
    assert isinstance(policy, QKVComm) and policy.compiled == "smollm2-135m" and not policy.lacks
    assert [[*policy.bits.values()].count(bits) for bits in (4, 6, 8)] == [9, 12, 9]
    assert [*policy.bits.values()] == manifest.report["bits"] and policy.method_bytes == 30 * (8 + 4)
    assert len(policy.fitted_on()) == 64 and policy.provenance()["constants_sha256"] == manifest.tensors_sha256
    with pytest.raises(PolicyError, match="qkvcomm has no constants of this model, abc; make some with"):
        make_policy("qkvcomm").for_model("abc")
