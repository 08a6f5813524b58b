"""Whether the card computes what a CPU does: its kernels beside float64, and every method beside the CPU's float32."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.engine.transformers_seam import AttachedModel
from harness.models.load import load_model
from harness.plan.methods import plan_method
from harness.speed.one_method import Isolated
from methods.registry import load_methods
from methods.views import Form
from tests.engine.naive import naive
from tests.gpu_check.step import Check

CLOSE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
"""Largest difference of an output that is no fault, of values around 1."""
EXACT = 1e-4
"""The same of log denominators, and of column sums relative to 1 + the sum."""
SAME_SLOTS, SAME_LOGITS = 0.99, 1e-3
"""In float32, the share of slots that a method keeps on a CPU as well, and the relative difference of the logits."""
BESIDE = (
    *("h2o@paper", "tova@paper", "streamingllm@paper", "quant@int8", "quant@snapkv-int4", "compilerkv@window"),
    *("compilerkv@paper",),
)
"""Besides the registered methods as they are: those that evict while they decode, codes, windows."""


class Case(NamedTuple):
    """A form of attention. sinks: whether it has them."""

    dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def form(self, sinks: Tensor | None) -> Form:
        return Form(self.dim**-0.5, self.window, self.softcap, sinks)


CASES = (Case(128), Case(64, window=128, sinks=True), Case(256, softcap=50.0), Case(96, window=40, softcap=5.0))
HEADS, GROUP = 2, 4


def _reference(queries: Tensor, keys: Tensor, values: Tensor, case: Case, sinks: Tensor | None) -> tuple[Tensor, ...]:
    """Output, log denominators and column sums, on a CPU. sinks: [Hq]."""
    q, k, v = (x.cpu() for x in (queries, keys, values))
    own = None if sinks is None else sinks.cpu()
    return naive(q, k, v, window=case.window, softcap=case.softcap, sinks=own)


def kernels(check: Check) -> None:
    """The Triton kernels of `harness.engine` over dtypes and forms of attention."""
    try:
        from harness.engine import triton_kernels
    except ImportError as error:
        check.found["kernels"] = {"status": "skipped", "error": str(error)}
        return
    torch.manual_seed(0)
    for case, dtype in product(CASES, ("float32",) if check.card.rehearsal else CLOSE):
        name = " ".join(f"{field}={value}" for field, value in case._asdict().items() if value)
        check.measure(f"{dtype} {name}", partial(_kernel, check, triton_kernels, case, dtype))


def _kernel(check: Check, triton_kernels: Any, case: Case, dtype: str) -> dict[str, Any]:
    """Largest differences of the kernels of one form, and whether all of them are small."""
    tokens, new = (64, 40) if check.card.rehearsal else (700, 450)
    made = {"device": check.card.device, "dtype": getattr(torch, dtype)}
    q = torch.randn(1, HEADS * GROUP, new, case.dim, **made)
    k, v = torch.randn(2, 1, HEADS, tokens, case.dim, **made)
    sinks = torch.randn(HEADS * GROUP, device=check.card.device) if case.sinks else None
    form = case.form(None if sinks is None else sinks.view(1, HEADS, GROUP))
    out, lse = triton_kernels.causal_forward(q, k, v, form)
    wanted, wanted_lse, wanted_sums = _reference(q, k, v, case, sinks)
    found = {"output": _apart(out, wanted), "lse": _apart(lse, wanted_lse)}
    if case.window is None:
        sums = triton_kernels.column_sums(q, k, lse, form)
        found["sums"] = _apart(sums, wanted_sums, relative=True)
    found["streams"] = _streams(triton_kernels, q, k, v, case._replace(window=None), sinks)
    limits = {"output": CLOSE[dtype], "streams": CLOSE[dtype], "lse": EXACT, "sums": EXACT}
    return found | {"same": all(value <= limits[name] for name, value in found.items())}


def _streams(triton_kernels: Any, q: Tensor, k: Tensor, v: Tensor, case: Case, sinks: Tensor | None) -> float:
    """The same of one token's attention in one call over streams of unlike lengths, the whole and less than half."""
    lengths, tokens = [k.shape[2], k.shape[2] * 2 // 5], k.shape[2]
    asked = q[0, :, -1].view(HEADS, GROUP, -1)
    grouped = None if sinks is None else sinks.view(HEADS, GROUP)
    starts, counts = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([0, tokens], lengths))
    flat = (x.flatten(0, 2) for x in (k, v))
    out = triton_kernels.ragged_attention(asked, *flat, starts, counts, case.form(grouped), longest=tokens)
    apart = []
    for head, length in enumerate(lengths):
        one = (x[:, head : head + 1, :length] for x in (k, v))
        own = None if grouped is None else grouped[head]
        apart.append(_apart(out[head], _reference(asked[head][None, :, None], *one, case, own)[0][0, :, 0]))
    return max(apart)


def _apart(found: Tensor, wanted: Tensor, *, relative: bool = False) -> float:
    away = (found.double().cpu() - wanted).abs()
    return float((away / (1 + wanted) if relative else away).max())


def every_method(check: Check) -> None:
    """Every method on the tiny model: slots kept, first logits and tokens, beside those of a CPU in float32."""
    reference = _tiny("cpu", "float32")
    others = {dtype: _tiny(str(check.card.device), dtype) for dtype in ("float32", "bfloat16")}
    for label in (*(name for name in load_methods() if name != "q8_0"), *BESIDE):  # a head fills no block of that
        check.measure(label, lambda label=label: _beside(check, label, reference, others))


def _tiny(device: str, dtype: str) -> AttachedModel:
    loaded = load_model("tiny", dtype=dtype, device=device)
    return AttachedModel(loaded.model, loaded.wording)


class _Answered(NamedTuple):
    slots: list[set[tuple[int, int]]]  # of each layer, pairs of KV head and token
    logits: Tensor
    tokens: list[int]


def _beside(
    check: Check, label: str, reference: AttachedModel, others: dict[str, AttachedModel]
) -> dict[str, dict[str, Any]]:
    tokens, budget, answer = (48, 24, 2) if check.card.rehearsal else (700, 64, 9)
    ids = torch.randint(5, 261, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    found, wanted = {}, _answer(reference, label, ids, budget, answer)
    for dtype, model in others.items():
        own = _answer(model, label, ids, budget, answer)
        pairs = zip(own.slots, wanted.slots, strict=True)
        slots = min(len(a & b) / max(1, len(a | b)) for a, b in pairs)
        logits = float((own.logits - wanted.logits).norm() / wanted.logits.norm())
        found[dtype] = {"slots": slots, "logits": logits, "tokens": own.tokens == wanted.tokens}
        same = slots >= SAME_SLOTS and logits <= SAME_LOGITS and own.tokens == wanted.tokens
        found[dtype] |= {"same": same} if dtype == "float32" else {}
    return found


def _answer(model: AttachedModel, label: str, ids: list[int], budget: int, answer: int) -> _Answered:
    policy = plan_method(label).policy
    runner = Isolated(model, policy, budget if policy.budgeted else None)
    prompt = runner.prefill(ids)
    slots = [_pairs(kv.positions[0]) for kv in prompt.kvs]
    logits = prompt.logits.float().cpu()
    return _Answered(slots, logits, runner.decode([prompt], answer).tokens[0])


def _pairs(positions: Tensor) -> set[tuple[int, int]]:
    heads = positions.tolist()
    return {(head, token) for head, own in enumerate(heads) for token in own if token >= 0}
