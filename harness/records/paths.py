"""Paths as people write them, on the command line and in TOML alike: `~` and `$VARIABLE` are filled in, once."""

import os
import re
from pathlib import Path

from harness.errors import HarnessError, shown

NAME_BYTES, PATH_BYTES = 255, 4095
"""Of one name, and of a whole path, as Linux takes them."""
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def expanded(text: str) -> str:
    """The path that a text stands for. Raises HarnessError for one that no file can have, or an unknown variable."""
    full = os.path.expandvars(os.path.expanduser(text)) if "\0" not in text else text
    if not text.strip() or CONTROL.search(full):
        raise HarnessError(f"{shown(text)} is no path of a file or folder; write one in UTF-8, without control codes")
    data = full.encode()
    if len(data) > PATH_BYTES or max(map(len, data.split(b"/"))) > NAME_BYTES:
        limits = f"at most {PATH_BYTES} bytes, {NAME_BYTES} for each name"
        raise HarnessError(f"the path {shown(text)} is too long for a file or folder; give {limits}")
    left = full.startswith("~") or re.search(r"\$(\w|\{\w)", full)
    if left and not os.path.lexists(full):
        raise HarnessError(f"{shown(text)} names a home or a variable that is not set here; write the folder out")
    return full


def path_of(text: str) -> Path:
    """The same as a path; `./tiny`, which is no name, is then `tiny`."""
    return Path(expanded(text))
