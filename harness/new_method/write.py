"""Files of a new method that work at once: inside a checkout of the project, or as a package of its own.

Inside: `methods/NAME.py`, `tests/methods/test_NAME.py` and a line of the changelog. Elsewhere: the folder `kv-NAME`
with the same two files, a `pyproject.toml` that declares the entry point, and a README.
"""

import keyword
import re
from pathlib import Path

from harness.errors import HarnessError
from harness.new_method.templates import CHANGE, METHOD, PROJECT, README, TEST
from methods.registry import load_methods

NAME = re.compile(r"[a-z][a-z0-9_]*")
NAME_CHARS = 40
INTERNAL = ("base", "budget", "codes", "registry", "views")


def new_method(name: str, *, where: Path) -> list[Path]:
    """Write the files of method `name` and return their paths.

    Args:
        name: as in `--methods`: lower case, an identifier.
        where: a checkout of the project, or the folder that gets the package's folder.

    Raises:
        HarnessError: an unusable or taken name, or a file that is there already; then nothing is written.
    """
    _check_name(name)
    inside = (where / "methods" / "registry.py").is_file() and (where / "tests").is_dir()
    files = _inside(name, where) if inside else _package(name, where / f"kv-{name.replace('_', '-')}")
    there = next((path for path in files if path.exists()), None)
    if there is not None:
        raise HarnessError(f"{there} is there already and stays; choose another name than {name!r}")
    changes = _changes(name, where / "CHANGELOG.md") if inside else {}
    try:
        for path, text in (files | changes).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HarnessError(f"cannot write {error.filename}: {error.strerror}; choose another folder") from None
    return [*files, *changes]


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name) or len(name) > NAME_CHARS:
        advice = f"give an identifier in lower case of at most {NAME_CHARS} letters, such as key_norm"
        raise HarnessError(f"{name!r} is no name for a method; {advice}")
    known = load_methods()
    if name in known or name in INTERNAL:
        what = f"a method ({known[name].policy.__module__})" if name in known else f"a module of methods/ ({name}.py)"
        raise HarnessError(f"{name!r} is {what} already; choose another name")


def _inside(name: str, root: Path) -> dict[Path, str]:
    return {
        root / "methods" / f"{name}.py": _filled(METHOD, name),
        root / "tests" / "methods" / f"test_{name}.py": _filled(TEST, name),
    }


def _package(name: str, root: Path) -> dict[Path, str]:
    return {
        root / "pyproject.toml": _filled(PROJECT, name),
        root / "README.md": _filled(README, name),
        root / f"kv_{name}.py": _filled(METHOD, name),
        root / "tests" / f"test_{name}.py": _filled(TEST, name),
    }


def _changes(name: str, path: Path) -> dict[Path, str]:
    """The changelog with a line more under its first heading of a version; nothing where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    heading = re.search(r"^## .*\n+", text, re.MULTILINE)
    if heading is None:
        return {}
    return {path: text[: heading.end()] + _filled(CHANGE, name) + text[heading.end() :]}


def _filled(text: str, name: str) -> str:
    words = "".join(part.capitalize() for part in name.split("_"))
    return text.replace("@NAME@", name).replace("@CLASS@", words).replace("@DIST@", f"kv-{name.replace('_', '-')}")
