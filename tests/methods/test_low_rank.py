"""Latents of heads alone and together: exact at full rank, against a loop, their bytes, and tokens that come."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from harness.contract import make_view
from harness.engine.row_cache import GrowingRows
from methods.base import KV, Needs
from methods.low_rank import Basis, LowRank
from methods.stored import encode
from methods.views import Form

HEADS, DIM, TOKENS = 4, 8, 30
VIEW = make_view(TOKENS, Needs(window=1)).layers[0]


def cache(seed: int = 0) -> KV:
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, HEADS, TOKENS, DIM, generator=draw) for _ in range(2))
    return KV(keys + 2.0, values, torch.arange(TOKENS).expand(1, HEADS, TOKENS))


def basis(numbers: int, rank: int, seed: int) -> Basis:
    draw = torch.Generator().manual_seed(seed)
    full = torch.linalg.qr(torch.randn(numbers, numbers, generator=draw)).Q
    return Basis.orthonormal(torch.randn(numbers, generator=draw), full[:, :rank])


def codings(rank: int, heads: int, *, turned: bool = False) -> list[LowRank]:
    """One for every group of `heads` heads."""
    turn = VIEW.rotate if turned else None
    groups = [
        LowRank(basis(heads * DIM, rank, i), basis(heads * DIM, rank, i + 9), heads, turn)
        for i in range(HEADS // heads)
    ]
    return [own for own in groups for _ in range(heads)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_full_rank_is_exact(heads: int, turned: bool) -> None:
    kv = cache()
    stored = encode(kv, codings(heads * DIM, heads, turned=turned))
    torch.testing.assert_close(stored.load(), (kv.keys, kv.values), atol=1e-4, rtol=1e-4)
    assert torch.equal(stored.positions, kv.positions) and stored.counts == (TOKENS - 1,) * HEADS


@pytest.mark.parametrize("heads", [1, 2])
def test_a_slot_is_read_as_a_loop_reads_it(heads: int) -> None:
    """Of each group of heads: concatenated, without RoPE, less the mean, into the basis and back, with RoPE again."""
    kv, own = cache(), codings(3, heads, turned=True)
    keys, values = encode(kv, own).load()
    for group, token in ((group, token) for group in range(HEADS // heads) for token in range(TOKENS - 1)):
        members, coding = range(group * heads, group * heads + heads), own[group * heads]
        for name, found, numbers in (("keys", keys, kv.keys), ("values", values, kv.values)):
            way: Basis = getattr(coding, name)
            off, on = (-token, token) if name == "keys" else (0, 0)
            x = torch.cat([VIEW.rotate(numbers[0, head, token], off) for head in members])  # type: ignore[misc]
            back = way.mean + ((x - way.mean) @ way.encoder) @ way.decoder
            for head, part in zip(members, back.view(-1, DIM), strict=True):
                torch.testing.assert_close(found[0, head, token], VIEW.rotate(part, on), atol=1e-5, rtol=1e-5)  # type: ignore[misc]
    assert torch.equal(keys[:, :, -1], kv.keys[:, :, -1])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_bytes_are_those_of_latents(heads: int) -> None:
    """29 latents of 2 x 3 numbers for each group, a plain slot and 30 positions for each head."""
    stored, groups = encode(cache(), codings(3, heads)), HEADS // heads
    assert stored.nbytes == groups * 29 * 2 * 3 * 4 + HEADS * (2 * DIM * 4 + 30 * 4)


def decoded(layer: GrowingRows) -> tuple[Tensor, Tensor]:
    """Keys and values of all streams, [R * H, S, D]."""
    grown = layer.position - layer.start
    found = {
        s: own for g in layer.groups for s, *own in zip(g.streams, *(x[:, 0] for x in g.load(50, grown)), strict=True)
    }
    keys, values = (torch.stack([found[stream][i] for stream in sorted(found)]) for i in (0, 1))
    return keys, values


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_tokens_that_come_are_stored_in_the_same_form(heads: int) -> None:
    """Two rows, one of them dropped halfway: every step reads what the latents of all tokens but the newest say."""
    own, rows = codings(3, heads), [cache(seed) for seed in (0, 1)]
    layer = GrowingRows([encode(kv, own) for kv in rows], position=TOKENS, room=8)
    all_keys, all_values, live = [kv.keys for kv in rows], [kv.values for kv in rows], [0, 1]
    for step in range(6):
        if step == 3:
            layer.keep([1])
            live = [1]
        new = [torch.randn(1, HEADS, 1, DIM) for _ in range(2 * len(live))]
        for at, row in enumerate(live):
            all_keys[row] = torch.cat([all_keys[row], new[2 * at]], dim=2)
            all_values[row] = torch.cat([all_values[row], new[2 * at + 1]], dim=2)
        layer.append(torch.cat(new[::2]), torch.cat(new[1::2]))
        out = layer.attend(torch.randn(len(live), HEADS, 1, DIM), Form(0.3))
        assert out.shape == (len(live), HEADS, 1, DIM) and layer.single_step
        count = TOKENS + step + 1
        expected = [
            encode(KV(all_keys[row], all_values[row], torch.arange(count).expand(1, HEADS, count)), own) for row in live
        ]
        for found, name in zip(decoded(layer), (0, 1), strict=True):
            torch.testing.assert_close(found, torch.cat([kv.load()[name][0] for kv in expected]))
        sizes = [layer.nbytes(at) for at in range(len(live))]
        assert sizes == [kv.nbytes - HEADS * 4 * count for kv in expected]


def test_heads_that_share_latents_need_as_many_slots() -> None:
    kv = cache()
    positions = kv.positions.clone()
    positions[0, 0, 3] = -1
    with pytest.raises(ValueError, match="share a code"):
        encode(KV(kv.keys, kv.values, positions), codings(3, 2))


def test_more_rank_is_never_worse() -> None:
    kv = cache()
    full = [basis(DIM, DIM, of) for of in (0, 1)]
    cut = [[Basis.orthonormal(own.mean, own.encoder[:, :rank]) for own in full] for rank in range(1, DIM + 1)]
    losses = [(encode(kv, LowRank(pair[0], pair[1])).load()[0] - kv.keys).square().sum() for pair in cut]
    assert all(less <= more for more, less in pairwise(losses))
