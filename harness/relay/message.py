"""A compressed prompt as bytes: safetensors, whose metadata say in JSON what the tensors are (`harness.relay.forms`).

Tensors of one type are one after the other in one tensor, so that a message is the cache and a short description.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harness.engine.compress import Compressed
from harness.engine.packed import Packed
from harness.engine.states import States
from harness.errors import HarnessError
from harness.relay.forms import Making, Rotate, Telling
from methods.base import KV

FORM = "relay"
"""Where the description stands in a file's metadata."""


@dataclass
class Received:
    """A prompt as it came: a KV for each layer, and the rest of what `Compressed` holds of it."""

    kvs: list[KV]
    tokens: int
    budget: int
    states: States


def constants_of(left: Compressed) -> dict[str, Tensor]:
    """Constants of the model that a prompt's codes are read with, by digest. Raises as `pack_message` does."""
    telling = Telling()
    for layer in left.layers:
        telling.tell(layer)
    return telling.constants


def pack_message(left: Compressed) -> bytes:
    """Write a compressed prompt. Raises HarnessError for one whose method holds what no message can."""
    telling, states = Telling(), left.states[left.tokens].tensors
    layers = [telling.tell(layer) for layer in left.layers]
    tensors = [*telling.tensors, *states.values()]
    told = {"tokens": left.tokens, "budget": left.budget, "codings": telling.told, "layers": layers}
    return _saved(tensors, {**told, "states": list(states)})


def pack_tensors(named: Mapping[str, Tensor]) -> bytes:
    """Write constants for `read_tensors`; nothing for none."""
    return _saved(list(named.values()), {"names": list(named)}) if named else b""


def read_tensors(data: bytes, device: torch.device) -> dict[str, Tensor]:
    form, tensors = _loaded(data, device)
    return dict(zip(form["names"], tensors, strict=True))


def read_message(
    data: bytes,
    device: torch.device,
    rotate: Rotate | None,
    *,
    constants: Mapping[str, Tensor] | None = None,
    zeroed: bool = False,
) -> Received:
    """Read a message that `pack_message` wrote.

    rotate: of the receiver's model. constants: by digest. zeroed: with zeros for all that is stored but positions, as a
    control. Raises HarnessError for bytes that are no such message.
    """
    try:
        form, tensors = _loaded(data, device, zeroed=zeroed)
        making = Making(tensors, constants or {}, rotate)
        making.codings += [making.make(own) for own in form["codings"]]
        layers = [making.make(own) for own in form["layers"]]
        kvs = [layer.kv() if isinstance(layer, Packed) else layer for layer in layers]
        states = {(int(at), str(name), int(number)): next(tensors) for at, name, number in form["states"]}
        return Received(kvs, int(form["tokens"]), int(form["budget"]), States(states))
    except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, StopIteration, SafetensorError) as error:
        if isinstance(error, HarnessError):
            raise
        raise HarnessError(f"a message of {len(data)} bytes holds no cache ({type(error).__name__}: {error})") from None


def _saved(tensors: Sequence[Tensor], form: Mapping[str, Any]) -> bytes:
    """Tensors, those of one type as one, and what `form` and their shapes say."""
    parts, shapes = defaultdict[str, list[Tensor]](list), list[list[Any]]()
    for x in tensors:
        kind = str(x.dtype).removeprefix("torch.")
        parts[kind].append(x.detach().cpu().reshape(-1).view(torch.uint8))
        shapes.append([kind, *x.shape])
    told = json.dumps({**form, "tensors": shapes}, separators=(",", ":"))
    return save({kind: torch.cat(own).view(getattr(torch, kind)) for kind, own in parts.items()}, {FORM: told})


def _loaded(data: bytes, device: torch.device, *, zeroed: bool = False) -> tuple[Any, Iterator[Tensor]]:
    size = int.from_bytes(data[:8], "little")
    form = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][FORM])
    return form, _tensors(load(data), form["tensors"], device, zeroed=zeroed)


def _tensors(
    whole: Mapping[str, Tensor], shapes: Sequence[Sequence[Any]], device: torch.device, *, zeroed: bool
) -> Iterator[Tensor]:
    """Each tensor in order, in a storage of its own."""
    at = dict.fromkeys(whole, 0)
    for kind, *shape in shapes:
        size = prod(shape)
        own = whole[kind][at[kind] : at[kind] + size].view(shape).to(device, copy=True)
        at[kind] += size
        yield own.zero_() if zeroed and own.dtype != torch.int32 else own
