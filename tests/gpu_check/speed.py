"""Kernels by themselves at the model's layer shape: whole prompts, column sums, and decoding over unlike streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from harness.engine.kernels import causal_attention, column_sums
from methods.views import Form
from tests.gpu_check.step import Check

CHUNK = 16
"""A chunk is this part of the longer prompt."""
NEAREST, FARTHEST = 0.25, 2.0
"""Sizes of ragged streams, in budgets."""


def whole_prompts(check: Check) -> None:
    """Attention of a prompt by each of torch's kernels and by ours, with column sums beside it, and of a chunk."""
    tokens, (heads, kv_heads, dim) = check.size.lengths[1], check.size.layer
    q, k, v = (_random(check, 1, count, tokens, dim) for count in (heads, kv_heads, kv_heads))
    last, form = q[:, :, -(tokens // CHUNK) :].contiguous(), Form(dim**-0.5)
    for name in check.card.backends:
        with check.card.backend(name):
            _attention(check, f"sdpa {name}", q, k, lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True))
    _attention(check, "engine, a chunk", last, k, lambda: causal_attention(last, k, v, form))
    _attention(check, "engine", q, k, lambda: causal_attention(q, k, v, form))
    lse: list[Tensor | None] = []
    check.measure("log denominators", lambda: _told(lse, causal_attention(q, k, v, form)[1]))
    if lse:
        _attention(check, "column sums", q, k, lambda: column_sums(q, k, lse[0], form))
    _attention(check, "triton", q, k, lambda: _triton().causal_forward(q, k, v, form))
    if lse and lse[0] is not None:
        _attention(check, "triton, column sums", q, k, lambda: _triton().column_sums(q, k, lse[0], form))


def _attention(check: Check, name: str, q: Tensor, k: Tensor, call: Callable[[], Any]) -> None:
    """Time and peak of what goes over the causal pairs of queries [1, Hq, Q, D] and keys, as two products of each."""
    heads, new, dim = q.shape[1:]
    flop = 4 * heads * dim * new * (k.shape[2] - new / 2)

    def found() -> dict[str, Any]:
        ms = check.card.ms(call, repeat=3, warm=1)
        return {"ms": ms, "TFLOPs": None if ms is None else flop / ms / 1e9, "peak_bytes": check.card.peak(call)}

    check.measure(name, found)


def _told(into: list[Tensor | None], lse: Tensor | None) -> str:
    into.append(lse)
    return "none: column sums are streamed" if lse is None else "told"


def _triton() -> Any:
    from harness.engine import triton_kernels

    return triton_kernels


def streams(check: Check) -> None:
    """Decoding of one token: uniform streams by sdpa, unlike ones in one call, by torch's varlen, and one by one."""
    _, kv_heads, _ = check.size.layer
    rows, budget = check.size.batches[-1], check.size.budget
    shapes = [(kv_heads, check.size.lengths[1]), (rows * kv_heads, check.size.lengths[0]), (rows * kv_heads, budget)]
    for count, slots in shapes:
        check.measure(f"sdpa, {count} x {slots}", lambda count=count, slots=slots: _uniform(check, count, slots))
        even = [slots] * count
        check.measure(f"one call, {count} x {slots}", lambda even=even: _Ragged(check, even).one_call())
    drawn = torch.Generator().manual_seed(0)
    low, high = int(NEAREST * budget), int(FARTHEST * budget)
    sizes = torch.randint(low, high, (rows * kv_heads,), generator=drawn).tolist()
    ragged = _Ragged(check, sizes)
    for name, call in (("one call", ragged.one_call), ("varlen_attn", ragged.varlen), ("a loop", ragged.loop)):
        check.measure(f"{name}, unlike streams", call)


def _uniform(check: Check, count: int, slots: int) -> dict[str, Any]:
    heads, kv_heads, dim = check.size.layer
    q = _random(check, count, 1, heads // kv_heads, dim)
    k, v = (_random(check, count, 1, slots, dim) for _ in range(2))
    return _rate(check.card.ms(lambda: sdpa(q, k, v)), 2 * k.nbytes)


class _Ragged:
    """Streams of unlike lengths in one buffer, asked in three ways."""

    def __init__(self, check: Check, sizes: Sequence[int]) -> None:
        heads, kv_heads, dim = check.size.layer
        self.check, self.sizes, self.longest, self.scaling = check, list(sizes), max(sizes), dim**-0.5
        self.q = _random(check, len(sizes), heads // kv_heads, dim)
        self.k, self.v = (_random(check, sum(sizes), dim) for _ in range(2))
        self.lengths = torch.tensor(self.sizes, dtype=torch.int32, device=check.card.device)
        self.ends = self.lengths.cumsum(0, dtype=torch.int32)

    def one_call(self) -> dict[str, Any]:
        starts, form = self.ends - self.lengths, Form(self.scaling)
        asked = (self.q, self.k, self.v, starts, self.lengths, form)
        return self._timed(lambda: _triton().ragged_attention(*asked, longest=self.longest))

    def varlen(self) -> dict[str, Any]:
        """Torch's packed attention: the query group of a stream is a sequence of one head, all of which see all."""
        from torch.nn.attention.varlen import varlen_attn

        count, group, _ = self.q.shape
        zero = self.ends.new_zeros(1)
        asked = torch.arange(0, count * group + 1, group, dtype=torch.int32, device=self.q.device)
        packed = [x.reshape(-1, 1, x.shape[-1]) for x in (self.q, self.k, self.v)]
        ends = torch.cat([zero, self.ends])
        return self._timed(
            lambda: varlen_attn(*packed, asked, ends, group, self.longest, scale=self.scaling).view_as(self.q)
        )

    def loop(self) -> dict[str, Any]:
        return self._timed(self._loop)

    def _loop(self) -> Tensor:
        parts = zip(self.q.split(1), self.k.split(self.sizes), self.v.split(self.sizes), strict=True)
        return torch.cat([sdpa(q, k[None], v[None], scale=self.scaling) for q, k, v in parts])

    def _timed(self, call: Callable[[], Tensor]) -> dict[str, Any]:
        wanted = self._loop().float()
        apart = float((call().float() - wanted).norm() / wanted.norm())
        return {**_rate(self.check.card.ms(call), 2 * self.k.nbytes), "apart": apart}


def _random(check: Check, *shape: int) -> Tensor:
    return torch.randn(*shape, device=check.card.device, dtype=getattr(torch, check.size.dtype))


def _rate(ms: float | None, nbytes: int) -> dict[str, Any]:
    """Milliseconds, and bytes of keys and values a second."""
    return {"ms": ms, "TBps": None if ms is None else nbytes / ms / 1e9}
