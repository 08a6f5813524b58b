"""Files that a parameter names: where they lie, as people write it, and what is in them. No torch."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from methods.budget import PolicyError, quoted

MOST_BYTES = 1 << 30
M = TypeVar("M", bound=BaseModel)
PATH_BYTES, NAME_BYTES = 4095, 255


def place_of(text: str) -> Path:
    """The path that a text stands for, `~` and `$VARIABLE` filled in. Raises PolicyError for one that no file has."""
    full = text if "\0" in text else os.path.expandvars(os.path.expanduser(text))
    data = full.encode(errors="replace")
    if not text.strip() or "\0" in full or len(data) > PATH_BYTES or max(map(len, data.split(b"/"))) > NAME_BYTES:
        raise PolicyError(f"{quoted(text)} is no path of a file; give another one")
    return Path(full)


def read_plain(path: Path, *, remedy: str, most: int = MOST_BYTES) -> bytes:
    """Read a plain file whole; a pipe is refused and never waited for. Raises PolicyError where that cannot be."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode) or state.st_size > most:
                raise PolicyError(f"{quoted(str(path))} is no plain file of at most {most:,} bytes; {remedy}")
            return file.read(most)
    except OSError as error:
        raise PolicyError(f"{quoted(str(path))} cannot be read: {error.strerror}; {remedy}") from None


def stamps_of(folder: Path, names: Iterable[str], *, what: str, advice: str) -> tuple[int, ...]:
    """When each of these files of a folder last changed. Raises PolicyError: there is no `what` there, and `advice`."""
    try:
        return tuple((folder / name).stat().st_mtime_ns for name in names)
    except OSError as error:
        where = f"{quoted(str(error.filename or folder))}: {error.strerror}"
        raise PolicyError(f"no {what} at {where}; {advice}") from None


def parsed(kind: type[M], text: bytes, path: Path, *, remedy: str) -> M:
    """What the JSON text of a file says. Raises PolicyError: the first field refused, why, and its value."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = quoted(".".join(map(str, first["loc"])) or "file")[1:-1]
    what = f"{field}: {first['msg']}, got {quoted(first['input'])}"
    raise PolicyError(f"{quoted(str(path))} is damaged: {what}; {remedy}")
