"""Rows of LongBench's data files, checked."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.base import TaskError, TaskOptions
from tasks.datafile import find_file, read_file

FIELDS = {"input": str, "context": str, "answers": list, "length": int, "dataset": str, "language": str}


@dataclass(frozen=True)
class DataFile:
    """The checked rows of one data file.

    rows: the official fields; `_id` is always present and unique.
    sha256: of the file's bytes. source: where it came from. revision: the hub's commit, or None for a user's own file.
    """

    rows: list[dict[str, Any]]
    sha256: str
    source: str
    revision: str | None


def load(options: TaskOptions, file: str, *, with_classes: bool) -> DataFile:
    """Return the rows of `file`, from the data folder or from what `harness data fetch longbench` left.

    with_classes: rows must name their classes.

    Raises:
        TaskError: the file is missing, empty, damaged or not the one that was fetched.
    """
    read = read_file(find_file(options, "longbench", file))
    rows = checked(json_lines(read.blob, file), file, with_classes=with_classes)
    return DataFile(rows, read.sha256, read.source, read.revision)


def checked(numbered: Iterable[tuple[int, Any]], file: str, *, with_classes: bool) -> list[dict[str, Any]]:
    """Return the rows with an `_id` each, taken from the line number where the file has none.

    numbered: (line number, row). with_classes: rows must name their classes.

    Raises:
        TaskError: there are no rows, a field is missing or of another type, or two rows share an id.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in numbered:
        fault = _fault(row, file, with_classes=with_classes)
        if fault:
            raise TaskError(f"{file} line {number}: {fault}; the file is damaged or not LongBench's")
        name = str(row.get("_id") or f"line-{number}")
        if name in rows:
            raise TaskError(f"{file} line {number}: _id {name!r} is in the file twice; remove one of the two rows")
        rows[name] = {**row, "_id": name}
    if not rows:
        raise TaskError(f"{file} is empty; fetch LongBench's official file again")
    return list(rows.values())


def json_lines(blob: bytes, file: str) -> Iterable[tuple[int, Any]]:
    """Yield (line number, value) of every line that is not blank. Raises TaskError at a line that is not JSON."""
    for number, line in enumerate(blob.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise TaskError(f"{file} line {number} is not JSON ({error}); the file is damaged") from None


def _fault(row: Any, file: str, *, with_classes: bool) -> str | None:
    if not isinstance(row, dict):
        return f"a row is an object of fields, got {type(row).__name__}"
    for field, kind in FIELDS.items():
        if field not in row:
            return f"field {field!r} is missing"
        if not isinstance(row[field], kind):
            return f"field {field!r} is {type(row[field]).__name__}, expected {kind.__name__}"
    for field in ("answers", "all_classes") if with_classes else ("answers",):
        values = row.get(field)
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            return f"field {field!r} is not a list of texts, got {values!r}"
    name = file.removesuffix(".jsonl")
    if row["dataset"] not in (name, name.removesuffix("_e")):
        return f"a row of {row['dataset']!r} in the file of {name!r}"
    return None if row["context"] or row["length"] == 0 else f"field 'context' is empty, length is {row['length']}"
