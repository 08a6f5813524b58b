"""What a GPU is given, on a CPU that is taken for one: every choice of a kernel, and cells run through the engine."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton; pip install triton")

from harness.engine import gpu, kernels, ragged_rows
from harness.engine.engine import Engine
from harness.engine.kernels import causal_attention, column_sums, prefill_kernel
from harness.engine.layer_cache import INDEX_BYTES
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Limits
from harness.models.load import LoadedModel
from methods.registry import load_methods
from methods.views import Form
from tests.engine.naive import naive, ragged
from tests.engine.test_engine import CODED, Ragged, cell, make_prompt, ok

HEADS, GROUP, DIM, TOKENS = 1, 2, 16, 45
KERNEL = ragged_rows.ragged_attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a card is no fake
NAMES = [
    name
    for name, entry in load_methods().items()
    if entry.policy.__module__.startswith("methods.") and not issubclass(entry.policy, CODED)
]


@pytest.fixture
def _taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU, on which sdpa is not to be called: it would compute n x n numbers."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("sdpa was called")

    monkeypatch.setattr(gpu, "is_gpu", lambda device: True)
    monkeypatch.setattr(kernels, "sdpa", never)


def prompt(new: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    queries = 2 * torch.randn(1, HEADS * GROUP, new, DIM)
    keys, values = torch.randn(2, 1, HEADS, TOKENS, DIM)
    return queries.to(DEVICE, dtype), keys.to(DEVICE, dtype), values.to(DEVICE, dtype)


@pytest.mark.usefixtures("_taken")
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("new", [TOKENS, 9])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, None, False), (7, None, True), (50, 2.0, False)])
def test_a_prompt_in_full_precision_has_our_own_kernels_or_blocks(
    monkeypatch: pytest.MonkeyPatch, triton: bool, new: int, window: int | None, softcap: float | None, sinks: bool
) -> None:
    monkeypatch.setattr(gpu, "installed", lambda name: triton and name == "triton")
    queries, keys, values = prompt(new)
    sink = torch.randn(HEADS * GROUP, device=DEVICE) if sinks else None
    form = Form(DIM**-0.5, window, softcap, None if sink is None else sink.view(1, HEADS, GROUP))
    out, lse = causal_attention(queries, keys, values, form)
    wanted, _, sums = naive(queries, keys, values, window=window, softcap=softcap, sinks=sink)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    assert (lse is None) != triton
    if window != 7:
        torch.testing.assert_close(column_sums(queries, keys, lse, form).double(), sums, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in for flash attention is a CPU's")
@pytest.mark.usefixtures("_taken")
@pytest.mark.parametrize("sinks", [False, True])
def test_a_prompt_in_half_precision_has_flash_attention_unless_its_form_forbids(
    monkeypatch: pytest.MonkeyPatch, sinks: bool
) -> None:
    queries, keys, values = prompt(TOKENS, torch.bfloat16)
    asked = []

    def flash(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        asked.append(form)
        return kernels._causal_lse(q, k, v, scaling=form.scaling)

    monkeypatch.setattr(gpu, "flash", flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    sink = torch.randn(HEADS * GROUP, device=DEVICE) if sinks else None
    form = Form(DIM**-0.5, TOKENS, None, None if sink is None else sink.view(1, HEADS, GROUP))
    out, lse = causal_attention(queries, keys, values, form)
    wanted, wanted_lse, sums = naive(queries, keys, values, window=None, softcap=None, sinks=sink)
    assert lse is not None and len(asked) == 1
    torch.testing.assert_close(out.double(), wanted, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=0)
    torch.testing.assert_close(column_sums(queries, keys, lse, form).double(), sums, atol=1e-3, rtol=1e-3)
    for other in (Form(1.0, 7), Form(1.0, softcap=3.0)):
        causal_attention(queries, keys, values, other)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    causal_attention(queries, keys, values, form)
    assert len(asked) == 1


def test_the_name_of_a_gpu_s_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")
    assert prefill_kernel(card, torch.bfloat16) == "flash_attention_2"
    assert prefill_kernel(card, torch.float32) == "triton"
    monkeypatch.setattr(gpu, "installed", lambda name: False)
    assert prefill_kernel(card, torch.float32) == "blocks"


@pytest.mark.parametrize(
    ("names", "kernel", "new"),
    [
        (NAMES, ragged if DEVICE == "cpu" else KERNEL, 7),
        (["adakv", "quant@int4"], ragged_rows.ragged_attention, 3),
    ],
)
def test_cells_of_every_method_are_those_of_the_cpu(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, names: list[Any], kernel: Callable[..., Tensor], new: int
) -> None:
    models = (AttachedModel(copy.deepcopy(tiny.model).to(place), tiny.wording) for place in ("cpu", DEVICE))
    cpu, card = (Engine(model, rows=len(names) + 1) for model in models)
    asked = make_prompt(30, Limits(new, frozenset()))
    cells = [cell(own, 8) for own in (*names, Ragged())]
    wanted, calls = ok(cpu.run(asked, cells)), list[int]()
    monkeypatch.setattr(gpu, "is_gpu", lambda device: True)

    def counted(queries: Tensor, *args: Any, **more: Any) -> Tensor:
        calls.append(len(queries))
        return kernel(queries, *args, **more)

    monkeypatch.setattr(ragged_rows, "ragged_attention", counted)
    for one, two, own in zip(ok(card.run(asked, cells)), wanted, cells, strict=True):
        assert one.token_ids == two.token_ids, own
        assert one.nll_per_token == pytest.approx(two.nll_per_token, abs=1e-4)
        assert (one.kv_bytes, one.kv_bytes_end) == (two.kv_bytes, two.kv_bytes_end)
        index = 4 * 2 * 3 * INDEX_BYTES  # of layers and KV heads; codes have two
        assert 0 <= one.stored_bytes_end - two.stored_bytes_end <= index
    apart = any(own.policy.reads_a_part for own in cells)  # in a batch by itself, some layers of which are whole
    shared = set(calls) - ({2, 2 * 3} if apart else set())
    rows = min(shared) // 2
    assert 1 < rows <= len(cells)  # those that grow; cells of equal caches are one row
    assert shared <= {2 * rows, 2 * rows * 3}  # one call a layer: KV heads of all rows, the answer's 3 tokens


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", gpu.HALF)
@pytest.mark.parametrize("new", [TOKENS, 9, 1])
def test_flash_attention_tells_denominators_and_ends_its_mask_at_the_last_token(new: int, dtype: torch.dtype) -> None:
    queries, keys, values = prompt(new, dtype)
    form = Form(DIM**-0.5)
    assert gpu.flash_takes(queries, values, form)
    out, lse = gpu.flash(queries, keys, values, form)
    wanted, wanted_lse, _ = naive(queries, keys, values, window=None, softcap=None, sinks=None)
    torch.testing.assert_close(out.double(), wanted, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=0)
