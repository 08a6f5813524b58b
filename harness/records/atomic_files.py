"""Writes that survive a crash: a file replaced in one step, lines added to a log, a folder held by one process.

The lock is `flock` itself and not `filelock`'s, since whoever is refused is told the number of the process that holds
the folder, which that process writes into the lock file.
"""

import errno
import fcntl
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from harness.errors import HarnessError, shown
from harness.records.plain_files import KINDS

LOCK_FILE = ".lock"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
LONGEST = 64 << 20
"""Bytes of a line of a log."""
log = logging.getLogger("harness")


def open_plain(path: Path, flags: int) -> int:
    """Open a plain file, and nothing else: a pipe or a device is refused, and never waited for.

    Raises HarnessError for what is there and is no plain file, OSError where it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o644)
    except OSError:
        if path.exists():
            _check_plain(path, path.stat().st_mode)
        raise
    try:
        _check_plain(path, os.fstat(descriptor).st_mode)
    except HarnessError:
        os.close(descriptor)
        raise
    return descriptor


def _check_plain(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "a device")
        raise HarnessError(f"{shown(str(path))} is {kind}, not a plain file; move it away")


def check_place(root: Path) -> None:
    """Raise HarnessError where no folder can be made or written at `root`. It leaves nothing, so it can come early."""
    try:
        here = next(path for path in (root, *root.absolute().parents) if path.exists())
        if not here.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        os.rmdir(mkdtemp(prefix=".harness-", dir=here))
    except OSError as error:
        raise write_error(root, error) from None
    except ValueError as error:  # a NUL in the name
        raise HarnessError(f"cannot write {shown(str(root))}: {error}; choose another folder") from None


def write_text(path: Path, text: str) -> None:
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
    except BaseException as error:  # an interrupt too leaves nothing behind
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from None
        raise


def append(path: Path, data: bytes, *, intact: int | None = None) -> None:
    """Add whole lines to a log, which is made where it is missing; on return they are on the disk.

    Raises HarnessError when they cannot be written; the log is then as before. The message then says that `intact`
    records are, where that is given.
    """
    try:
        new = not path.exists()
        descriptor = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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


def whole_lines(path: Path, *, quiet: bool = False) -> Iterator[bytes]:
    """Read the whole lines of a log one by one, without their ends; a missing file has none.

    An unfinished last line is left out, with a warning unless `quiet`. Raises HarnessError when the log cannot be
    read, or a line of it is longer than `LONGEST`.
    """
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), start=1):
                if len(line) == LONGEST:
                    raise HarnessError(f"{path}:{number} is longer than {LONGEST:,} bytes; remove that line")
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif not quiet:
                    log.warning("%s: ignored an unfinished last line (%d bytes)", path, len(line))
    except FileNotFoundError:
        return
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from None


def cut(path: Path) -> None:
    """Take an unfinished last line off a log, with a warning. Raises HarnessError when it cannot be done."""
    try:
        with os.fdopen(open_plain(path, os.O_RDWR), "rb+") as file:
            line = (deque(file, maxlen=1) or [b"\n"])[0]
            if not line.endswith(b"\n"):
                told = "%s: cut off an unfinished last line (%d bytes); what it held is run again"
                log.warning(told, path, len(line))
                file.truncate(file.tell() - len(line))
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_error(path, error) from None


def _write_all(descriptor: int, data: bytes) -> None:
    """In one write where the system takes it in one; on return it is on the disk."""
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
    """Hold a folder and return the descriptor of its lock file; `unlock_folder` or the process's end releases it.

    Raises HarnessError, which names the process if it is known, when another one holds the folder.
    """
    descriptor = open_plain(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
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
    """Say in one line why `path` could not be written, what to do, and that `intact` records are safe."""
    kept = "" if intact is None else f"; {intact} records are intact"
    name = shown(str(path))[1:-1]
    if error.errno in FULL:
        return HarnessError(f"disk full while writing {name}{kept}; free space and repeat the command")
    return HarnessError(f"cannot write {name}: {error.strerror or error}{kept}; fix this and repeat the command")
