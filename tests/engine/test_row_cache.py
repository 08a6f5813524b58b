"""Layer caches: what is appended is what is attended to, whatever the rows kept, rewound or dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.evicting_cache import with_room
from harness.engine.kernels import causal_attention, slot_attention
from harness.engine.layer_cache import LayerCache
from harness.engine.packed import each_tensor, live_bytes, storage_bytes, without
from harness.engine.prefill import PrefillLayer
from harness.engine.row_cache import GrowingRows
from methods.base import KV, Needs
from methods.views import Form

HEADS, GROUP, DIM, TOKENS = 2, 2, 4, 10
SLOT = 2 * DIM * 4  # bytes


def tokens_of(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `count` tokens, batch 1."""
    return (torch.randn(1, HEADS * GROUP, count, DIM), *torch.randn(2, 1, HEADS, count, DIM))


def kept(keys: Tensor, values: Tensor, slots: list[list[int]]) -> KV:
    """A KV of a prompt's keys and values that keeps `slots` of each head; -1 is an empty slot."""
    whole = KV(keys, values, torch.arange(keys.shape[2]).expand(1, HEADS, keys.shape[2]))
    return whole.take(torch.tensor([slots]))


def plain(query: Tensor, keys: Tensor, values: Tensor, seen: list[list[int]]) -> Tensor:
    """Attention [1, Hq, 1, D] of one query [1, Hq, 1, D] over the tokens `seen` of each KV head, float32."""
    slots = [(0, head // GROUP, seen[head // GROUP]) for head in range(HEADS * GROUP)]
    out = [(query[0, head] @ keys[at].T).softmax(dim=-1) @ values[at] for head, at in enumerate(slots)]
    return torch.stack(out).unsqueeze(0)


def ask(cache: LayerCache, *feed: Tensor, window: int | None = None) -> Tensor:
    """Append and attend. feed: queries, keys and values."""
    query, key, value = feed
    cache.append(key, value)
    return cache.attend(query, Form(1.0, window))


def new(feed: Sequence[Tensor], at: int, rows: int, count: int = 1) -> list[Tensor]:
    """Queries, keys and values of the tokens from `at` on, for every row the same."""
    return [x[:, :, at : at + count].expand(rows, -1, -1, -1) for x in feed]


ROWS = [[[0, 3, 9], [1, 2, 8]], [[-1, 5, 6], [0, 4, 9]], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[7, -1, -1], [-1, -1, 0]]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunks", [[1, 1, 1], [3], [2, 1]])
def test_rows_see_what_they_kept_and_what_came_after(chunks: list[int], window: int | None) -> None:
    queries, keys, values = feed = tokens_of(TOKENS + 3)
    kvs = [kept(keys[:, :, :TOKENS], values[:, :, :TOKENS], slots) for slots in ROWS]
    cache, at, outputs = GrowingRows(kvs, position=TOKENS, room=6), TOKENS, []
    for size in chunks:
        outputs.append(ask(cache, *new(feed, at, len(ROWS), size), window=window))
        at += size
    out = torch.cat(outputs, dim=2)
    for row, slots in enumerate(ROWS):
        for at in range(TOKENS, TOKENS + 3):
            seen = [[s for s in [*head, *range(TOKENS, at + 1)] if s >= 0] for head in slots]
            if window is not None:
                seen = [[s for s in head if s > at - window] for head in seen]
            gold = plain(queries[:, :, at : at + 1], keys, values, seen)
            torch.testing.assert_close(out[row : row + 1, :, at - TOKENS : at - TOKENS + 1], gold)


def test_bytes_of_a_row_are_its_live_slots_and_side_data() -> None:
    feed = tokens_of(TOKENS)
    kvs = [kept(*feed[1:], slots) for slots in ROWS]
    kvs[0].extra["scales"] = torch.zeros(5, dtype=torch.float16)
    cache = GrowingRows(kvs, position=TOKENS, room=3)
    held = [sum(s >= 0 for head in slots for s in head) * (SLOT + 4) for slots in ROWS]
    held[0] += 10
    assert [cache.nbytes(row) for row in range(4)] == held
    for _ in range(2):
        ask(cache, *new(feed, 0, 4))
    assert [cache.nbytes(row) for row in range(4)] == [size + 2 * HEADS * SLOT for size in held]
    with pytest.raises(IndexError):
        cache.nbytes(4)


def ragged(counts: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[KV]:
    """One KV a row whose heads hold `counts` slots of 256 tokens, with empty slots anywhere between them."""
    rows = []
    for heads in counts:
        slots = torch.full((HEADS, max(heads) + 2), -1)
        for own, count in zip(slots, heads, strict=True):
            own[torch.randperm(len(own))[:count].sort().values] = torch.randperm(256)[:count].sort().values
        rows.append(kept(*torch.randn(2, 1, HEADS, 256, DIM).to(dtype), slots.tolist()))
    return rows


def padded(kvs: Sequence[KV], fed: Sequence[Sequence[Tensor]], window: int | None) -> Tensor:
    """The last queries' attention [R, Hq, Q, D] over rows padded to one width and masked. fed: as given to `ask`."""
    width = max(kv.positions.shape[2] for kv in kvs)
    wide = each_tensor(lambda *rows: torch.cat(rows), *(with_room(kv, width - kv.positions.shape[2]) for kv in kvs))
    queries, keys, values = (torch.cat(parts, dim=2) for parts in zip(*fed, strict=True))
    end = 256 + keys.shape[2]
    positions = torch.cat([wide.positions, torch.arange(256, end).expand(*keys.shape[:3])], dim=2)
    keys, values = torch.cat([wide.keys, keys], dim=2), torch.cat([wide.values, values], dim=2)
    count = fed[-1][0].shape[2]
    asked, slot = torch.arange(end - count, end)[:, None], positions.unsqueeze(2)
    mask = (slot >= 0) & (slot <= asked) & (slot > asked - (window or 10**9))
    return slot_attention(queries[:, :, -count:], keys, values, Form(1.0), mask=mask)


def fresh(rows: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `count` tokens, another for every row."""
    queries, keys, values = zip(*(tokens_of(count) for _ in range(rows)), strict=True)
    return torch.cat(queries).to(dtype), torch.cat(keys).to(dtype), torch.cat(values).to(dtype)


def allocated(cache: GrowingRows) -> int:
    """Slots of one head that a layer holds memory for."""
    return sum(x.numel() for group in cache.groups for x in (group.keys, group.values)) // (2 * DIM)


def test_every_head_takes_memory_for_its_own_slots() -> None:
    counts, room = [[5, 40], [200, 5], [0, 40]], 7
    cache = GrowingRows(ragged(counts), position=256, room=room)
    slots = sum(map(sum, counts))
    assert allocated(cache) == slots + 4 * 4 + 2 * 7  # a sixteenth of the slots of a row, 4 at least
    assert [len(group.streams) for group in cache.groups] == [1, 2, 1, 1, 1]
    assert sum(cache.nbytes(row) for row in range(3)) == slots * (SLOT + 4)
    ask(cache, *fresh(3, 2))
    assert [cache.nbytes(row) for row in range(3)] == [sum(own) * (SLOT + 4) + 2 * HEADS * SLOT for own in counts]
    cache.keep([0, 2])
    assert allocated(cache) == 5 + 40 + 40 + 4 * 4


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 6), min_size=HEADS, max_size=HEADS), min_size=1, max_size=5),
    chunks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 3, 200]),
    dropped=st.integers(0, 4),
)
def test_heads_of_any_counts_compute_what_padded_and_masked_rows_compute(
    counts: list[list[int]], chunks: list[int], window: int | None, dropped: int
) -> None:
    kvs = ragged(counts)
    cache = GrowingRows(kvs, position=256, room=sum(chunks) + 5)
    mark = cache.mark()
    ask(cache, *fresh(len(kvs), 5), window=window)
    cache.rewind(mark)
    rows = [row for row in range(len(kvs)) if row != dropped] or [0]
    fed: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, size in enumerate(chunks):
        fed.append(fresh(len(kvs), size))
        if i == len(chunks) - 1:
            cache.keep(rows)
            fed, kvs = [(q[rows], k[rows], v[rows]) for q, k, v in fed], [kvs[row] for row in rows]
        torch.testing.assert_close(ask(cache, *fed[-1], window=window), padded(kvs, fed, window))
    assert [cache.nbytes(i) for i in range(len(rows))] == [
        sum(counts[row]) * (SLOT + 4) + HEADS * sum(chunks) * SLOT for row in rows
    ]


def test_ragged_heads_come_back_to_where_they_were_and_lose_only_dropped_rows() -> None:
    cache = GrowingRows(ragged([[3, 90], [90, 3], [17, 17], [3, 60]]), position=256, room=4)
    feeds = [fresh(4, 1) for _ in range(3)]
    ask(cache, *feeds[0])
    mark = cache.mark()
    before = [ask(cache, *feed) for feed in feeds[1:]]
    sizes = [cache.nbytes(row) for row in range(4)]
    cache.rewind(mark)
    assert cache.position == 257
    mark = cache.mark()
    assert all(torch.equal(ask(cache, *feed), out) for feed, out in zip(feeds[1:], before, strict=True))
    for kept, left in (([1, 2, 3], [1, 2, 3]), ([0, 2], [1, 3]), ([1], [3])):
        cache.rewind(mark)
        cache.keep(kept)
        mark = cache.mark()
        after = [ask(cache, *(x[left] for x in feed)) for feed in feeds[1:]]
        assert all(torch.equal(out, whole[left]) for out, whole in zip(after, before, strict=True))
        assert [cache.nbytes(i) for i in range(len(left))] == [sizes[row] for row in left]
        assert {stream for group in cache.groups for stream in group.streams} == set(range(HEADS * len(left)))


def test_ragged_heads_in_bfloat16_compute_alone_bit_for_bit_what_they_compute_in_company() -> None:
    counts = [[5, 40], [200, 5], [0, 131], [77, 77], [131, 200], [40, 5], [1, 250], [33, 34]]
    kvs = ragged(counts, torch.bfloat16)
    feeds = [fresh(len(kvs), 1, torch.bfloat16) for _ in range(6)]
    company = GrowingRows(kvs, position=256, room=6)
    together = [ask(company, *feed) for feed in feeds]
    assert together[0].dtype == torch.bfloat16
    for row, kv in enumerate(kvs):
        alone = GrowingRows([kv], position=256, room=6)
        for feed, out in zip(feeds, together, strict=True):
            assert torch.equal(ask(alone, *(x[row : row + 1] for x in feed)), out[row : row + 1])


@dataclass
class Coded(KV):
    """A KV that stores halves of the values, so that what attention reads is not what is stored."""

    def load(self) -> tuple[Tensor, Tensor]:
        return self.keys * 2, self.values * 2

    @property
    def nbytes(self) -> int:
        return int(self.live.sum()) * 7


@pytest.mark.parametrize("drop", [[9, 9], [3, 3], [3, 9]])
def test_a_kv_that_stores_codes_is_read_through_load(drop: list[int]) -> None:
    queries, keys, values = tokens_of(TOKENS + 1)
    whole = kept(keys / 2, values / 2, [[0, 3, 9], [1, 3, 9]])
    kv = without(Coded(whole.keys, whole.values, whole.positions), drop[0])
    assert kv.nbytes == 4 * 7
    cache = GrowingRows([kv], position=TOKENS, room=1)
    out = ask(cache, *(x[:, :, TOKENS:] for x in (queries, keys, values)))
    seen = [[s for s in head if s != drop[0]] + [TOKENS] for head in ([0, 3, 9], [1, 3, 9])]
    torch.testing.assert_close(out, plain(queries[:, :, TOKENS:], keys, values, seen))


def test_a_prefill_keeps_what_is_asked_for() -> None:
    queries, keys, values = tokens_of(TOKENS)
    layer = PrefillLayer(Needs(window=4, column_sums=True), TOKENS)
    out = ask(layer, queries, keys, values)
    torch.testing.assert_close(out, causal_attention(queries, keys, values, Form(1.0))[0])
    assert torch.equal(layer.queries, queries[:, :, -4:])
    assert layer.sums is not None
    assert layer.sums.shape == (1, HEADS, GROUP, TOKENS)
    assert layer.kv().positions.tolist() == [[list(range(TOKENS))] * HEADS]
    wide = PrefillLayer(Needs(window=50), TOKENS)
    ask(wide, queries, keys, values)
    assert torch.equal(wide.queries, queries)
    assert wide.sums is None


@pytest.mark.parametrize(("window", "start"), [(4, 6), (10, 0), (64, 0)])
def test_a_sliding_layer_leaves_what_its_window_reaches(window: int, start: int) -> None:
    queries, keys, values = tokens_of(TOKENS)
    layer = PrefillLayer(Needs(), TOKENS)
    ask(layer, queries, keys, values, window=window)
    kv = layer.kv()
    assert kv.positions[0, 0].tolist() == list(range(start, TOKENS))
    assert torch.equal(kv.keys, keys[:, :, start:])
    assert kv.nbytes == (TOKENS - start) * HEADS * (SLOT + 4)
    assert live_bytes(kv, TOKENS, window=True) == (TOKENS - start) * HEADS * SLOT
    if start:
        assert storage_bytes([layer.keys, layer.values]) == (TOKENS - start) * HEADS * SLOT  # the rest is freed


def test_without_and_room_leave_their_argument_alone() -> None:
    _, keys, values = tokens_of(TOKENS)
    kv = kept(keys, values, [[0, 8, 9], [7, 8, 9]])
    kv.extra["sums"] = torch.ones(1, HEADS, 3)
    before = each_tensor(Tensor.clone, kv)
    assert without(kv, 5) is kv
    assert without(kv, 0).positions.tolist() == [[[-1, 8, 9], [7, 8, 9]]]
    assert without(kv, 9).positions.tolist() == [[[0, 8, -1], [7, 8, -1]]]
    plain_kv = KV(kv.keys, kv.values, kv.positions)
    assert without(plain_kv, 9).positions.tolist() == [[[0, 8], [7, 8]]]
    roomy = with_room(kv, 0)
    roomy.keys.zero_(), roomy.positions.fill_(-1), roomy.extra["sums"].zero_()
    assert with_room(kv, 2).positions.tolist() == [[[0, 8, 9, -1, -1], [7, 8, 9, -1, -1]]]
    assert with_room(kv, 2).extra["sums"].shape == (1, HEADS, 5)
    for a, b in ((kv.keys, before.keys), (kv.positions, before.positions), (kv.extra["sums"], before.extra["sums"])):
        assert torch.equal(a, b)
