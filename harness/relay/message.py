"""A compressed prompt as bytes: safetensors, whose metadata say in JSON what the tensors are.

Tensors of one type are one after the other in one tensor, so that a message is the cache and a short description. What
holds the cache is made again by name and fields: a class that is no known one of `KV` or `Codes`, or a field that JSON
cannot hold, is refused. Nothing of a message is run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harness.engine.compress import Compressed
from harness.engine.packed import Coded, Packed
from harness.engine.states import States
from harness.errors import HarnessError
from methods.base import KV
from methods.codes import Codes, Coding

FORM = "relay"
"""Where the description stands in a file's metadata."""
PLAIN = (bool, int, float, str, type(None))
Rotate = Callable[[Tensor, int], Tensor]
OWN_KV = {own.name for own in fields(KV)}


@dataclass
class _Out:
    """Tensors to be sent, by type, with their shapes in order."""

    parts: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    shapes: list[list[Any]] = field(default_factory=list)

    def add(self, *tensors: Tensor) -> None:
        for x in tensors:
            kind = str(x.dtype).removeprefix("torch.")
            self.parts[kind].append(x.detach().cpu().reshape(-1))
            self.shapes.append([kind, *x.shape])


@dataclass
class Received:
    """A prompt as it came: a KV for each layer, and the rest of what `Compressed` holds of it."""

    kvs: list[KV]
    tokens: int
    budget: int
    states: States


def pack_message(left: Compressed) -> bytes:
    """Write a compressed prompt. Raises HarnessError for one whose method holds what no message can."""
    out = _Out()
    layers = [_packed(x, out) if isinstance(x, Packed) else _kv(x, out) for x in left.layers]
    states = left.states[left.tokens].tensors
    out.add(*states.values())
    form = {"tokens": left.tokens, "budget": left.budget, "layers": layers, "states": list(states)}
    told = json.dumps({**form, "tensors": out.shapes}, separators=(",", ":"))
    return save({kind: torch.cat(parts) for kind, parts in out.parts.items()}, {FORM: told})


def read_message(data: bytes, device: torch.device, rotate: Rotate | None, *, zeroed: bool = False) -> Received:
    """Read a message that `pack_message` wrote.

    rotate: of the receiver's model. zeroed: with zeros for all that is stored but positions, as a control. Raises
    HarnessError for bytes that are no such message.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        form = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][FORM])
        tensors = _tensors(load(data), form["tensors"], device, zeroed=zeroed)
        kvs = [_read(layer, tensors, rotate) for layer in form["layers"]]
        states = {(int(at), str(name), int(number)): next(tensors) for at, name, number in form["states"]}
        return Received(kvs, int(form["tokens"]), int(form["budget"]), States(states))
    except (ValueError, KeyError, TypeError, RuntimeError, StopIteration, SafetensorError) as error:
        if isinstance(error, HarnessError):
            raise
        raise HarnessError(f"a message of {len(data)} bytes holds no cache ({type(error).__name__}: {error})") from None


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


def _packed(layer: Packed, out: _Out) -> dict[str, Any]:
    implied = layer.positions is None
    form: dict[str, Any] = {"sizes": layer.sizes, "plain": layer.plain, "first": layer.first, "implied": implied}
    out.add(layer.keys, layer.values, *(() if layer.positions is None else (layer.positions,)))
    if layer.coded is not None:
        form["coded"] = _coded(layer.coded, out)
    for name in ("side", "beside"):
        if held := getattr(layer, name):
            form[name] = list(held)
            out.add(*held.values())
    return form


def _coded(coded: Coded, out: _Out) -> dict[str, Any]:
    parts = []
    for heads, codes in coded.parts:
        tensors = codes.tensors()
        out.add(*tensors)
        parts.append([heads, type(codes).__name__, _described(codes.coding), len(tensors)])
    return {"counts": coded.counts, "parts": parts}


def _kv(kv: KV, out: _Out) -> dict[str, Any]:
    """A KV that was left as its method made it. A class of its own has fields of JSON, or the model's rotation."""
    if (parts := getattr(kv, "parts", ())) and parts:
        raise HarnessError(f"{type(kv).__name__} holds codes beside side data, which cannot be sent; leave it out")
    form: dict[str, Any] = {"kv": type(kv).__name__, "extra": list(kv.extra)}
    out.add(kv.keys, kv.values, kv.positions, *kv.extra.values())
    own = {one.name: getattr(kv, one.name) for one in fields(kv) if one.name not in OWN_KV}
    form["rotates"] = [name for name, value in own.items() if callable(value)]
    form["state"] = {name: value for name, value in own.items() if not callable(value)}
    if set(form["rotates"]) - {"rotate"} or not all(isinstance(value, PLAIN) for value in form["state"].values()):
        raise HarnessError(f"{type(kv).__name__} holds more than numbers and tensors, and cannot be sent; leave it out")
    return form


def _read(form: Mapping[str, Any], tensors: Iterator[Tensor], rotate: Rotate | None) -> KV:
    if "kv" in form:
        kind, held = _known(KV, form["kv"]), [next(tensors) for _ in range(3)]
        extra = {name: next(tensors) for name in form["extra"]}
        made: KV = kind(*held, extra, **form["state"], **dict.fromkeys(form["rotates"], rotate))
        return made
    keys, values = next(tensors), next(tensors)
    positions = None if form["implied"] else next(tensors)
    coded = _coded_of(form["coded"], tensors) if "coded" in form else None
    side, beside = ({name: next(tensors) for name in form.get(own, ())} for own in ("side", "beside"))
    sizes, plain = tuple(form["sizes"]), tuple(form["plain"])
    return Packed(keys, values, positions, sizes, plain, form["first"], coded, side, beside).kv()


def _coded_of(form: Mapping[str, Any], tensors: Iterator[Tensor]) -> Coded:
    parts = []
    for heads, kind, coding, count in form["parts"]:
        held = [next(tensors) for _ in range(count)]
        parts.append((tuple(heads), _known(Codes, kind)(_made(Coding, coding), *held)))
    return Coded(tuple(form["counts"]), tuple(parts))


def _described(value: Any) -> dict[str, Any]:
    """A frozen dataclass as its class's name and its fields."""
    told = {own.name: getattr(value, own.name) for own in fields(value) if own.init}
    if not all(isinstance(own, PLAIN) for own in told.values()):
        raise HarnessError(f"{type(value).__name__} holds more than numbers, and cannot be sent; leave it out")
    return {"is": type(value).__name__, **told}


def _made(base: type, form: Mapping[str, Any]) -> Any:
    return _known(base, form["is"])(**{name: value for name, value in form.items() if name != "is"})


def _known(base: type, name: str) -> Any:
    """The class of that name among `base` and what derives from it here."""
    found, left = {}, [base]
    while left:
        one = left.pop()
        found[one.__name__] = one
        left += one.__subclasses__()
    if name not in found or not is_dataclass(found[name]):
        raise HarnessError(f"a message holds a {name}, which is no {base.__name__} known here; load its method")
    return found[name]
