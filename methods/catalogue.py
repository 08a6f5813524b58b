"""The methods of this folder as their files tell of them, read with `ast`: nothing is imported, torch least of all.

An error line and `harness list methods` need names, presets, parameters and summaries and nothing else, and importing
torch for them takes seconds. What a file computes rather than states is left to the registry, which imports it.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
BASES = ("KVPolicy", "LayerPolicy", "EvictionPolicy")
"""Classes that bring a method no parameter: no dataclasses."""


class Entry(NamedTuple):
    """A method as its file states it.

    summary: first line of the docstring. parameters: in the order of the class. tunable: it states choices.
    """

    name: str
    paper: str
    summary: str
    presets: Mapping[str, Mapping[str, Any]]
    parameters: tuple[str, ...]
    tunable: bool


class Catalogue(NamedTuple):
    """entries: by name. whole: whether every file was understood, so that no other method can be in the folder."""

    entries: dict[str, Entry]
    whole: bool


class _Unclear(Exception):
    """A file computes what the catalogue needs."""


@cache
def catalogue(folder: Path = FOLDER) -> Catalogue:
    """What the files below a folder register with `@method`. Raises OSError for a file that cannot be read."""
    entries, whole = {}, True
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        text = path.read_text(encoding="utf-8")
        if "@method(" not in text:
            continue
        try:
            entries.update({entry.name: entry for entry in _entries(ast.parse(text), folder)})
        except (_Unclear, SyntaxError, ValueError):
            whole = False
    return Catalogue(entries, whole)


def _entries(module: ast.Module, folder: Path) -> Iterator[Entry]:
    """Raises _Unclear, or ValueError of `literal_eval`, for what is not stated literally."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    for node, call in ((own, call) for own in classes for call in own.decorator_list):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "method":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            presets = _literal(given["presets"], module, folder) if "presets" in given else {}
            name, paper = _literal(call.args[0], module, folder), _literal(given["paper"], module, folder)
            summary = (ast.get_docstring(node) or "").splitlines()[0]
            yield Entry(name, paper, summary, presets, tuple(_parameters(node, module, folder)), "choices" in given)


def _literal(node: ast.expr, module: ast.Module, folder: Path) -> Any:
    """A literal, or the one that a name stands for."""
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    stated, _ = _stated(node.id, module, folder)
    if isinstance(stated, ast.Assign | ast.AnnAssign) and stated.value is not None:
        return ast.literal_eval(stated.value)
    raise _Unclear


def _stated(name: str, module: ast.Module, folder: Path) -> tuple[ast.stmt, ast.Module]:
    """The statement that gives a name its meaning, in this module or in the one of the folder it is imported from."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node, module
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            path = folder / f"{str(node.module).removeprefix('methods.').replace('.', '/')}.py"
            if path.is_file():
                return _stated(name, ast.parse(path.read_text(encoding="utf-8")), folder)
    raise _Unclear


def _parameters(policy: ast.ClassDef, module: ast.Module, folder: Path) -> dict[str, None]:
    """Names of the dataclass's fields that can be given, after those of its bases, the last of them first."""
    found: dict[str, None] = {}
    for base in reversed(policy.bases):
        if not isinstance(base, ast.Name):
            raise _Unclear
        if base.id not in BASES:
            stated, home = _stated(base.id, module, folder)
            if not isinstance(stated, ast.ClassDef):
                raise _Unclear
            found |= _parameters(stated, home, folder)
    fields = [node for node in policy.body if isinstance(node, ast.AnnAssign)]
    given = [node for node in fields if not ast.unparse(node.annotation).startswith("ClassVar")]
    return found | {ast.unparse(node.target): None for node in given if not _unset(node.value)}


def _unset(value: ast.expr | None) -> bool:
    """Whether a field is `field(init=False)`, no parameter."""
    given = value.keywords if isinstance(value, ast.Call) else []
    return any(keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in given)
