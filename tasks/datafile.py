"""Files of data sets: in the user's folder, or where `harness data fetch` put them, checked against its lock file.

The lock lies beside the files: {"repo", "commit", "files": {name: {"sha256", "rows"}}, ...}, written by
harness/plan/datasets.py. LongBench's rows are checked here too.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.base import DataOptions, TaskError

LOCK = "fetched.json"
FIELDS = {"input": str, "context": str, "answers": list, "length": int, "dataset": str, "language": str}
"""Of a row of LongBench."""


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
    found = [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
    if found:
        return found[0]
    wanted, where = " or ".join(patterns), " or ".join(map(str, folders))
    if given is None:
        raise TaskError(f"no {wanted} in {where}; delete that folder and run `harness data fetch {name}`")
    raise TaskError(f"no {wanted} in {where}; put it there, or run `harness data fetch {name} --to {given}`")


def read_file(path: Path) -> FileBytes:
    """Return the bytes of a data file.

    Raises TaskError when it or its lock cannot be read, or it is not the one that was fetched.
    """
    lock = path.with_name(LOCK)
    try:
        blob = path.read_bytes()
        fetched = json.loads(lock.read_text(encoding="utf-8")) if lock.is_file() else {"files": {}}
        expected = fetched["files"].get(path.name, {}).get("sha256")
        source, commit = ("data_dir", None) if expected is None else (fetched["repo"], fetched["commit"])
    except OSError as error:
        raise TaskError(f"{path.name} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TaskError(f"{lock} is damaged; delete its folder and run `harness data fetch` again") from None
    found = hashlib.sha256(blob).hexdigest()
    if expected not in (None, found):
        raise TaskError(
            f"{path.name} has sha256 {found[:12]}, {str(expected)[:12]} was fetched; "
            f"delete {path.parent} and run `harness data fetch` again"
        )
    return FileBytes(blob, found, source, commit)


def longbench_rows(blob: bytes, file: str, *, with_classes: bool) -> list[dict[str, Any]]:
    """Return the rows of one of LongBench's files, each with a unique `_id`, `line-7` where the file has none.

    with_classes: rows must name their classes. Raises TaskError when there are no rows, a field is missing or of
    another type, or two rows share an id.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in json_lines(blob, file):
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


def json_lines(blob: bytes, file: str) -> Iterator[tuple[int, Any]]:
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
