"""Steps that wait for nobody: what one recorded, done again on the same tensors, picks the tokens of plain steps.

A tape stands for a CUDA graph: operations on storages that stay where they are, and nothing that the host is asked.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="no Triton; pip install triton")

from harness.engine import gpu, ragged_rows
from harness.engine.compress import Compressed
from harness.engine.decode import Decoding
from harness.engine.stepping import Stepped, greedy_steps
from harness.engine.transformers_seam import AttachedModel
from harness.models.load import LoadedModel
from harness.speed.one_method import Isolated
from methods.registry import make_policy
from tests.engine.naive import ragged
from tests.engine.test_transformers_seam import pair

COUNT, BUDGET = 9, 12
aten = torch.ops.aten
HOST = {aten._local_scalar_dense, aten.lift_fresh, aten.equal, aten.nonzero}


class Tape(TorchDispatchMode):
    """Records what is done; raises RuntimeError where the host is asked, or tells a new tensor its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in HOST:
            raise RuntimeError(f"{func} in a step")
        found = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, found))
        return found

    def kernel(self, *args: Any, **more: Any) -> Tensor:
        """The call of `ragged_attention` is one operation, whatever stands for the kernel."""
        with _disable_current_modes():
            found = ragged(*args, **more)
        self.done.append((ragged, args, more, found))
        return found

    def again(self) -> None:
        for func, args, more, found in self.done:
            for old, now in zip(tree_leaves(found), tree_leaves(func(*args, **more)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != now.data_ptr():
                    old.copy_(now)


def taped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """What records a step on a tape. Unlike a graph's, this step has run once, which stands for the first replay."""

    def graph(step: Callable[[], None]) -> Callable[[], None]:
        tape, ran = Tape(), [True]
        with monkeypatch.context() as within, tape:
            within.setattr(ragged_rows, "ragged_attention", tape.kernel)
            step()
        return lambda: None if ran and ran.pop() else tape.again()

    return graph


def prefilled(model: AttachedModel, method: str, rows: int) -> list[Compressed]:
    drawn = torch.Generator().manual_seed(3)
    runner = Isolated(model, make_policy(method), None if method == "fullkv" else BUDGET)
    return [runner.prefill(torch.randint(5, 97, (40,), generator=drawn).tolist()) for _ in range(rows)]


def stepped(model: AttachedModel, prompts: list[Compressed], **options: Any) -> Stepped:
    with torch.inference_mode():
        decoding = Decoding.of(model, prompts, room=COUNT)
        return greedy_steps(decoding, COUNT, **options)


def plain(model: AttachedModel, prompts: list[Compressed]) -> list[list[int]]:
    with torch.inference_mode():
        decoding, steps = Decoding.of(model, prompts, room=COUNT), [[int(own.logits.argmax()) for own in prompts]]
        for _ in range(COUNT):
            steps.append(decoding.step(steps[-1]).argmax(dim=-1).tolist())
    return [list(tokens) for tokens in zip(*steps, strict=True)]


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows, without a kernel to wait for."""
    monkeypatch.setattr(gpu, "fused", lambda device: True)
    monkeypatch.setattr(ragged_rows, "ragged_attention", ragged)


@pytest.mark.parametrize("method", ["fullkv", "adakv", "h2o@paper"])
def test_steps_one_by_one_pick_what_decoding_picks(tiny: LoadedModel, method: str) -> None:
    model = AttachedModel(copy.deepcopy(tiny.model))
    prompts = prefilled(model, method, 2)
    found = stepped(model, prompts)
    assert (found.tokens, found.replayed, len(found.step_s)) == (plain(model, prompts), False, COUNT)


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "fullkv"), ("gpt-oss", "snapkv"), ("gemma2", "adakv"), ("phi3", "snapkv")]
)
def test_a_recorded_step_picks_what_decoding_picks(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(name)
    prompts = prefilled(model, method, 3)
    gold = plain(model, prompts)
    assert len({token for own in gold for token in own}) > 3
    monkeypatch.setattr(gpu, "fused", lambda device: True)
    monkeypatch.setattr(ragged_rows, "ragged_attention", ragged)
    found = stepped(model, prompts, graph=taped(monkeypatch))
    assert (found.tokens, found.replayed, len(found.step_s)) == (gold, True, COUNT)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("asks", [True, False])
def test_a_step_that_cannot_be_replayed_runs_one_by_one(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    """A model that asks the host is refused by the recording; one that counts on the host is found out by its picks."""
    model = AttachedModel(copy.deepcopy(tiny.model))
    prompts, forward, calls = prefilled(model, "snapkv", 2), model.forward, list[int]()

    def counting(*args: Any, at: Tensor, **more: Any) -> Tensor:
        calls.append(int(at) if asks else 0)
        logits = forward(*args, at=at, **more)
        logits[..., len(calls) % 7] += 1000
        return logits

    gold = plain(model, prompts)
    monkeypatch.setattr(model, "forward", counting)
    found = stepped(model, prompts, graph=taped(monkeypatch))
    assert not found.replayed and len(found.step_s) == COUNT
    told = [(len(calls) - COUNT + 1 + step) % 7 for step in range(COUNT)]
    assert found.tokens == [[own[0], *told] for own in gold]


@pytest.mark.usefixtures("_gpu")
def test_rows_that_evict_are_not_recorded(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AttachedModel(copy.deepcopy(tiny.model))
    prompts = prefilled(model, "streamingllm@paper", 2)
    found = stepped(model, prompts, graph=taped(monkeypatch))
    assert (found.tokens, found.replayed) == (plain(model, prompts), False)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["fullkv", "adakv"])
def test_a_graph_replays_what_decoding_picks(tiny: LoadedModel, method: str) -> None:
    model = AttachedModel(copy.deepcopy(tiny.model).to("cuda"))
    prompts = prefilled(model, method, 3)
    found = stepped(model, prompts)
    assert (found.tokens, found.replayed) == (plain(model, prompts), True)
