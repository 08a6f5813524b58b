"""What code makes the numbers of a run: a hash of the source of every method, and one of what they all run on.

A method's source is its class's module, those of the classes it stands on, and what these import, as far as that is no
installed package: the methods of this project, and the plug-in's own files. A commit tells nothing of a plug-in, and
not all where files were changed since.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from harness.machine import PACKAGES
from harness.plan.sweep import PlannedCell
from methods.base import KVPolicy

HARNESS = "the harness"
"""Stands for what every method runs on, beside the labels of methods."""
ROOMS = ("harness.engine.", "harness.models.", "harness.plan.", "harness.relay.", "harness.run.", "methods.", "tasks.")
START = ("harness.run.sequential", "harness.engine.engine")
INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
NOT_OWN = sys.stdlib_module_names.union({"harness", "tasks"}, (package.replace("-", "_") for package in PACKAGES))

Inside = Callable[[str], bool]


def sources(cells: Iterable[PlannedCell]) -> dict[str, str]:
    """Sha256 by method label, and that of the harness under `HARNESS`."""
    policies = {cell.method: cell.cell.policy for cell in cells}
    return {label: _of_policy(policy) for label, policy in policies.items()} | {HARNESS: _of_harness()}


def _of_policy(policy: KVPolicy) -> str:
    modules = frozenset(_modules(policy))
    tops = {name.partition(".")[0] for name in modules} | {"methods"}

    def inside(name: str) -> bool:
        top = name.partition(".")[0]
        return top in tops or (top not in NOT_OWN and not _installed(top))

    return _digest(modules, inside)


def _modules(policy: KVPolicy) -> Iterator[str]:
    """Names of the modules of a policy's class, of its bases, and of the policies that it holds."""
    yield from (kind.__module__ for kind in type(policy).__mro__)
    for field in fields(policy):  # type: ignore[arg-type]
        if isinstance(own := getattr(policy, field.name), KVPolicy):
            yield from _modules(own)


@lru_cache(1)
def _of_harness() -> str:
    tasks = Path(__file__).parents[2] / "tasks"
    names = (".".join(path.relative_to(tasks.parent).with_suffix("").parts) for path in tasks.rglob("*.py"))
    start = (*START, *(name.removesuffix(".__init__") for name in names))
    return _digest(frozenset(start), lambda name: f"{name}.".startswith(ROOMS))


def _digest(start: Iterable[str], inside: Inside) -> str:
    """Sha256 of the files of modules, and of those that they import and that are `inside`."""
    found: dict[str, str] = {}
    names = list(start)
    while names:
        name = names.pop()
        if name not in found and inside(name) and (path := _file(name)) is not None:
            found[name], imported = _read(name, path)
            names += imported
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _installed(top: str) -> bool:
    """Whether a package is one that pip put where all packages are."""
    path = _file(top)
    return path is None or str(path).startswith(INSTALLED)


@lru_cache(None)
def _file(name: str) -> Path | None:
    """Where a module's code is; None for no module, and for one that is in no file."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    if origin is None:
        try:
            spec = find_spec(name)
        except (ImportError, ValueError, AttributeError):  # a name of something in a module
            return None
        origin = None if spec is None else spec.origin
    return Path(origin) if origin and Path(origin).is_file() else None


@lru_cache(None)
def _read(name: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """The sha256 of a module's file, and names of what it may import; read once, as Python reads it."""
    data = path.read_bytes()
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):  # no Python
        return hashlib.sha256(data).hexdigest(), ()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = {target for node in ast.walk(tree) for target in _targets(node, package)}
    return hashlib.sha256(data).hexdigest(), tuple(sorted(found))


def _targets(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
