"""Rows of LongBench's data files, checked: from a folder of the user, or from the official data.zip on the hub.

The archive is read because `datasets` >= 4 no longer runs the loading script of THUDM/LongBench.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile, ZipFile

from tasks.base import TaskError

HUB_REPO = "THUDM/LongBench"  # shown as zai-org/LongBench today
HUB_REVISION = "main"  # resolved to a commit when fetched, and recorded
FIELDS = {"input": str, "context": str, "answers": list, "length": int, "dataset": str, "language": str}


@dataclass(frozen=True)
class DataFile:
    """The checked rows of one data file.

    rows: the official fields; `_id` is always present and unique.
    sha256: of the file's bytes. source: where it came from. revision: the hub's commit, or None for a folder.
    """

    rows: list[dict[str, Any]]
    sha256: str
    source: str
    revision: str | None


def from_folder(folder: Path, file: str, *, with_classes: bool) -> DataFile:
    """`file`, or `longbench/file`, in a folder of the user.

    Raises:
        TaskError: the file is missing, empty or damaged; the message names the line.
    """
    path = next((path for path in (folder / file, folder / "longbench" / file) if path.is_file()), None)
    if path is None:
        raise TaskError(f"no {file} in {folder} or {folder / 'longbench'}; put LongBench's official file there")
    blob = path.read_bytes()
    rows = checked(_json_lines(blob, file), file, with_classes=with_classes)
    return DataFile(rows, hashlib.sha256(blob).hexdigest(), "data_dir", None)


def from_hub(file: str, *, with_classes: bool) -> DataFile:
    """`file` of the official data.zip, fetched from the hub once.

    Raises:
        TaskError: the archive cannot be fetched, or is damaged.
    """
    from huggingface_hub import hf_hub_download

    try:
        archive = Path(hf_hub_download(HUB_REPO, "data.zip", repo_type="dataset", revision=HUB_REVISION))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise TaskError(
            f"data.zip of {HUB_REPO} cannot be fetched ({reason}); name a folder that holds {file} as data_dir"
        ) from None
    return from_archive(archive, file, revision=archive.parent.name, with_classes=with_classes)  # snapshots/<commit>/


def from_archive(archive: Path, file: str, *, revision: str, with_classes: bool) -> DataFile:
    """`file` of data.zip, which holds `data/<name>.jsonl` and `data/<name>_e.jsonl`, read through `datasets`.

    Raises:
        TaskError: the archive or its file is missing, empty or damaged.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with ZipFile(archive) as opened, TemporaryDirectory() as folder:
            path = Path(opened.extract(f"data/{file}", folder))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=folder, keep_in_memory=True)
            rows = [dict(row) for row in loaded]
    except (BadZipFile, KeyError, EOFError, zlib.error, DatasetsError) as error:
        raise TaskError(f"{archive.name} cannot be read for {file} ({error}); remove it and fetch it again") from None
    return DataFile(
        checked(enumerate(rows, start=1), file, with_classes=with_classes), digest, f"{HUB_REPO} data.zip", revision
    )


def checked(numbered: Iterable[tuple[int, Any]], file: str, *, with_classes: bool) -> list[dict[str, Any]]:
    """Rows with an `_id` each, taken from the line number where the file has none.

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
    return None if row["context"] else "field 'context' is empty"


def _json_lines(blob: bytes, file: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(blob.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise TaskError(f"{file} line {number} is not JSON ({error}); the file is damaged") from None
