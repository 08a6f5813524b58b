"""Writes that survive a crash: a file replaced in one step, lines added to a log, a folder held by one process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

from harness.errors import HarnessError

LOCK_FILE = ".lock"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
log = logging.getLogger("harness")


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old or the new one. Raises HarnessError when it cannot be written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise write_error(path, error) from None


def append(path: Path, data: bytes, *, intact: int | None = None) -> None:
    """Add whole lines to a log, which is made where it is missing; on return they are on the disk.

    Raises HarnessError when they cannot be written; the log is then as before. intact: its records, for the message.
    """
    try:
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, data)
            except BaseException:  # an interrupt too must not leave half a line
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                    os.fsync(descriptor)
                raise
        finally:
            os.close(descriptor)
        if new:
            _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error, intact=intact) from None


def whole_lines(path: Path) -> tuple[list[bytes], int]:
    """Whole lines of a log, and the bytes after the last of them. A missing file is empty."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from None
    return lines, len(rest)


def cut(path: Path, unfinished: int) -> None:
    """Take an unfinished last line of that many bytes off a log, with a warning. Raises HarnessError when it cannot."""
    if unfinished:
        log.warning("%s: cut off an unfinished last line (%d bytes); what it held is run again", path, unfinished)
        try:
            os.truncate(path, path.stat().st_size - unfinished)
        except OSError as error:
            raise write_error(path, error) from None


def _write_all(descriptor: int, data: bytes) -> None:
    """One write; the rest of it where the system took only a part. Then to the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make new and replaced names durable; some file systems cannot sync a folder, and the data is safe without."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def lock_folder(folder: Path) -> int:
    """Descriptor of the held lock file; `unlock_folder`, or the end of the process, releases the folder.

    Raises HarnessError, with the process if known, when another one holds it.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        number = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        owner = f"process {number}" if number.isdecimal() else "another process"
        raise HarnessError(f"{folder} is being written by {owner}; wait for it or stop it") from None
    with suppress(OSError):  # the number is a courtesy; a full disk is reported by the first real write
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def unlock_folder(descriptor: int) -> None:
    with suppress(OSError):
        os.ftruncate(descriptor, 0)  # the next holder may not write its number
    os.close(descriptor)


def write_error(path: Path, error: OSError, *, intact: int | None = None) -> HarnessError:
    kept = "" if intact is None else f"; {intact} records are intact"
    if error.errno in FULL:
        return HarnessError(f"disk full while writing {path}{kept}; free space and repeat the command")
    return HarnessError(f"cannot write {path}: {error.strerror or error}{kept}; fix this and repeat the command")
