"""What a press's label says, such as `AdaKVPress(SnapKVPress(window_size=8), alpha_safeguard=0.1)`: no code.

Read with `ast` and never evaluated: a name or a call is a press, its arguments are presses, lists of them or literals.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from methods.budget import PolicyError, quoted

MOST_CHARS, DEPTH = 400, 30
"""Of a label: more than a press of presses with all its parameters needs."""
ADVICE = "write kvpress:NAME or kvpress:NAME(parameter=literal, ...)"
REMEDY = "in an environment of its own: pip install kvpress==0.5.5 'transformers>=5.2,<5.3'"


@dataclass(frozen=True)
class PressCall:
    """A press by name. args, keywords: literals, presses, or lists of presses."""

    name: str
    args: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        given = [_text(value) for value in self.args] + [f"{key}={_text(value)}" for key, value in self.keywords]
        return f"{self.name}({', '.join(given)})" if given else self.name


def spelling(text: str) -> str:
    """The one way to write a press. Raises PolicyError when it cannot be read, or kvpress cannot be used here."""
    call = parse_press(text)
    usable_version()
    return str(call)


def usable_version() -> str:
    """The installed kvpress's version. Raises PolicyError, with the remedy, where it is missing or does not fit."""
    try:
        found = version("kvpress")
    except PackageNotFoundError:
        raise PolicyError(f"kvpress is not installed; {REMEDY}") from None
    used = version("transformers")
    if tuple(map(int, used.split(".")[:2])) >= (5, 3):
        raise PolicyError(f"kvpress {found} needs transformers < 5.3, this is {used}; {REMEDY}")
    return found


def parse_press(text: str) -> PressCall:
    """Return the press that `text` names. Raises PolicyError when it is anything but names and literals, or long."""
    if len(text) > MOST_CHARS:
        raise PolicyError(f"a press of {len(text):,} characters is no press, {MOST_CHARS} are most; {ADVICE}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if _deeper(node, DEPTH):
            raise ValueError
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise PolicyError(f"press {quoted(text)} cannot be read; {ADVICE}") from None
    if not isinstance(node, ast.Name | ast.Call):
        raise PolicyError(f"press {quoted(text)} is not a name or a call; {ADVICE}")
    return _press(node, text)


def _press(node: ast.Name | ast.Call, text: str) -> PressCall:
    if isinstance(node, ast.Name):
        return PressCall(node.id)
    if not isinstance(node.func, ast.Name):
        raise PolicyError(f"press {quoted(text)} calls something that is not a name; {ADVICE}")
    keywords = []
    for keyword in node.keywords:
        if keyword.arg is None:
            raise PolicyError(f"press {quoted(text)} unpacks a dictionary; {ADVICE}")
        keywords.append((keyword.arg, _value(keyword.value, text)))
    if len({name for name, _ in keywords}) < len(keywords):
        raise PolicyError(f"press {node.func.id} has a parameter twice; {ADVICE}")
    return PressCall(node.func.id, tuple(_value(arg, text) for arg in node.args), tuple(keywords))


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name | ast.Call):
        return _press(node, text)
    if isinstance(node, ast.List):
        return [_value(item, text) for item in node.elts]
    try:
        value = ast.literal_eval(node)
        if _text(value) != _text(ast.literal_eval(_text(value))):  # 1e999 has no spelling
            raise ValueError
        return value
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        what = f"press {quoted(text)}: {quoted(ast.unparse(node))}"
        raise PolicyError(f"{what} is not a literal or a press; {ADVICE}") from None


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value) if isinstance(value, PressCall) else repr(value)


def _deeper(node: ast.AST, most: int) -> bool:
    """Whether nodes stand more than `most` deep in one another; level by level, without recursion."""
    level = [node]
    for _ in range(most):
        level = [child for parent in level for child in ast.iter_child_nodes(parent)]
    return bool(level)
