"""Files of data sets: in the user's folder, or where `harness data fetch` put them, checked against its lock file.

The lock lies beside the files: {"repo", "commit", "files": {name: {"sha256", "rows"}}, ...}, written by
harness/plan/datasets.py. What a file says enters through `checked`: text that can be written down, numbers in a range.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, TypeAdapter, ValidationError

from tasks.base import DataOptions, TaskError, shown

Shape = TypeVar("Shape")
LOCK = "fetched.json"
MOST_BYTES = 256 << 20
MOST_ROWS = 100_000
MOST_CHARS = 1 << 23
"""Of a text: ten times the longest official context."""
MOST_TEXTS = 10_000
"""Of a row: references, or classes."""


def _whole(text: str) -> str:
    """The text. Raises ValueError for half of a surrogate pair, which JSON can say and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from None
    return text


def _told(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank: an empty prediction would be right")
    return text


def _references(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are not blank: a blank one beside others decides no score, or the wrong one."""
    told = tuple(text for text in texts if text.strip())
    if not told:
        raise ValueError("no reference that is not blank: an empty prediction would be right")
    return told


Text = Annotated[str, Field(max_length=MOST_CHARS), AfterValidator(_whole)]
Reference = Annotated[Text, AfterValidator(_told)]
"""A text that a prediction is scored against."""
References = Annotated[tuple[Text, ...], Field(max_length=MOST_TEXTS), AfterValidator(_references)]
"""Texts of which any will do, at least one of them not blank."""
Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class Part(BaseModel):
    """Base of what is read from a data file. Fields that nobody asks for are passed over."""

    model_config = ConfigDict(frozen=True)


class LockedFile(Part):
    """A fetched file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rows: Count


class Lock(Part):
    """What was fetched. sha256: of what was downloaded. files: by name, no paths."""

    repo: Text
    commit: Text
    revision: Text = ""
    sha256: Text = ""
    files: dict[Annotated[Text, Field(pattern=r"^[^/\\]+$")], LockedFile]


LOCKS = TypeAdapter(Lock)


@dataclass(frozen=True)
class FileBytes:
    """The bytes of a data file and where they came from.

    source: the hub repository, or `data_dir` for a file that no lock names. revision: its commit, or None.
    """

    blob: bytes
    sha256: str
    source: str
    revision: str | None


def find_file(options: DataOptions, name: str, *patterns: str, also: Sequence[str] = ()) -> Path:
    """Return the file of data set `name` that matches a glob pattern, the first one if several do.

    Looked for in the data folder, its folder `name` and its folders `also`; without a data folder, where `harness data
    fetch` puts it. Nothing is downloaded. Raises TaskError, with the command that fetches it, when it is not there.
    """
    given = options.data_dir
    folders = [options.asset(name)] if given is None else [given, *(given / part for part in (name, *also))]
    try:
        found = [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
    except OSError as error:
        raise TaskError(f"cannot look into {shown(str(folders[0]))}: {error.strerror}; name another folder") from None
    if found:
        return found[0]
    if given is not None and not os.path.isdir(given):
        raise TaskError(
            f"data folder {shown(str(given))} is no folder; name the one that holds {' or '.join(patterns)}"
        )
    wanted, where = " or ".join(patterns), " or ".join(map(str, folders))
    if given is None:
        raise TaskError(f"no {wanted} in {where}; delete that folder and run `harness data fetch {name}`")
    raise TaskError(f"no {wanted} in {where}; put it there, or run `harness data fetch {name} --to {given}`")


def read_plain(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a plain file; a pipe is never waited for. most: bytes.

    Raises TaskError for a file that is none, is larger, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        told = error.strerror if isinstance(error, OSError) else error
        raise TaskError(f"cannot read {shown(str(path))}: {told}; give another file") from None
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_size > most:
        os.close(descriptor)
        raise TaskError(f"{shown(str(path))} is no plain file of at most {most:,} bytes; give another file")
    with open(descriptor, "rb") as file:
        return file.read(most)


def read_text(path: Path) -> str:
    """Return the text of a plain file in UTF-8. Raises TaskError for another file."""
    try:
        return read_plain(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{shown(str(path))} is not UTF-8 text ({error}); repair it or take it away") from None


def read_lock(path: Path) -> Lock:
    """Return what a lock file says. Raises TaskError for a damaged one."""
    remedy = "delete its folder and run `harness data fetch` again"
    return checked(LOCKS, _json(read_plain(path), str(path), remedy), where=str(path), remedy=remedy)


def read_file(path: Path) -> FileBytes:
    """Return the bytes of a data file.

    Raises TaskError when it or its lock cannot be read, or it is not the one that was fetched.
    """
    lock_path, lock, blob = path.with_name(LOCK), None, read_plain(path)
    if lock_path.is_file():
        lock = read_lock(lock_path)
    found = hashlib.sha256(blob).hexdigest()
    if lock is None or path.name not in lock.files:
        return FileBytes(blob, found, "data_dir", None)
    expected = lock.files[path.name].sha256
    if expected != found:
        raise TaskError(
            f"{path.name} has sha256 {found[:12]}, {expected[:12]} was fetched; "
            f"delete {path.parent} and run `harness data fetch` again"
        )
    return FileBytes(blob, found, lock.repo, lock.commit)


def json_lines(blob: bytes, file: str) -> Iterator[tuple[str, Any]]:
    """Yield (`file line 7`, value) of every line that is not blank. Raises TaskError at a line that is not JSON."""
    for number, line in enumerate(BytesIO(blob), start=1):
        if number > MOST_ROWS:
            raise TaskError(f"{file} has more than {MOST_ROWS:,} lines; give a smaller file")
        if line.strip():
            where = f"{file} line {number}"
            yield where, _json(line, where, "the file is damaged")


def read_json(shape: TypeAdapter[Shape], blob: bytes, *, where: str, remedy: str) -> Shape:
    """Return what a JSON file holds. Raises TaskError, naming `where` and the field, when it has another shape."""
    return checked(shape, _json(blob, where, remedy), where=where, remedy=remedy)


def checked(shape: TypeAdapter[Shape], value: object, *, where: str, remedy: str) -> Shape:
    """Return a value as `shape` takes it. Raises TaskError for the first thing it refuses, by field and value."""
    try:
        return shape.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        what = f"{first['msg'].removeprefix('Value error, ')}{given}"
        raise TaskError(f"{where} is damaged: {f'field {shown(field)}: ' * bool(field)}{what}; {remedy}") from None


def _json(blob: bytes, where: str, remedy: str) -> Any:
    try:
        return json.loads(blob.decode("utf-8-sig"))
    except RecursionError:
        raise TaskError(f"{where} is nested too deep; {remedy}") from None
    except ValueError as error:
        raise TaskError(f"{where} is not JSON ({error}); {remedy}") from None
