"""Ragged rows answer as growing rows do, of the same rows, whatever is appended, rewound or dropped."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton; pip install triton")

from harness.engine import ragged_rows, triton_kernels
from harness.engine.packed import each_tensor, storage_bytes, without
from harness.engine.ragged_rows import RaggedRows
from harness.engine.row_cache import GrowingRows
from harness.engine.triton_kernels import ragged_attention
from methods.base import KV
from methods.codes import MinMax
from methods.stored import encode
from methods.views import Form
from tests.engine.naive import DISCARDED
from tests.engine.naive import ragged as plain_attention
from tests.engine.test_row_cache import HEADS, ROWS, TOKENS, ask, kept, new, tokens_of
from tests.methods.test_quant import drawn, holes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = [[[6, 7, 8, 9], [6, 7, 8, 9]], [[6, 7, 8, 9], [6, 7, 8, 9]]]  # of a sliding window of 4


Slots = list[list[list[int]]]


@pytest.fixture(autouse=True)
def _attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has tests of its own; a card runs it here too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(ragged_rows, "ragged_attention", plain_attention)


def pair(
    slots: Slots, more: int, room: int | None, *, window: bool = False
) -> tuple[list[Tensor], GrowingRows, RaggedRows]:
    feed = [x.to(DEVICE) for x in tokens_of(TOKENS + more)]
    kvs = [kept(*(x[:, :, :TOKENS] for x in feed[1:]), own) for own in slots]
    return feed, *(kind(kvs, position=TOKENS, room=room, window=window) for kind in (GrowingRows, RaggedRows))


@pytest.mark.parametrize("room", [None, 9])
@pytest.mark.parametrize(("slots", "window"), [(ROWS, None), (LAST, 4)])
@pytest.mark.parametrize("chunks", [[1] * 9, [3, 6], [2, 1, 4, 2]])
def test_the_same_answers(chunks: list[int], slots: Slots, window: int | None, room: int | None) -> None:
    feed, growing, ragged = pair(slots, sum(chunks), room, window=window is not None)
    at = TOKENS
    for size in chunks:
        one, two = (ask(cache, *new(feed, at, len(slots), size), window=window) for cache in (growing, ragged))
        torch.testing.assert_close(two, one)
        at += size
        assert [ragged.nbytes(row) for row in range(len(slots))] == [growing.nbytes(row) for row in range(len(slots))]


@DISCARDED
def test_codes_are_decoded_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_rows, "ragged_attention", ragged_attention)
    monkeypatch.setattr(triton_kernels, "SPLIT", 32)
    kvs = [drawn(50, seed=i).take(holes(own, 50, i)) for i, own in enumerate([(40, 50), (0, 33)])]
    kvs = [each_tensor(lambda x: x.to(DEVICE), kv) for kv in kvs]
    codings = [MinMax(bits, group, residual=3) for bits, group in ((8, 8), (4, 32), (2, 8))]
    rows = [encode(kvs[0], codings[0]), kvs[1], encode(kvs[1], codings[1]), encode(kvs[0], codings[2])]
    rows[0] = without(rows[0], int(rows[0].positions[0, 0].max()))
    growing, ragged = (kind(rows, position=50, room=4) for kind in (GrowingRows, RaggedRows))
    form = Form(0.3, softcap=3.0, sinks=torch.randn(1, 2, 2, device=DEVICE))
    for new_tokens, members in ((2, None), (1, [0, 2])):
        for cache in (growing, ragged):
            if members is not None:
                cache.keep(members)
        feed = [torch.randn(len(growing.kept_bytes), heads, new_tokens, 8, device=DEVICE) for heads in (4, 2, 2)]
        outs = []
        for cache in (growing, ragged):
            cache.append(*feed[1:])
            outs.append(cache.attend(feed[0], form))
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
        assert [ragged.nbytes(row) for row in range(len(feed[0]))] == [
            growing.nbytes(row) for row in range(len(feed[0]))
        ]
        held = [ragged.keys, ragged.values, ragged.starts, ragged.lengths]
        held += [x for own in ragged.coded for x in (*own.tensors, own.index)]
        assert sum(ragged.stored) == storage_bytes([*held, *(x for x in ragged.positions if x is not None)])


def test_rewound_and_with_fewer_rows_they_answer_the_same() -> None:
    feed, growing, ragged = pair(ROWS, 12, 12)
    for cache in (growing, ragged):
        ask(cache, *new(feed, TOKENS, 4, 2))
        mark = cache.mark()
        ask(cache, *new(feed, TOKENS + 2, 4, 6))
        cache.rewind(mark)
        cache.keep([1, 2])
    for at in range(TOKENS + 2, TOKENS + 12):
        one, two = (ask(cache, *new(feed, at, 2)) for cache in (growing, ragged))
        torch.testing.assert_close(two, one)
    assert [ragged.nbytes(row) for row in (0, 1)] == [growing.nbytes(row) for row in (0, 1)]


def test_stored_bytes_are_what_is_allocated_in_company_as_alone() -> None:
    feed, _, together = pair(ROWS, 40, None)
    kvs = [kept(*(x[:, :, :TOKENS] for x in feed[1:]), own) for own in ROWS]
    alone = [RaggedRows([kv], position=TOKENS, room=None) for kv in kvs]
    for at in range(TOKENS, TOKENS + 40):
        for cache, count in [(together, 4), *((cache, 1) for cache in alone)]:
            cache.append(*new(feed, at, count)[1:])
        assert together.stored == [cache.stored[0] for cache in alone]
        tensors = [together.keys, together.values, together.starts, together.lengths]
        assert sum(together.stored) == storage_bytes([*tensors, *(x for x in together.positions if x is not None)])


def test_a_step_within_the_room_moves_nothing_and_asks_the_host_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, _, ragged = pair(ROWS, 8, None)
    ragged.reserve(8)
    held = ragged.keys.data_ptr()

    def asked(*_: object) -> None:
        raise AssertionError("a step asked the device")

    for name in ("item", "tolist", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, asked)
    for at in range(TOKENS, TOKENS + 8):
        ragged.append(*new(feed, at, 4)[1:])
    assert ragged.keys.data_ptr() == held
    assert ragged.heads == HEADS


def test_side_data_counts() -> None:
    feed = [x.to(DEVICE) for x in tokens_of(TOKENS)]
    kv = kept(*feed[1:], ROWS[0])
    bare = RaggedRows([KV(kv.keys, kv.values, kv.positions)], position=TOKENS, room=1)
    kv.extra["scales"] = torch.zeros(5, dtype=torch.float16)
    assert RaggedRows([kv], position=TOKENS, room=1).stored_bytes(0) == bare.stored_bytes(0) + 10


@DISCARDED
@pytest.mark.parametrize("room", [None, 30])
def test_tokens_become_codes_when_those_of_growing_rows_do(monkeypatch: pytest.MonkeyPatch, room: int | None) -> None:
    """Rows of three kinds of codes and a plain one, heads of other sizes; rewound once, and fewer from a step on."""
    monkeypatch.setattr(ragged_rows, "ragged_attention", ragged_attention)
    kvs = [drawn(50, seed=i).take(holes(own, 50, i)) for i, own in enumerate([(40, 50), (0, 33), (9, 50)])]
    kvs = [each_tensor(lambda x: x.to(DEVICE), kv) for kv in kvs]
    kinds = [MinMax(bits, group, residual=residual) for bits, group, residual in ((8, 8, 3), (4, 4, 9), (2, 16, 1))]
    rows = [*(encode(kv, kind) for kv, kind in zip(kvs, kinds, strict=True)), kvs[1], encode(kvs[1], kinds[0])]
    growing, ragged = (kind(rows, position=50, room=room) for kind in (GrowingRows, RaggedRows))
    alone = {row: RaggedRows([rows[row]], position=50, room=room) for row in range(len(rows))}
    assert ragged.single_step and not ragged.replays
    at = list(range(len(rows)))
    draw = torch.Generator().manual_seed(0)
    for step in range(28):
        if step == 9:
            marks = growing.mark(), ragged.mark(), {row: cache.mark() for row, cache in alone.items()}
            bytes_then = [ragged.nbytes(row) for row in range(5)]
        if step == 14:
            growing.rewind(marks[0])
            ragged.rewind(marks[1])
            for row, cache in alone.items():
                cache.rewind(marks[2][row])
            assert [ragged.nbytes(row) for row in range(5)] == bytes_then
        if step == 20:
            at = [0, 2, 3]
            growing.keep(at)
            ragged.keep(at)
        feed = [torch.randn(len(at), heads, 1, 8, generator=draw).to(DEVICE) for heads in (4, 2, 2)]
        outs = []
        for cache in (growing, ragged):
            cache.append(*feed[1:])
            outs += [cache.attend(feed[0], Form(0.3))] if step % 3 == 2 else []  # the interpreter is slow
        if outs:
            torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
        for number, row in enumerate(at):
            alone[row].append(*(x[number : number + 1] for x in feed[1:]))
            assert growing.nbytes(number) == ragged.nbytes(number) == alone[row].nbytes(0)
            assert ragged.stored[number] == alone[row].stored[0] == alone[row].stored_bytes(0)
    held = [ragged.keys, ragged.values, ragged.starts, ragged.lengths]
    held += [x for own in (*ragged.coded, *ragged.later.values()) for x in (*own.tensors, own.index)]
    assert sum(ragged.stored) == storage_bytes([*held, *(x for x in ragged.positions if x is not None)])
    assert len(ragged.later) == 2  # of the rows that are left, one is plain
