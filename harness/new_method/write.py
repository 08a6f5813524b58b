"""Files of a new method of some kind, which work at once: inside a checkout of the project, or as a package of its own.

Inside: `methods/NAME.py`, `tests/methods/test_NAME.py` and a line of the changelog. Elsewhere: the folder `kv-NAME`
with the same two files, a `pyproject.toml` that declares the entry point, and a README.
"""

import keyword
import pkgutil
import re
from pathlib import Path

import methods
from harness.errors import HarnessError, shown
from harness.new_method.kinds import KINDS
from harness.new_method.templates import CHANGE, PROJECT, README
from methods.registry import known_methods

NAME = re.compile(r"[a-z][a-z0-9_]*")
NAME_CHARS = 40


def new_method(name: str, *, where: Path, kind: str = "score") -> list[Path]:
    """Write the files of method `name` and return their paths.

    where: a checkout of the project, or the folder that gets the package's folder. kind: one of `KINDS`.
    Raises HarnessError: an unusable or taken name, an unknown kind, or a file that is there already; then nothing is
    written.
    """
    _check_name(name)
    if kind not in KINDS:
        raise HarnessError(f"{shown(kind)} is no kind of a method; give one of {', '.join(KINDS)}")
    own = KINDS[kind]
    dist = f"kv-{name.replace('_', '-')}"
    if (where / "methods" / "registry.py").is_file() and (where / "tests").is_dir():
        root, changes = where, _changes(where / "CHANGELOG.md")
        files = {f"methods/{name}.py": own.method, f"tests/methods/test_{name}.py": own.test}
    else:
        root, changes = where / dist, {}
        files = {"pyproject.toml": PROJECT, "README.md": README}
        files |= {f"kv_{name}.py": own.method, f"tests/test_{name}.py": own.test}
    there = next((root / file for file in files if (root / file).exists()), None)
    if there is not None:
        raise HarnessError(f"{there} is there already and stays; choose another name than {name!r}")
    words = {"@NAME@": name, "@CLASS@": "".join(part.capitalize() for part in name.split("_"))}
    words |= {"@DIST@": dist, "@WHAT@": own.what}
    written = []
    try:
        for file, text in (files | changes).items():
            for mark, word in words.items():
                text = text.replace(mark, word)
            written.append(root / file)
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            written[-1].write_text(text, encoding="utf-8")
    except OSError as error:
        raise HarnessError(f"cannot write {error.filename}: {error.strerror}; choose another folder") from None
    return written


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name) or len(name) > NAME_CHARS:
        advice = f"give an identifier in lower case of at most {NAME_CHARS} letters, such as key_norm"
        raise HarnessError(f"{shown(name)} is no name for a method; {advice}")
    modules = (module.name for module in pkgutil.iter_modules(methods.__path__))
    if name in known_methods() or name in modules:
        what = "a method" if name in known_methods() else f"a module of methods/ ({name}.py)"
        raise HarnessError(f"{name!r} is {what} already; choose another name")


def _changes(path: Path) -> dict[str, str]:
    """The changelog with a line more under its first heading of a version; nothing where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    heading = re.search(r"^## .*\n+", text, re.MULTILINE)
    return {path.name: text[: heading.end()] + CHANGE + text[heading.end() :]} if heading else {}
