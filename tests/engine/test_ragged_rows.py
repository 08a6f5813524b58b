"""Ragged rows answer as growing rows do, of the same rows, whatever is appended, rewound or dropped."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton; pip install triton")

from harness.engine.packed import storage_bytes
from harness.engine.ragged_rows import RaggedRows
from harness.engine.row_cache import GrowingRows
from methods.base import KV
from tests.engine.test_row_cache import HEADS, ROWS, TOKENS, ask, kept, new, tokens_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = [[[6, 7, 8, 9], [6, 7, 8, 9]], [[6, 7, 8, 9], [6, 7, 8, 9]]]  # of a sliding window of 4


Slots = list[list[list[int]]]


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
