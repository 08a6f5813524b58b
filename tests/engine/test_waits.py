"""How often the device is waited for while prompts are compressed and batches are made: not once a layer.

On a CPU nobody waits; what would wait on a GPU is counted as it is asked for.
"""

from functools import cache, reduce
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from harness.engine.compress import Compressed, compress
from harness.engine.decode import Decoding
from harness.engine.prefill import Prefilled, prefill
from harness.engine.transformers_seam import AttachedModel
from harness.models.wording import Request, Wording
from methods.artefact import CompiledPolicy
from methods.base import KVPolicy, LayerView, Needs, PolicyError
from methods.coded import CodedPolicy
from methods.registry import load_methods, make_policy

TOKENS, BUDGET, FEW, MANY = 96, 72, 1, 3  # more than any window holds
IDS = torch.arange(TOKENS).tolist()
LABELS = [
    label
    for name, entry in load_methods().items()
    if entry.policy.__module__.startswith("methods.")
    for label in (name, *(f"{name}@{preset}" for preset in entry.presets))
]
READINGS = 2  # what layers doubt, and what they hold
MORE = {
    "adakv": 1,  # the shares of heads, of all layers
    "criticaladakv": 1,
    "dynamickv": 1,  # the shares of layers
    "expected_attention@paper": 1,
    "gvote": 1,  # the slots of the head that keeps most, of all layers
    "kvcompose": 1,  # the shares of layers
    "simlayerkv": 1,  # how lazy layers are
    "compilerkv": 1,  # tables lie on the host; so do those of `snapkv@compiled` and `headkv`
    "headkv": 1,
    "kvzip": 1,  # the shares of heads, of all layers
    "kvzap": 1,
    "matryoshkakv@compilerkv": 2,  # its tables, and the slots that ranks follow
    "snapkv@compiled": 1,
    "recalkv@paper": 2,  # the mask of its pass
    "compilerkv@published": 6,  # four of tables, the prompt's risk, the slots of all layers
}
A_LAYER = {"adakv": 1, "criticaladakv": 1, "expected_attention@paper": 1}
"""Readings a layer where it is compressed on its own: the size of what is left depends on numbers."""
UNLIKE = ("quant@snapkv-int4", "streamingllm@reassign", *A_LAYER)
KINDS = [label for label in LABELS if "@" not in label or label in UNLIKE]
ASKING = {
    *(getattr(Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")),
    *(Tensor.__index__, Tensor.equal, torch.equal, Tensor.nonzero, torch.nonzero),
}
ASKING_OPS = ("nonzero.default", "bincount", "masked_select", "unique", "repeat_interleave.Tensor")


class Waits(TorchFunctionMode):
    """Names what would wait for a GPU: what is read, chosen by a mask, or copied from pageable memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self._ops = list[str](), _Ops(self)

    def __enter__(self) -> Self:
        self._ops.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)
        self._ops.__exit__(kind, error, where)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKING or (func is torch.tensor and "device" in (kwargs or {})):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __init__(self, told: Waits) -> None:
        super().__init__()
        self.told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        masks = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        if name.startswith(ASKING_OPS) or any(x is not None and x.dtype == torch.bool for x in masks):
            self.told.found.append(name)
        return func(*args, **(kwargs or {}))


@cache
def model(layers: int) -> AttachedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes["head_dim"] = 32  # a block of every code
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, num_hidden_layers=layers, **sizes)).eval()
    return AttachedModel(llama, Wording(Request((1, 2), (1, 3), (4,))))


@cache
def prompt(layers: int) -> Prefilled:
    with torch.inference_mode():
        return prefill(model(layers), IDS, reduce(Needs.__or__, (policy_of(label).needs for label in LABELS)))


@cache
def policy_of(label: str) -> KVPolicy:
    policy = make_policy(label)
    return policy if isinstance(policy, CompiledPolicy) else policy.for_model("of no tables")


def left(label: str, layers: int) -> Compressed:
    policy = policy_of(label)
    return compress(prompt(layers), policy, BUDGET if policy.budgeted else TOKENS)


def told(table: dict[str, int], label: str) -> int:
    policy, name = policy_of(label), label.partition("@")[0]
    own = "compilerkv@published" if getattr(policy, "form", "") == "published" else name
    coded = isinstance(policy, CodedPolicy)  # live slots, which tell what becomes codes
    known = (table[name] for name in (label, own, getattr(policy, "over", None)) if name in table)
    return next(known, 0) + int(coded)


@pytest.mark.parametrize("label", LABELS)
def test_a_prompt_is_compressed_with_as_few_waits_at_any_depth(label: str) -> None:
    found = []
    for layers in (FEW, MANY):
        left(label, layers)  # files are read
        for layer in prompt(layers).view.layers:
            layer.forget()
        with Waits() as waits:
            left(label, layers)
        found.append(waits.found)
    assert found[0] == found[1]
    sizes = prompt(MANY).view.sizes
    across = int(policy_of(label).per_layer(BUDGET, sizes) is None)  # what it finds of all layers is read once
    assert len(found[0]) <= READINGS + max(told(MORE, label), across)


@pytest.mark.parametrize("label", KINDS)
def test_a_batch_of_growing_rows_is_made_without_a_wait(label: str) -> None:
    if policy_of(label).evicts_while_decoding:
        pytest.skip("it evicts while decoding")
    rows = [left(label, FEW)] * 3
    for again in (False, True):
        with Waits() as waits:
            Decoding.of(model(FEW), rows, again=again, room=4)
        assert [name for name in waits.found if name != "tensor"] == []


@pytest.mark.parametrize("label", KINDS)
def test_a_layer_compressed_on_its_own_waits_only_for_sizes(label: str) -> None:
    policy, found = policy_of(label), []
    for layers in (FEW, MANY):
        acts = policy.per_layer(BUDGET, model(layers).sizes(TOKENS))
        if acts is None:
            pytest.skip("it needs all layers")
        with Waits() as waits, torch.inference_mode():
            prefill(model(layers), IDS, policy.needs, acts=acts)
        found.append(len(waits.found))
    assert found[1] - found[0] == (MANY - FEW) * told(A_LAYER, label)


def test_waits_are_seen() -> None:
    x = torch.arange(4)
    with Waits() as waits:
        assert x[x > 1].tolist() == [2, 3] and int(x.bincount().sum()) == 4 and bool((x >= 0).all())
        torch.tensor([1], device=x.device)
    names = ["index.Tensor", "tolist", "bincount.default", "__int__", "__bool__", "tensor"]
    assert waits.found == names


class Broken(LayerView):
    """A layer one of whose attention weights is NaN."""

    def attention(self, window: int) -> Tensor:
        weights = super().attention(window)
        weights[0, 0, 0, 0, 3] = torch.nan
        return weights


def test_layers_asked_together_are_refused_as_each_alone() -> None:
    view, snapkv = prompt(MANY).view, policy_of("snapkv")
    kept = policy_of("knorm").compress(view, BUDGET)
    whole = view.layers[2]
    view.layers[2] = Broken(whole.index, whole.kv, whole.queries, whole.form, whole.column_sums, whole.rotate)
    try:
        for _ in range(2):  # nothing of the first refusal is memorised
            with pytest.raises(PolicyError, match="^1 of 192 attention weights of layer 2 are NaN or infinite; mend"):
                compress(prompt(MANY), snapkv, BUDGET)
        found = compress(prompt(MANY), policy_of("knorm"), BUDGET).kvs
        assert all(torch.equal(a.positions, b.positions) for a, b in zip(found, kept, strict=True))
        with pytest.raises(PolicyError, match="^1 of 192 attention weights of layer 2 are"):
            snapkv.compress(view, BUDGET)
    finally:
        view.layers[2] = whole


def test_layers_compressed_on_the_way_are_refused_after_the_prompt() -> None:
    def act(layer: LayerView) -> Any:
        layer.finite(torch.tensor([1.0, torch.inf if layer.index == 1 else 0.0]), "scores")
        return layer.kv

    with pytest.raises(PolicyError, match="^1 of 2 scores of layer 1 are NaN or infinite"):
        prefill(model(MANY), IDS, Needs(), acts=[act] * MANY)
