"""METHODS: every known method by name, with its presets. A file of this folder registers itself with `@method`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, TypeVar

import methods
from methods.base import KVPolicy, PolicyError

ENTRY_POINT_GROUP = "kv_policy_harness.methods"

P = TypeVar("P", bound=type[KVPolicy])


@dataclass(frozen=True)
class Method:
    """A registered policy class. presets: parameters by preset name; the class defaults are the preset-less form."""

    name: str
    policy: type[KVPolicy]
    paper: str
    presets: Mapping[str, Mapping[str, Any]]

    @property
    def summary(self) -> str:
        return (self.policy.__doc__ or "").strip().splitlines()[0]


METHODS: dict[str, Method] = {}

Resolver = Callable[[str, Mapping[str, Any]], KVPolicy]
PREFIXES: dict[str, Resolver] = {}


def method(name: str, *, paper: str, presets: Mapping[str, Mapping[str, Any]] | None = None) -> Callable[[P], P]:
    """Register a frozen dataclass as a method. Raises PolicyError when the name is taken by another class."""

    def register(policy: P) -> P:
        known = METHODS.get(name)
        if known is not None and known.policy.__qualname__ != policy.__qualname__:
            raise PolicyError(f"method {name!r} is registered twice: {known.policy.__module__}, {policy.__module__}")
        METHODS[name] = Method(name, policy, paper, dict(presets or {}))
        return policy

    return register


def register_prefix(prefix: str, resolver: Resolver) -> None:
    """Let `resolver` make the policies of labels `prefix:rest`, from the rest and the overrides."""
    PREFIXES[prefix] = resolver


def name_of(label: str) -> str:
    """The method of a label: without its preset, or behind a prefix without its parameters."""
    return label.partition("(" if ":" in label else "@")[0]


def load_methods() -> Mapping[str, Method]:
    """Import every module of this folder and every plugin of the entry-point group, and return METHODS."""
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"methods.{module.name}")
    for plugin in entry_points(group=ENTRY_POINT_GROUP):
        plugin.load()
    return METHODS


def make_policy(label: str, overrides: Mapping[str, Any] | None = None) -> KVPolicy:
    """The policy of `name`, `name@preset` or `prefix:rest`, with single parameters overridden.

    Raises PolicyError for an unknown name, preset or parameter, with the nearest known one.
    """
    prefix, colon, rest = label.partition(":")
    if colon:
        if prefix not in PREFIXES:
            raise PolicyError(f"unknown prefix {prefix!r}{nearest(prefix, PREFIXES)}")
        return PREFIXES[prefix](rest, overrides or {})
    known = load_methods()
    name, _, preset = label.partition("@")
    if name not in known:
        raise PolicyError(f"unknown method {name!r}{nearest(name, known)}")
    entry = known[name]
    if preset and preset not in entry.presets:
        raise PolicyError(f"unknown preset {preset!r} of {name}{nearest(preset, entry.presets)}")
    params = {**entry.presets.get(preset, {}), **(overrides or {})}
    allowed = {f.name for f in fields(entry.policy)}  # type: ignore[arg-type]
    for key in params:
        if key not in allowed:
            raise PolicyError(f"{name} has no parameter {key!r}{nearest(key, allowed)}")
    return entry.policy(**params)


def nearest(word: str, known: Any) -> str:
    """`; did you mean 'x'? known: a, b` for an error line."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} known: {', '.join(names) or 'none'}"
