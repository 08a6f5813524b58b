"""A compressed prompt as bytes and back: equal to the bit, of hardly more bytes than it holds, and refused else."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load, save

from harness.engine.compress import Compressed, compress, weighed
from harness.engine.packed import tensors_of
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.records.relayed import HEADER_BYTES, LAYER_BYTES
from harness.relay.message import (
    FORM,
    constants_of,
    pack_message,
    pack_tensors,
    read_message,
    read_tensors,
)
from methods.base import KV
from methods.low_rank import Basis, LowRank
from methods.registry import make_policy
from methods.stored import CodedKV, encode

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
    "quest",
    "turboquant",
    "fp8@snapkv",
    "gvote",
)
TOKENS = 200


@dataclass
class OddKV(KV):
    """Holds what no message can."""

    other: object = None


@pytest.fixture(scope="module")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model))


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
    with pytest.raises(HarnessError, match="holds a 'Popen', which is no cache known here"):
        read_message(changed(data, "ReassignedKV", "Popen"), CPU, model.rotate)


def test_what_no_message_can_hold_is_refused(model: AttachedModel) -> None:
    left = left_by("fullkv", model)
    kv = left.kvs[0]
    for held in ({1}, model, print):
        odd = OddKV(kv.keys, kv.values, kv.positions, {}, held)
        with pytest.raises(HarnessError, match=f"a cache that holds a {type(held).__name__} cannot be sent"):
            pack_message(replace(left, layers=[odd, *left.layers[1:]]))


def low_rank(model: AttachedModel) -> Compressed:
    """A prompt as latents of both heads together in the first layer, and of each by itself in the others."""
    left = left_by("fullkv", model)

    def coding(width: int, heads: int) -> LowRank:
        bases = [Basis.orthonormal(torch.rand(width), torch.linalg.qr(torch.rand(width, 6))[0]) for _ in range(2)]
        return LowRank(*bases, heads=heads, turn=model.rotate)

    codings = [(coding(32, 2),) * 2, *((coding(16, 1), coding(16, 1)) for _ in left.layers[1:])]
    kvs = [encode(kv, own) for kv, own in zip(left.kvs, codings, strict=True)]
    return replace(left, **weighed(kvs, model.compressible, left.tokens, left.states[left.tokens]))


def test_constants_of_the_model_are_no_part_of_a_message(model: AttachedModel) -> None:
    left = low_rank(model)
    data, constants = pack_message(left), constants_of(left)
    assert len(constants) == 7 * 2 * 3  # codings, keys and values, mean and both ways
    assert left.kv_bytes < len(data) <= left.stored_bytes + HEADER_BYTES + LAYER_BYTES * model.layers
    named = read_tensors(pack_tensors(constants), CPU)
    assert named.keys() == constants.keys()
    came = read_message(data, CPU, model.rotate, constants=named)
    for number, (kv, own) in enumerate(zip(came.kvs, left.kvs, strict=True)):
        assert isinstance(kv, CodedKV) and all(map(torch.equal, kv.load(), own.load()))
        assert len(set(kv.codings)) == len({codes.coding for _, codes in kv.parts}) == (2 if number else 1)
    del named[next(iter(named))]
    with pytest.raises(HarnessError, match="needs the constants [0-9a-f]{12}, which never came"):
        read_message(data, CPU, model.rotate, constants=named)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.int8])
def test_every_type_of_number_is_sent(kind: torch.dtype) -> None:
    numbers = {
        "a": torch.arange(7).view(1, 7).to(kind),
        "b": torch.zeros(0, 3, dtype=kind),
        "c": torch.ones(2).to(kind),
    }
    for name, own in read_tensors(pack_tensors(numbers), CPU).items():
        assert own.dtype == kind and own.shape == numbers[name].shape
        assert torch.equal(own.float(), numbers[name].float())
