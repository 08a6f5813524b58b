"""Quantised KV: codes against loops, bytes by hand, decoding over codes against decoding over what they stand for."""

import copy
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.decode import Decoding
from harness.engine.engine import Engine
from harness.engine.packed import live_bytes, without
from harness.engine.row_cache import GrowingRows
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.models.load import LoadedModel
from harness.speed import predicted_memory
from harness.speed.dims import Dims
from harness.speed.one_method import Isolated
from harness.speed.predicted_memory import ProbeShape
from methods.base import KV, LayerView, PolicyError, PromptView
from methods.codes import MinMax, MinMaxCodes
from methods.quant import Quant
from methods.registry import make_policy
from methods.stored import CodedKV, encode
from methods.views import Form

HEADS, DIM = 2, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model))


def drawn(tokens: int, dtype: torch.dtype = torch.float32, *, dim: int = DIM, seed: int = 0) -> KV:
    """A cache whose channels have offsets and reaches of their own, as keys do."""
    draw = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(1, HEADS, tokens, dim, generator=draw) for _ in range(2)]
    numbers[0] = numbers[0] * torch.arange(1, dim + 1) + 3 * torch.arange(dim)
    keys, values = (x.to(dtype) for x in numbers)
    return KV(keys, values, torch.arange(tokens).expand(1, HEADS, tokens))


def bound(group: Tensor, bits: int, dtype: torch.dtype) -> float:
    """The most that a number of a group may be off: half a step, and what half precision and `dtype` round away."""
    low, high = float(group.min()), float(group.max())
    half = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).eps
    step = (high - low) / (2**bits - 1) * (1 + 2 * half)
    rounding = torch.finfo(dtype).eps * max(abs(low), abs(high))
    return step / 2 + (half * abs(low) if dtype == torch.float32 else 0.0) + rounding + 1e-6


@pytest.mark.parametrize(("bits", "dtype", "tokens"), [*product((8, 4, 2), DTYPES, (5, 37))])
def test_what_codes_stand_for_is_within_half_a_step(bits: int, dtype: torch.dtype, tokens: int) -> None:
    """Group by group in a loop: a key channel over 8 tokens, a token's value over 4 channels."""
    kv = drawn(tokens, dtype)
    codes = MinMaxCodes.of(MinMax(bits, 4, residual=1), kv.keys[0], kv.values[0])
    keys, values = torch.empty_like(kv.keys[0]), torch.empty_like(kv.values[0])
    codes.decode(keys, values, kv.positions[0])
    places = [(keys, kv.keys[0], (slice(at, at + 4), one)) for at, one in product(range(0, tokens, 4), range(DIM))]
    places += [(values, kv.values[0], (one, slice(at, at + 4))) for one, at in product(range(tokens), (0, 4))]
    for head, (found, coded, place) in product(range(HEADS), places):
        own = coded[(head, *place)].float()
        assert float((found[(head, *place)].float() - own).abs().max()) <= bound(own, bits, dtype)


def kivi(numbers: Sequence[float], bits: int) -> tuple[float, float]:
    """Zero and scale of a group, of which a number x has the code round((x - zero) / scale).

    KIVI's rule: quant/new_pack.py:217-241 at KIVI 876b4d2.
    """
    return min(numbers), (max(numbers) - min(numbers)) / (2**bits - 1)


@pytest.mark.parametrize(("bits", "dtype"), [*product((2, 4, 8), (torch.float16, torch.bfloat16))])
def test_codes_are_kivis_but_for_scales_rounded_up(bits: int, dtype: torch.dtype) -> None:
    """Keys by channel over 32 tokens, values by token over 32 channels: llama_kivi.py:204 and 218 at KIVI 876b4d2.

    Our scale is at most two roundings above KIVI's, so a number's code may be off by half a step and by these.
    """
    kv, slack, count = drawn(96, dtype, dim=64), 2 * torch.finfo(dtype).eps, 64 * bits // 8
    codes = MinMaxCodes.of(MinMax(bits, 32, residual=1), kv.keys[0], kv.values[0])
    groups = [("key", (slice(at, at + 32), d), (at // 32, d)) for at, d in product((0, 32, 64), range(64))]
    groups += [("value", (t, slice(at, at + 32)), (t, at // 32)) for t, at in product(range(96), (0, 32))]
    unpacked = {}
    for head, name in product(range(HEADS), ("key", "value")):
        packed = getattr(codes, f"{name}s")[head].tolist()
        own = [[row[d % count] >> d // count * bits & 2**bits - 1 for d in range(64)] for row in packed]
        unpacked[head, name] = torch.tensor(own)
    for head, (name, place, at) in product(range(HEADS), groups):
        numbers = getattr(kv, f"{name}s")[0, head][place].tolist()
        zero, scale = kivi(numbers, bits)
        assert float(getattr(codes, f"{name}_zero")[head][at]) == zero
        assert scale <= float(getattr(codes, f"{name}_scale")[head][at]) <= scale * (1 + slack)
        for x, code in zip(numbers, unpacked[head, name][place].tolist(), strict=True):
            assert abs((x - zero) / scale - code) <= 0.5 + (code + 0.5) * slack + 1e-6


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_those_of_a_loop(bits: int) -> None:
    """Numbers on the grid of their own group come back as they were, the lowest as 0, two or four codes in a byte."""
    grid = torch.arange(2**bits).repeat(4)[: 2**bits].float()
    keys = (grid[:, None] * 0.5 - 3).expand(-1, DIM).clone()  # [C, D], every channel runs through all codes
    values = (torch.arange(DIM) % 2 * (2**bits - 1)).expand(len(keys), -1) * 0.25 + 1
    codes = MinMaxCodes.of(MinMax(bits, 2**bits, residual=1), keys.unsqueeze(0), values.unsqueeze(0))
    assert codes.keys.dtype == torch.uint8 and codes.keys.shape == (1, 2**bits, DIM * bits // 8)
    for slot, found in enumerate(codes.keys[0].tolist()):
        assert found == [slot * {8: 1, 4: 0x11, 2: 0x55}[bits]] * (DIM * bits // 8)
    assert codes.key_zero.unique().tolist() == [-3.0] and codes.value_zero.unique().tolist() == [1.0]
    decoded = torch.empty(1, *keys.shape), torch.empty(1, *values.shape)
    codes.decode(*decoded, torch.arange(len(keys)).unsqueeze(0))
    torch.testing.assert_close(decoded, (keys[None], values[None]), atol=1e-3 * 2**bits, rtol=0)
    level = KV(torch.full((1, 1, 9, 4), 2.5), torch.full((1, 1, 9, 4), -7.0), torch.arange(9).expand(1, 1, 9))
    assert all(map(torch.equal, encode(level, MinMax(bits, 4, residual=1)).load(), (level.keys, level.values)))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes_by_hand(bits: int) -> None:
    """41 tokens of 16 numbers in bfloat16, groups of 16, a residual of 5: 36 coded slots, 3 key groups (16, 16, 4)."""
    kv = drawn(41, torch.bfloat16, dim=16)
    numbers, key_scales, value_scales, plain = 36 * (16 + 16) * bits // 8, 3 * 16 * 2 * 2, 36 * 2 * 2, 5 * 2 * 16 * 2
    whole = encode(kv, MinMax(bits, 16, residual=5))
    assert whole.counts == (36, 36) and whole.keys.shape[2] == 5
    assert whole.nbytes == HEADS * (numbers + key_scales + value_scales + plain + 41 * 4)  # a position each
    assert without(whole, 40).nbytes == whole.nbytes - HEADS * (2 * 16 * 2 + 4)
    stored = sum(getattr(own, name).nbytes for _, own in whole.parts for name in vars(own) if name != "coding")
    assert stored + whole.keys.nbytes + whole.values.nbytes + whole.positions.nbytes == whole.nbytes
    assert live_bytes(whole, 41) == whole.nbytes - HEADS * 41 * 4  # all tokens of a prompt need no positions


def holes(counts: Sequence[int], tokens: int, seed: int = 0) -> Tensor:
    """Slots [1, H, S] of as many tokens as each head has in `counts`, empty slots anywhere between them."""
    draw = torch.Generator().manual_seed(seed)
    width = max(counts) + 2
    slots = torch.full((1, len(counts), width), -1)
    for head, count in enumerate(counts):
        at = torch.randperm(width, generator=draw)[:count].sort().values
        slots[0, head, at] = torch.randperm(tokens, generator=draw)[:count].sort().values
    return slots


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=HEADS, max_size=HEADS), st.sampled_from([8, 4, 2]), st.integers(1, 12))
def test_ragged_heads_keep_their_tokens_and_their_empty_slots(counts: list[int], bits: int, residual: int) -> None:
    kv = drawn(50)
    kept = kv.take(holes(counts, 50))
    coded = encode(kept, MinMax(bits, 8, residual=residual))
    assert coded.positions.shape == kept.positions.shape and coded.live.tolist() == [counts]
    assert coded.nbytes <= kept.nbytes
    keys, values = coded.load()
    for head, count in enumerate(counts):
        live = coded.positions[0, head, :count]
        assert live.tolist() == sorted(p for p in kept.positions[0, head].tolist() if p >= 0)
        assert (coded.positions[0, head, count:] == -1).all()
        last = slice(max(0, count - residual), count)
        assert torch.equal(keys[0, head, last], kv.keys[0, head, live[last]])
        reach = 60 / (2**bits - 1)
        torch.testing.assert_close(keys[0, head, :count], kv.keys[0, head, live], atol=reach, rtol=0)
        torch.testing.assert_close(values[0, head, :count], kv.values[0, head, live], atol=reach, rtol=0)


@pytest.mark.parametrize("window", [None, 30])
def test_a_step_reads_what_the_codes_stand_for(window: int | None) -> None:
    coding, other, least = (MinMax(bits, 8, residual=3) for bits in (4, 8, 2))
    sizes = [(40, 40), (40, 12), (0, 33), (40, 40)]
    kept = [drawn(50, seed=i).take(holes(own, 50, i)) for i, own in enumerate(sizes)]
    rows: list[KV] = [*(encode(kv, coding) for kv in kept), encode(kept[0], other), kept[1], encode(kept[1], least)]
    rows[0] = without(rows[0], int(rows[0].positions[0, 0].max()))
    numbers = [KV(*kv.load(), kv.positions) for kv in rows]
    coded, plain = (GrowingRows(own, position=50, room=4) for own in (rows, numbers))
    for query_tokens, members in ((1, None), (2, [0, 2, 3, 5, 6]), (1, [1, 3, 4])):
        for layer in (coded, plain):
            if members is not None:
                layer.keep(members)
        count = len(coded.kept_bytes)
        feed = [torch.randn(count, heads, query_tokens, DIM) for heads in (2 * HEADS, HEADS, HEADS)]
        outs = []
        for layer in (coded, plain):
            layer.append(*feed[1:])
            outs.append(layer.attend(feed[0], Form(0.3, window)))
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(40, 40), (40, 12), (0, 33)])
def test_tokens_that_come_later_become_codes_a_group_at_a_time(sizes: Sequence[int]) -> None:
    """Against the codes of each group by itself; what a rewound answer coded is forgotten, and bytes are counted."""
    coding, come = MinMax(4, 8, residual=5), 40
    kept, later = drawn(50).take(holes(sizes, 50)), drawn(come, seed=1)
    rows = [encode(kept, coding), encode(drawn(50, seed=2), coding)]
    layer = GrowingRows(rows, position=50, room=None)
    started, mark = layer.nbytes(0), layer.mark()
    for turn in range(2):
        for at in range(come):
            layer.append(*(x[:, :, at : at + 1].repeat(2, 1, 1, 1) for x in (later.keys, later.values)))
            assert all(5 <= group.plain + at + 1 <= 12 for group in layer.groups if group.codes)
            assert layer.stored == [layer.stored_bytes(row) for row in range(2)]
        if turn == 0:
            layer.rewind(mark)
            assert layer.nbytes(0) == started and layer.position == 50
    whole, numbers = layer.nbytes(0), 2 * DIM * later.keys.element_size()
    coded = dict[int, Tensor]()
    for group in layer.groups:
        keys, _ = group.load(layer.start, come)
        coded |= {stream: keys[i, 0] for i, stream in enumerate(group.streams)}
    for head, size in enumerate(sizes):
        first = max(0, size - 5) if rows[0].counts[head] else 0
        slots = rows[0].counts[head] + (size - rows[0].counts[head] + come - 5) // 8 * 8
        plain = torch.cat([rows[0].keys[0, head, : size - rows[0].counts[head]], later.keys[0, head]])
        for at in range(first, slots, 8):
            spot = torch.arange(at, at + 8).unsqueeze(0)
            alone = coding.encode(
                plain[None, at - first : at - first + 8], plain[None, at - first : at - first + 8], at
            )
            expected = torch.empty(1, 8, DIM)
            alone.decode(expected, torch.empty(1, 8, DIM), spot)
            assert torch.equal(coded[head][at : at + 8], expected[0])
        assert torch.equal(coded[head][slots:], plain[slots - first :])
        whole -= (size + come - slots) * numbers + size * 4
        whole -= coding.nbytes(first, DIM, DIM) - first * 4 if first else 0
        whole -= coding.nbytes(slots - first, DIM, DIM) - (slots - first) * 4
    assert whole == 0


def test_codes_stay_codes_in_the_layer() -> None:
    kv = encode(drawn(400), MinMax(4, 32, residual=8))
    layer = GrowingRows([kv, kv], position=400, room=3)
    assert sum(group.keys.shape[0] * group.keys.shape[2] for group in layer.groups) == 2 * HEADS * (8 + 3)
    assert layer.nbytes(0) == kv.nbytes - HEADS * 400 * 4
    alone = GrowingRows([kv], position=400, room=3)
    assert alone.groups[0].codes[0] is kv.parts[0][1]  # one row's codes are not copied


def held(session: Decoding) -> int:
    """Bytes of every tensor that the layers of a session hold."""
    groups = [group for cache in session.caches if isinstance(cache, GrowingRows) for group in cache.groups]
    plain = sum(x.nbytes for group in groups for x in (group.keys, group.values, group.positions) if x is not None)
    return plain + sum(codes.nbytes for group in groups for codes in group.codes)


@pytest.mark.parametrize(
    ("over", "bits"),
    [("snapkv", 8), ("pyramidkv", 4), ("h2o", 8), ("headkv", 4), ("compilerkv", 8), ("random", 4), ("adakv", 2)],
)
def test_an_evicting_method_chooses_more_slots_of_the_same_bytes(model: AttachedModel, over: str, bits: int) -> None:
    policy, inner = Quant(bits=bits, group=16, residual=16, over=over), make_policy(over)  # type: ignore[arg-type]
    ids = torch.randint(5, 260, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    view = Engine(model).prefill(ids, policy.needs).view
    for budget in (8, 17, 40, 93):
        asked = budget * len(view.layers) * 2 * (2 * 16 * 4 + 4)
        coded = policy.compress(view, budget)
        slots = min(policy.slots(budget, view.layers[0].kv), 300)
        for kv, own in zip(coded, inner.compress(view, slots), strict=True):
            assert [sorted(head) for head in kv.positions[0].tolist()] == [sorted(h) for h in own.positions[0].tolist()]
        spent = sum(kv.nbytes for kv in coded)
        assert spent <= asked
        assert slots >= budget and (budget < 40 or slots >= min(300, {8: 1.5, 4: 2.5, 2: 4.2}[bits] * budget))
        even = all(kv.live.unique().tolist() == [slots] for kv in coded)
        assert not even or slots == 300 or spent > asked - len(view.layers) * 2 * 3 * (2 * 16 * 4 + 4)  # 3 slots a head


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([8, 4, 2]), st.sampled_from(DTYPES), st.integers(1, 120), st.integers(1, 40))
def test_no_way_to_spread_the_slots_costs_more(
    data: st.DataObject, bits: int, dtype: torch.dtype, budget: int, residual: int
) -> None:
    policy = Quant(bits=bits, residual=residual)  # type: ignore[arg-type]
    kv = drawn(1, dtype, dim=64)
    slots, heads = policy.slots(budget, kv), 4
    cuts = sorted(data.draw(st.lists(st.integers(0, slots * heads), min_size=heads - 1, max_size=heads - 1)))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, slots * heads], strict=True)]
    plain, coded = 2 * 64 * dtype.itemsize + 4, [policy.coding.coded(count, kv) for count in counts]
    spent = [(a - b) * plain + policy.coding.nbytes(b, 64, 64) for a, b in zip(counts, coded, strict=True)]
    assert sum(spent) <= budget * heads * plain


def test_int8_answers_as_the_full_cache_does(model: AttachedModel) -> None:
    ids = torch.randint(5, 260, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    cells = [Cell(own, None) for own in (make_policy("fullkv"), Quant(), Quant(bits=4), Quant(bits=2))]
    outcomes = Engine(model).run(Prompt(ids, 150, (70, 80, 90), Limits(8, frozenset())), cells)
    assert [(own.status, own.over_budget) for own in outcomes] == [("ok", False)] * 4
    full, eight, four, two = outcomes
    assert eight.token_ids == full.token_ids
    off = [(torch.tensor(o.nll_per_token) - torch.tensor(full.nll_per_token)).abs().max() for o in outcomes[1:]]
    assert 0 < off[0] < 0.05 and off[0] < off[1] < off[2]
    assert two.kv_bytes < four.kv_bytes < eight.kv_bytes < full.kv_bytes / 2
    assert eight.kv_bytes_end - eight.kv_bytes == full.kv_bytes_end - full.kv_bytes
    assert eight.kept_slots == full.kept_slots


def test_a_layer_is_coded_as_soon_as_it_is_prefilled(model: AttachedModel) -> None:
    ids = torch.randint(5, 260, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    for label, budget in (("quant@int4", None), ("quant@kivi-2bit", None), ("quant@snapkv-int4", 60)):
        policy = make_policy(label)
        runner = Isolated(model, policy, budget)
        found = runner.prefill(ids)
        assert all(isinstance(kv, CodedKV) and min(kv.counts) > 60 for kv in found.kvs)
        expected = policy.compress(Engine(model).prefill(ids, policy.needs).view, budget or 200)
        assert [kv.positions.tolist() for kv in found.kvs] == [kv.positions.tolist() for kv in expected]
        assert found.layer_bytes == [live_bytes(kv, 200) for kv in expected]
        slots, dims = max(map(int, found.kvs[0].live[0])), Dims.of(model.config, 4)
        work = ProbeShape(policy.needs, True, False, 200, slots, 1, 4, None, policy.coding)  # type: ignore[attr-defined]
        assert found.layer_bytes == [predicted_memory.kept_layer(dims, work)] * model.layers
        assert held(Decoding.of(model, [found], room=3)) == predicted_memory.rows(dims, work)


def test_what_the_inner_method_needs_is_what_is_observed() -> None:
    over = Quant(over="h2o")
    assert over.needs == make_policy("h2o").needs and over.budgeted and not over.evicts_while_decoding
    assert over.for_model("any") == over and over.provenance() == {} and over.fitted_on() == frozenset()
    assert make_policy("quant@snapkv-int4") == Quant(bits=4, over="snapkv")
    assert make_policy("quant@kivi-2bit") == Quant(bits=2, residual=128)
    assert not Quant().budgeted and Quant() == make_policy("quant@int8")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 3}, "bits=3: Input should be 8, 4 or 2"),
        ({"group": 0}, "Quant.group=0 is too small"),
        ({"residual": 0}, "Quant.residual=0 is too small"),
        ({"over": "snapvk"}, "unknown method 'snapvk'; did you mean 'snapkv'"),
        ({"over": "quant"}, "'quant' makes codes itself"),
        ({"over": "fullkv"}, "'fullkv' evicts nothing; leave `over` out"),
        ({"over": "streamingllm@paper"}, "'streamingllm@paper' evicts while decoding"),
        ({"over": "h2o@paper"}, "'h2o@paper' evicts while decoding"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_policy("quant", params)


def test_numbers_that_codes_cannot_hold_or_make_smaller_are_refused() -> None:
    kv = drawn(9, dim=7)
    view = PromptView([LayerView(0, kv, torch.zeros(1, 2, 1, 7), Form(1.0))])
    with pytest.raises(PolicyError, match="heads of 7 and 7 numbers need bits=8"):
        Quant(bits=4).check(view)
    with pytest.raises(PolicyError, match="int2 codes share bytes, 4 in one; heads of 6 and 8 numbers need bits=4"):
        Quant(bits=2).fitting(9, 6, 8, 56)
    with pytest.raises(PolicyError, match="group=1: codes and scales are no smaller"):
        Quant(group=1).compress(view, 9)
    level = PromptView([LayerView(0, drawn(9, torch.bfloat16), torch.zeros(1, 2, 1, DIM), Form(1.0))])
    with pytest.raises(PolicyError, match="group=4: codes and scales are no smaller"):
        Quant(group=4).compress(level, 9)  # as large: of 4 tokens 32 + 32 codes, 32 + 32 scales; 128 plain
    Quant().check(view)
    kv.extra["sums"] = torch.zeros(1)
    with pytest.raises(PolicyError, match="more than keys and values"):
        Quant().compress(view, 9)
