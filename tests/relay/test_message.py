"""A compressed prompt as bytes and back: equal to the bit, of hardly more bytes than it holds, and refused else."""

import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from harness.engine.compress import Compressed, compress, weighed
from harness.engine.packed import tensors_of
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.records.relayed import HEADER_BYTES, LAYER_BYTES
from harness.relay.message import FORM, pack_message, read_message
from methods.base import KV
from methods.registry import make_policy

CPU = torch.device("cpu")
METHODS = (
    "fullkv",
    "snapkv",
    "adakv",
    "h2o@paper",
    "quant",
    "quant@kivi-2bit",
    "quant@snapkv-int4",
    "streamingllm@paper",
    "compilerkv",
)
TOKENS = 200


@dataclass
class OddKV(KV):
    """Holds what no message can."""

    other: Tensor = field(default_factory=lambda: torch.zeros(1))


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(tiny.model)


def left_by(label: str, model: AttachedModel) -> Compressed:
    policy = make_policy(label)
    found = prefill(model, [5 + at * 37 % 250 for at in range(TOKENS)], policy.needs)
    return compress(found, policy, 50 if policy.budgeted else TOKENS)


@pytest.mark.parametrize("label", METHODS)
def test_a_cache_comes_back_as_it_was(label: str, model: AttachedModel) -> None:
    left = left_by(label, model)
    data = pack_message(left)
    came = read_message(data, CPU, model.rotate)
    assert (came.tokens, came.budget) == (left.tokens, left.budget)
    again = weighed(came.kvs, model.compressible, came.tokens, came.states)
    assert again["known"] == left.known and again["stored_bytes"] == left.stored_bytes
    for kv, own, other in zip(came.kvs, left.kvs, left.layers, strict=True):
        assert type(kv) is type(own) and all(map(torch.equal, kv.load(), own.load()))
        assert all(map(torch.equal, tensors_of(kv), tensors_of(own)))
        assert len(tensors_of(other)) >= 2
    assert left.kv_bytes < len(data) <= left.stored_bytes + HEADER_BYTES + LAYER_BYTES * model.layers


def test_a_zeroed_message_has_the_same_slots_with_nothing_in_them(model: AttachedModel) -> None:
    left = left_by("snapkv", model)
    for kv, own in zip(read_message(pack_message(left), CPU, None, zeroed=True).kvs, left.kvs, strict=True):
        assert torch.equal(kv.positions, own.positions) and not kv.keys.any() and not kv.values.any()
        assert own.keys.any() and own.values.any()


def test_states_of_layers_without_keys_go_along(model: AttachedModel) -> None:
    left = left_by("fullkv", model)
    key, states = (1, "recurrent", 0), torch.rand(1, 3, 2)
    left.states[left.tokens].tensors[key] = states
    came = read_message(pack_message(left), CPU, None)
    assert came.states.tensors.keys() == {key} and torch.equal(came.states.tensors[key], states)


def changed(data: bytes, change: str, to: str) -> bytes:
    """The message with another description."""
    size = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + size])["__metadata__"][FORM]
    assert change in told
    return save(load(data), {FORM: told.replace(change, to)})


def test_a_broken_message_is_refused_in_one_line(model: AttachedModel) -> None:
    left = left_by("streamingllm@paper", model)
    data = pack_message(left)
    broken = [b"", data[:40], data[:-9], save({"x": torch.zeros(2)}), changed(data, '"layers"', '"lairs"')]
    broken += [changed(data, '"tokens":200', '"tokens":"many"'), changed(data, '["float32",', '["float32",9')]
    for one in broken:
        with pytest.raises(HarnessError, match="holds no cache") as caught:
            read_message(one, CPU, model.rotate)
        assert "\n" not in str(caught.value)
    with pytest.raises(HarnessError, match="holds a Popen, which is no KV known here"):
        read_message(changed(data, "ReassignedKV", "Popen"), CPU, model.rotate)


def test_what_no_message_can_hold_is_refused(model: AttachedModel) -> None:
    left = left_by("fullkv", model)
    kv = left.kvs[0]
    odd = OddKV(kv.keys, kv.values, kv.positions, {}, torch.zeros(1))
    with pytest.raises(HarnessError, match="OddKV holds more than numbers and tensors"):
        pack_message(replace(left, layers=[odd, *left.layers[1:]]))
