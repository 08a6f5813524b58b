"""How files that people hand in are read: plain ones only, of a bounded size, as JSON or TOML of a bounded depth.

Whatever is wrong with one is a HarnessError of one line, which names the file. What JSON says is then checked by a
pydantic model, and by nothing behind it.
"""

import json
import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from harness.errors import HarnessError, shown

AnyModel = TypeVar("AnyModel", bound=BaseModel)
MOST_BYTES = 64 << 20
DEPTH = 64
"""Lists and tables within one another."""
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))


def read_plain(path: Path, *, most: int = MOST_BYTES, remedy: str = "give another file") -> bytes:
    """Read a plain file whole; a pipe or a socket is refused and never waited for. most: bytes.

    Raises HarnessError for a file that is none, is too large, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        told = error.strerror if isinstance(error, OSError) else error
        raise HarnessError(f"cannot read {shown(str(path))}: {told}; {remedy}") from None
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_size > most:
        os.close(descriptor)
        kind = next((name for is_kind, name in KINDS if is_kind(state.st_mode)), f"of {state.st_size:,} bytes")
        raise HarnessError(f"{shown(str(path))} is {kind}, not a plain file of at most {most:,} bytes; {remedy}")
    with open(descriptor, "rb") as file:
        return file.read(most)


def parse_json(data: bytes | str, *, where: str, remedy: str = "give another file") -> Any:
    """The value of a JSON text, whose numbers are finite. Raises HarnessError, naming `where`, for anything else."""
    return _parsed("JSON", lambda: json.loads(data, parse_constant=_no_number), where=where, remedy=remedy)


def parse_toml(data: bytes, *, where: str, remedy: str = "give another file") -> dict[str, Any]:
    """The table of a TOML text. Raises HarnessError, naming `where`, for anything else."""
    found: dict[str, Any] = _parsed("TOML", lambda: tomllib.loads(data.decode()), where=where, remedy=remedy)
    return found


def of_json(model: type[AnyModel], data: bytes, *, where: str, remedy: str = "give another file") -> AnyModel:
    """A model from its JSON text. Raises HarnessError, naming `where`, the first field refused and its value."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise refused(error, where=where, remedy=remedy) from None


def refused(error: ValidationError, *, where: str, remedy: str) -> HarnessError:
    """The first thing that a model refuses of a file, as an error of one line."""
    first = error.errors()[0]
    field = shown(".".join(map(str, first["loc"])))[1:-1]
    given = "" if first["type"] in ("json_invalid", "missing") else f", got {shown(first['input'])}"
    return HarnessError(f"{where} is damaged: {field + ': ' if field else ''}{first['msg']}{given}; {remedy}")


def _parsed(kind: str, parse: Callable[[], Any], *, where: str, remedy: str) -> Any:
    try:
        found = parse()
    except RecursionError:
        raise HarnessError(f"{where} is nested more than {DEPTH} deep; {remedy}") from None
    except ValueError as error:  # not the kind, not UTF-8, or a number of thousands of digits
        raise HarnessError(f"{where} is not {kind}: {error}; {remedy}") from None
    if _deeper(found, DEPTH):
        raise HarnessError(f"{where} is nested more than {DEPTH} deep; {remedy}")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and tables stand more than `most` deep in one another; level by level, without recursion."""
    level = [value]
    for _ in range(most + 1):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return bool(level)
