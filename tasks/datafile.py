"""Files of data sets: in the user's folder, or where `harness data fetch` put them, checked against its lock file.

The lock lies beside the files: {"repo", "commit", "files": {name: {"sha256", "rows"}}, ...},
written by harness/data.py.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.base import DataOptions, TaskError

LOCK = "fetched.json"


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
    fetch` puts it. Nothing is downloaded.

    Raises:
        TaskError: it is not there; the message names the command that fetches it.
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

    Raises:
        TaskError: the file or its lock cannot be read, or the file is not the one that was fetched.
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
