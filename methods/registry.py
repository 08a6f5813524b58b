"""METHODS: every known method by name, with its presets. A file of this folder registers itself with `@method`.

Importing this module imports neither torch nor a method; `load_methods` and `make_policy` do.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from traceback import format_exception_only
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

import methods
from methods.budget import PolicyError, quoted
from methods.catalogue import Entry, catalogue
from methods.label import ARTEFACT, NAME, TUNED, MethodLabel, nearest

if TYPE_CHECKING:
    from methods.base import KVPolicy

MOST_NUMBER = 10_000_000
"""Of a parameter, which counts tokens or weighs; either way it changes nothing more from there on."""
LOG = logging.getLogger(__name__)
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
        return next(iter((self.policy.__doc__ or "").strip().splitlines()), "")

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


class Prefix(NamedTuple):
    """What stands behind `prefix:`. make: its policy, from the rest and the overrides.

    spelling: the one way to write the rest; it imports no torch and raises PolicyError for what cannot be read.
    """

    make: Callable[[str, Mapping[str, Any]], KVPolicy]
    spelling: Callable[[str], str]


PREFIXES: dict[str, Prefix] = {}


def method(
    name: str,
    *,
    paper: str,
    code: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[P], P]:
    """Register a frozen dataclass as a method.

    Raises PolicyError for a name that no label can hold, one that is taken by another class, and for another class than
    a dataclass.
    """

    def register(policy: P) -> P:
        known, own = METHODS.get(name), f"{policy.__module__}.{policy.__qualname__}"
        if not NAME.fullmatch(name):
            raise PolicyError(f"{quoted(name)} is no name of a method; take letters, digits and _")
        if name in catalogue().entries and not own.startswith("methods."):
            raise PolicyError(f"method {name!r} of {own} has a name that is taken; choose another")
        if known is not None and known.policy.__qualname__ != policy.__qualname__:
            raise PolicyError(f"method {name!r} is registered twice: {known.policy.__module__}, {policy.__module__}")
        if not is_dataclass(policy):
            raise PolicyError(f"method {name!r}: {own} is no dataclass; put @dataclass(frozen=True) below @method")
        METHODS[name] = Method(name, policy, paper, dict(presets or {}), code, dict(choices or {}))
        return policy

    return register


def register_prefix(prefix: str, known: Prefix) -> None:
    """Let `known` make the policies of labels `prefix:rest`. Raises PolicyError for a prefix that is taken."""
    if PREFIXES.setdefault(prefix, known).make.__module__ != known.make.__module__:
        raise PolicyError(f"prefix {quoted(prefix)} is taken; choose another")


def load_methods() -> Mapping[str, Method]:
    """Import every module of this folder and every plugin of the entry-point group, and return METHODS."""
    _load_folder()
    load_plugins()
    return METHODS


@cache
def _load_folder() -> None:
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"methods.{module.name}")


def load_plugins() -> None:
    """Import what other distributions bring. One that fails, however it does, is named in a warning and left out."""
    for plugin in _plugins():
        _load_plugin(plugin)


@cache
def _plugins() -> tuple[EntryPoint, ...]:
    try:
        return tuple(entry_points(group=ENTRY_POINT_GROUP))
    except Exception as error:  # metadata of any distribution that cannot be read
        LOG.warning("no plug-in can be looked for: %s", quoted(str(error)))
        return ()


@cache
def _load_plugin(plugin: EntryPoint) -> None:
    registries: tuple[dict[str, Any], ...] = (METHODS, PREFIXES)
    before = [set(registry) for registry in registries]
    try:
        plugin.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a stranger's module does, SystemExit among it
        for registry, own in zip(registries, before, strict=True):
            for name in registry.keys() - own:
                del registry[name]
        where, what = f"{plugin.name} = {plugin.value}", format_exception_only(error)[-1].strip()
        LOG.warning("plug-in %s is left out, it cannot be loaded: %s", quoted(where), quoted(what))


def known_methods() -> Mapping[str, Described]:
    """Every method, those of this folder imported only where a file does not tell; what plugins bring is imported."""
    found = catalogue()
    if not found.whole:
        return load_methods()
    load_plugins()
    return {**found.entries, **METHODS}


def check_method(label: MethodLabel, changed: Mapping[str, Any]) -> None:
    """Raise PolicyError for an unknown name, prefix, preset or parameter, with the nearest known one.

    It imports nothing for a method of this folder; an unknown name may be a plugin's, so these are imported first.
    """
    if label.prefix is None:
        known: Mapping[str, Described] = {**catalogue().entries, **METHODS}
        _check_label(label, changed, known if label.name in known else known_methods())
    elif label.prefix not in PREFIXES:
        raise PolicyError(f"unknown prefix {quoted(label.prefix)}{nearest(label.prefix, PREFIXES)}")


def read_label(text: str) -> MethodLabel:
    """A label, spelled the one way that its prefix has, so that two spellings are one method.

    Raises PolicyError for one that cannot be read, or an unknown prefix.
    """
    label = MethodLabel.parse(text)
    if label.prefix is None:
        return label
    check_method(label, {})
    spelled = PREFIXES[label.prefix].spelling(str(label).partition(":")[2])
    return MethodLabel.parse(f"{label.prefix}:{spelled}")


def _check_label(label: MethodLabel, changed: Mapping[str, Any], known: Mapping[str, Described]) -> None:
    if label.name not in known:
        raise PolicyError(f"unknown method {quoted(label.name)}{nearest(label.name, known)}")
    if label.params:
        key, value = label.params[0]
        asked = f"ask for {label.asked} with {key}={quoted(value)[1:-1]} set"
        raise PolicyError(f"method {quoted(str(label))} is as records name it; {asked}")
    method = known[label.name]
    presets = preset_names(method)
    if label.preset and label.preset not in presets:
        raise PolicyError(f"unknown preset {quoted(label.preset)} of {label.name}{nearest(label.preset, presets)}")
    parameters = (ARTEFACT,) if label.preset == TUNED else method.parameters
    for key in changed:
        if key not in parameters:
            raise PolicyError(f"{label.asked} has no parameter {quoted(key)}{nearest(key, parameters)}")


def preset_names(method: Described) -> tuple[str, ...]:
    """Name what may stand behind the `@` of a method."""
    return (*method.presets, *([TUNED] if method.tunable else []))


def make_policy(label: str | MethodLabel, overrides: Mapping[str, Any] | None = None) -> KVPolicy:
    """The policy of `name`, `name@preset` or `prefix:rest`, with single parameters overridden.

    Raises PolicyError for an unknown name, preset or parameter, with the nearest known one.
    """
    asked, changed = read_label(label) if isinstance(label, str) else label, overrides or {}
    check_method(asked, changed)
    if asked.prefix is not None:
        return PREFIXES[asked.prefix].make(str(asked).partition(":")[2], changed)
    entry = load_methods()[asked.name]
    if asked.preset == TUNED:
        from methods.tuned.policy import Tuned

        _check_types(Tuned, changed)
        return Tuned(asked.name, **changed)
    _check_types(entry.policy, changed)
    try:
        return entry.policy(**{**entry.presets.get(asked.preset, {}), **changed})
    except PolicyError:
        raise
    except (TypeError, ValueError) as error:
        what = f"method {quoted(str(asked))} refuses its parameters: {quoted(str(error))[1:-1]}"
        raise PolicyError(f"{what}; see docs/method-reference.md") from None


def _check_types(policy: type[KVPolicy], changed: Mapping[str, Any]) -> None:
    """Raises PolicyError when a changed parameter is not of the type that the policy declares."""
    hints = get_type_hints(policy)
    for key, value in changed.items():
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            told = f"{policy.__name__}.{key}={quoted(value)}: {error.errors()[0]['msg']}"
            raise PolicyError(f"{told}; see docs/method-reference.md") from None
        if isinstance(value, int | float) and not abs(value) <= MOST_NUMBER:
            raise PolicyError(f"{policy.__name__}.{key}={quoted(value)} is out of range; give at most {MOST_NUMBER:,}")
