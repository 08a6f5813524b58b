"""METHODS: every known method by name, with its presets. A file of this folder registers itself with `@method`.

Importing this module imports neither torch nor a method; `load_methods` and `make_policy` do.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import methods
from methods.budget import PolicyError
from methods.catalogue import Entry, catalogue
from methods.label import ARTEFACT, TUNED, MethodLabel, nearest

if TYPE_CHECKING:
    from methods.base import KVPolicy

ENTRY_POINT_GROUP = "kv_policy_harness.methods"

P = TypeVar("P", bound="type[KVPolicy]")


@dataclass(frozen=True)
class Method:
    """A registered policy class. presets: parameters by preset name; the class defaults are the preset-less form.

    code: its authors' repository and the commit that was read. choices: values of its parameters that `harness tune`
    tries, in every combination that is not `redundant`.
    """

    name: str
    policy: type[KVPolicy]
    paper: str
    presets: Mapping[str, Mapping[str, Any]]
    code: str = ""
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (self.policy.__doc__ or "").strip().splitlines()[0]

    @property
    def tunable(self) -> bool:
        """Whether `harness tune` has something to try."""
        return bool(self.choices)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that can be given, in the order of the class."""
        return tuple(field.name for field in fields(self.policy) if field.init)  # type: ignore[arg-type]


Described = Entry | Method
"""A method as its file tells of it, or as it was imported."""
METHODS: dict[str, Method] = {}

Resolver = Callable[[str, Mapping[str, Any]], "KVPolicy"]
PREFIXES: dict[str, Resolver] = {}


def method(
    name: str,
    *,
    paper: str,
    code: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[P], P]:
    """Register a frozen dataclass as a method. Raises PolicyError when the name is taken by another class."""

    def register(policy: P) -> P:
        known = METHODS.get(name)
        if known is not None and known.policy.__qualname__ != policy.__qualname__:
            raise PolicyError(f"method {name!r} is registered twice: {known.policy.__module__}, {policy.__module__}")
        METHODS[name] = Method(name, policy, paper, dict(presets or {}), code, dict(choices or {}))
        return policy

    return register


def register_prefix(prefix: str, resolver: Resolver) -> None:
    """Let `resolver` make the policies of labels `prefix:rest`, from the rest and the overrides."""
    PREFIXES[prefix] = resolver


def load_methods() -> Mapping[str, Method]:
    """Import every module of this folder and every plugin of the entry-point group, and return METHODS."""
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"methods.{module.name}")
    for plugin in entry_points(group=ENTRY_POINT_GROUP):
        plugin.load()
    return METHODS


def known_methods() -> Mapping[str, Described]:
    """Every method, imported only where its file does not tell: where a plugin brings methods, or computes presets."""
    found = catalogue()
    if not found.whole or entry_points(group=ENTRY_POINT_GROUP):
        return load_methods()
    return {**found.entries, **METHODS}


def check_method(label: MethodLabel, changed: Mapping[str, Any]) -> None:
    """Raise PolicyError for an unknown name, prefix, preset or parameter, with the nearest known one.

    It imports nothing for a method of this folder; an unknown name may be a plugin's, so these are imported first.
    """
    if label.prefix is None:
        known: Mapping[str, Described] = {**catalogue().entries, **METHODS}
        _check_label(label, changed, known if label.name in known else known_methods())
    elif label.prefix not in PREFIXES:
        raise PolicyError(f"unknown prefix {label.prefix!r}{nearest(label.prefix, PREFIXES)}")


def _check_label(label: MethodLabel, changed: Mapping[str, Any], known: Mapping[str, Described]) -> None:
    if label.name not in known:
        raise PolicyError(f"unknown method {label.name!r}{nearest(label.name, known)}")
    if label.params:
        key, value = label.params[0]
        raise PolicyError(f"method '{label}' is as records name it; ask for {label.asked} with {key}={value} set")
    method = known[label.name]
    presets = preset_names(method)
    if label.preset and label.preset not in presets:
        raise PolicyError(f"unknown preset {label.preset!r} of {label.name}{nearest(label.preset, presets)}")
    parameters = (ARTEFACT,) if label.preset == TUNED else method.parameters
    for key in changed:
        if key not in parameters:
            raise PolicyError(f"{label.asked} has no parameter {key!r}{nearest(key, parameters)}")


def preset_names(method: Described) -> tuple[str, ...]:
    """Name what may stand behind the `@` of a method."""
    return (*method.presets, *([TUNED] if method.tunable else []))


def make_policy(label: str | MethodLabel, overrides: Mapping[str, Any] | None = None) -> KVPolicy:
    """The policy of `name`, `name@preset` or `prefix:rest`, with single parameters overridden.

    Raises PolicyError for an unknown name, preset or parameter, with the nearest known one.
    """
    asked, changed = MethodLabel.parse(label) if isinstance(label, str) else label, overrides or {}
    check_method(asked, changed)
    if asked.prefix is not None:
        return PREFIXES[asked.prefix](str(asked).partition(":")[2], changed)
    entry = load_methods()[asked.name]
    if asked.preset == TUNED:
        from methods.tuned.policy import Tuned

        return Tuned(asked.name, **changed)
    return entry.policy(**{**entry.presets.get(asked.preset, {}), **changed})
