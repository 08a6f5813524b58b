"""The Triton kernels against naive attention in float64, on a CPU by Triton's interpreter (see tests/conftest.py)."""

import json
import math
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton; pip install triton")

from harness.engine import triton_kernels
from harness.engine.triton_kernels import causal_forward, column_sums, ragged_attention
from methods.views import Form
from tests.engine.naive import DISCARDED, naive

pytestmark = DISCARDED
CPU = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KINDS = [(None, False, None), (5.0, False, 20), (None, True, 20), (3.0, True, None)]
SHAPES = [(1, 1, 2, 70, 70, 64), (2, 1, 3, 45, 20, 24), (1, 2, 1, 33, 1, 16)]  # B H G S Q D
HALF = [torch.float16, torch.bfloat16]
CASES = [*product(SHAPES, [torch.float32], KINDS), *product(SHAPES[1:2], HALF, KINDS[::3])]
STREAMS = [*product([torch.float32], [32, 512], [(None, False), (4.0, True)]), *product(HALF, [32], [(4.0, True)])]


def made(shape: tuple[int, ...], dtype: torch.dtype, *, sinks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, heads, group, tokens, new, dim = shape
    q, k = torch.randn(batch, new, heads * group, dim), torch.randn(batch, heads, tokens, dim)
    v = torch.randn(batch, heads, tokens, dim)
    q, k, v = ((2 * x).to(CPU, dtype) for x in (q, k, v))
    return q.transpose(1, 2), k, v, torch.randn(heads * group, device=CPU) if sinks else None


@pytest.mark.parametrize(("shape", "dtype", "kind"), CASES)
def test_a_whole_prompt(
    shape: tuple[int, ...], dtype: torch.dtype, kind: tuple[float | None, bool, int | None]
) -> None:
    softcap, sinks, window = kind
    q, k, v, sink = made(shape, dtype, sinks=sinks)
    form = Form(q.shape[-1] ** -0.5, window, softcap, None if sink is None else sink.view(1, k.shape[1], -1))
    out, lse = causal_forward(q, k, v, form)
    wanted, wanted_lse, wanted_sums = naive(q, k, v, window=window, softcap=softcap, sinks=sink)
    torch.testing.assert_close(out.double(), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=1e-4)
    if window is None:
        sums = column_sums(q, k, lse, form)
        torch.testing.assert_close(sums.double(), wanted_sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "split", "kind"), STREAMS)
def test_streams_of_unlike_lengths(
    dtype: torch.dtype, split: int, kind: tuple[float | None, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    softcap, sinks = kind
    monkeypatch.setattr(triton_kernels, "SPLIT", split)
    lengths, room, group, dim = [5, 70, 0, 64], 7, 3, 48
    starts = [sum(lengths[:i]) + i * room for i in range(len(lengths))]
    q = torch.randn(len(lengths), group, dim).to(CPU, dtype)
    k, v = (torch.randn(sum(lengths) + room * len(lengths), dim).to(CPU, dtype) for _ in range(2))
    sink = torch.randn(len(lengths), group, device=CPU) if sinks else None
    at, count = (torch.tensor(x, dtype=torch.int32, device=CPU) for x in (starts, lengths))
    form = Form(dim**-0.5, softcap=softcap, sinks=sink)
    out = ragged_attention(q, k, v, at, count, form, longest=max(lengths) + room)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = [x[None, None, start : start + length] for x in (k, v)]
        if not length:
            assert not out[i].any()
            continue
        held = None if sink is None else sink[i]
        wanted, _, _ = naive(q[i][None, :, None], *own, window=None, softcap=softcap, sinks=held)
        torch.testing.assert_close(out[i].double(), wanted[0, :, 0], rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_no_number_of_a_block_that_does_not_exist_is_read() -> None:
    """A stream's room behind its last slot, full of NaN, changes nothing."""
    k, v = torch.full((40, 16), math.nan, device=CPU), torch.full((40, 16), math.nan, device=CPU)
    k[3:20], v[3:20] = 0.5, 2.0
    at, count = torch.tensor([3], device=CPU), torch.tensor([17], device=CPU)
    out = ragged_attention(torch.ones(1, 2, 16, device=CPU), k, v, at, count, Form(1.0), longest=30)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))


@pytest.mark.slow
def test_every_kernel_compiles_for_cards_and_fits_their_shared_memory() -> None:
    free = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engine.compiled_kernels"]
    done = subprocess.run(command, env=free, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 20 and max(found.values()) <= 99 * 1024, (
        found
    )  # of the smallest cards that have flash attention
