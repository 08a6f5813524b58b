"""The files of a board: its name checked, its folder made, every file replaced in one step."""

import re
from collections.abc import Mapping
from pathlib import Path

from harness.errors import HarnessError
from harness.records.run_folder import write_text


def write_files(folder: Path, name: str, texts: Mapping[str, str]) -> list[Path]:
    """Write `<name>.<ending>` into `folder` for each ending of `texts`, and return the paths.

    Raises HarnessError when `name` is no file name, the folder cannot be made, or a file cannot be written.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise HarnessError(f"board name {name!r} is no file name; use letters, digits, '.', '-' and '_'")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot create {folder}: {error.strerror}; choose another folder") from None
    paths = {folder / f"{name}.{ending}": text for ending, text in texts.items()}
    for path, text in paths.items():
        write_text(path, text)
    return list(paths)
