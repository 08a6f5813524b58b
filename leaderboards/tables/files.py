"""The files of a board: its name checked, its folder made, every file replaced in one step."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from harness.errors import HarnessError, shown
from harness.records.run_folder import write_text

NAME_BYTES = 120
"""Of a board's name; endings and those of temporary files come behind it."""


def checked_name(name: str) -> str:
    """The name of a board, if files can have it. Raises HarnessError."""
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > NAME_BYTES:
        most = f"at most {NAME_BYTES} of letters, digits, '.', '-' and '_'"
        raise HarnessError(f"board name {shown(name)} is no file name; use {most}")
    return name


def checked_place(folder: Path, name: str) -> Path:
    """The folder for the files of a board of that name, made where it is missing.

    Raises HarnessError when `name` is no file name, the folder cannot be made, or nothing can be written there.
    """
    checked_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        told = error.strerror if isinstance(error, OSError) else error
        raise HarnessError(f"cannot create {shown(str(folder))}: {told}; choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HarnessError(f"cannot write into {shown(str(folder))}; choose another folder")
    return folder


def write_files(folder: Path, name: str, texts: Mapping[str, str]) -> list[Path]:
    """Write `<name>.<ending>` into `folder` for each ending of `texts`, and return the paths.

    Raises HarnessError when `name` is no file name, the folder cannot be made, or a file cannot be written.
    """
    folder = checked_place(Path(folder), name)
    paths = {folder / f"{name}.{ending}": text for ending, text in texts.items()}
    for path, text in paths.items():
        write_text(path, text)
    return list(paths)
