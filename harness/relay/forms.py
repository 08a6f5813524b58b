"""What holds a cache, as JSON and tensors: dataclasses of methods by name and fields, and never a pickle.

What JSON cannot say is a list of a letter and its parts:

    ["x"]             the next tensor            ["t", ...]       a tuple          ["l", ...]  a list
    ["c", name, ...]  a dataclass by its fields  ["k", number]    a coding         ["d", {}]   a dictionary
    ["p", name]       a type of numbers          ["r"]            the model's own rotation of keys

Codings are told once and made once, for many are equal to themselves alone. Their tensors are constants of the model,
which the receiver has, by their digest, and which are no part of a message.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from harness.engine.packed import Coded, Packed
from harness.errors import HarnessError
from methods.base import KV
from methods.stored import Codes, Coding

PLAIN = (bool, int, float, str, type(None))
TURNS = ("turn", "rotate")
"""Fields that hold the rotation of the model at hand."""
OWN = {own.__name__: own for own in (Packed, Coded)}
Rotate = Callable[..., Tensor]


@dataclass
class Telling:
    """Tells values. tensors: of the message, in order. constants: of the model, by digest. codings: in order."""

    tensors: list[Tensor] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    codings: list[Coding] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)

    def tell(self, value: Any) -> Any:
        """Raises HarnessError for what cannot be sent."""
        if isinstance(value, Coding):
            return ["k", self._coding(value)]
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return ["x"]
        return self._tell(value, self.tell)

    def _coding(self, coding: Coding) -> int:
        if coding not in self.codings:
            self.codings.append(coding)
            self.told.append(self._tell(coding, self._constant))
        return self.codings.index(coding)

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return self._tell(value, self._constant)
        digest = digest_of(value)
        self.constants[digest] = value
        return ["x", digest]

    def _tell(self, value: Any, inside: Callable[[Any], Any]) -> Any:
        if type(value) in PLAIN:
            return value
        if isinstance(value, torch.dtype):
            return ["p", str(value).removeprefix("torch.")]
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return ["d", {name: inside(own) for name, own in value.items()}]
        if type(value) in (tuple, list):
            return ["t" if type(value) is tuple else "l", *map(inside, value)]
        name = type(value).__name__
        if is_dataclass(value) or isinstance(value, Coded):
            return ["c", name, *(self._field(value, own, inside) for own in _fields(type(value)))]
        raise HarnessError(f"a cache that holds a {name} cannot be sent; leave its method out")

    def _field(self, holder: Any, name: str, inside: Callable[[Any], Any]) -> Any:
        value = getattr(holder, name)
        return ["r"] if name in TURNS and callable(value) else inside(value)


@dataclass
class Making:
    """Makes what was told. tensors: in order. constants: by digest. rotate: of the model at hand."""

    tensors: Iterator[Tensor]
    constants: Mapping[str, Tensor]
    rotate: Rotate | None
    codings: list[Coding] = field(default_factory=list)

    def make(self, form: Any) -> Any:
        """Raises HarnessError for a class or a constant that is not here, and whatever its parts raise."""
        if not isinstance(form, list):
            return form
        letter, *parts = form
        return self._kinds[letter](*parts)

    @property
    def _kinds(self) -> dict[str, Callable[..., Any]]:
        return {
            "x": self._tensor,
            "t": lambda *parts: tuple(map(self.make, parts)),
            "l": lambda *parts: list(map(self.make, parts)),
            "d": lambda held: {name: self.make(own) for name, own in held.items()},
            "p": lambda name: getattr(torch, name),
            "r": lambda: self.rotate,
            "k": self.codings.__getitem__,
            "c": self._made,
        }

    def _tensor(self, digest: str | None = None) -> Tensor:
        if digest is None:
            return next(self.tensors)
        if digest not in self.constants:
            raise HarnessError(f"a message needs the constants {digest[:12]}, which never came; run it again")
        return self.constants[digest]

    def _made(self, name: str, *values: Any) -> Any:
        kind = known_class(name)
        return kind(**dict(zip(_fields(kind), map(self.make, values), strict=True)))


def known_class(name: str) -> Any:
    """The class of a cache that has that name: of this package, or a dataclass of a module of methods loaded here.

    Raises HarnessError for any other.
    """
    modules, left = set[str](), [KV, Codes, Coding]
    while left:
        one = left.pop()
        modules.add(one.__module__)
        left += one.__subclasses__()
    found = OWN.get(name) or next(
        (vars(sys.modules[own])[name] for own in modules if name in vars(sys.modules[own])), None
    )
    if found is None or not isinstance(found, type) or not (is_dataclass(found) or found is Coded):
        raise HarnessError(f"a message holds a {name!r}, which is no cache known here; load its method")
    return found


def digest_of(tensor: Tensor) -> str:
    """Of a tensor's type, shape and numbers."""
    x = tensor.detach().cpu().contiguous()
    told = f"{x.dtype} {tuple(x.shape)}".encode()
    return hashlib.sha256(told + x.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _fields(kind: Any) -> list[str]:
    """What a class is made of, by name."""
    return list(kind._fields) if issubclass(kind, tuple) else [own.name for own in fields(kind) if own.init]
