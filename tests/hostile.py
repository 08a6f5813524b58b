"""Bad inputs by kind. Each must be taken as it stands, or end in one clear line and soon, or the test fails.

A test marked `hostile` hands every input of its kind to `tried` or `tried_command`. The suite tries some;
`make hostile` tries more and prints how many of each kind there were.
"""

from __future__ import annotations

import contextlib
import io
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from harness.errors import LINE_CHARS, UNSAFE, HarnessError
from methods.budget import PolicyError
from tasks.base import TaskError
from tests.tiny_run import call

REFUSALS = (HarnessError, PolicyError, TaskError)
SECONDS = 2.0
"""Processor time that a refusal may take; a busy machine takes longer by the clock."""
TALLY: Counter[tuple[str, str]] = Counter()
"""How many inputs of a kind were `refused` and how many `taken`."""


def socket_at(path: Path) -> None:
    """A socket's file at `path`. It is bound by its name alone: a path may be longer than an address."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def tried(kind: str, attempt: Callable[[], object], *, may_pass: bool = False) -> str:
    """Hand in one bad input; return the line that refuses it, or an empty one when it was taken.

    may_pass: whether taking it is right too. Any other error than a refusal is the test's own failure.
    """
    begun, line = time.process_time(), ""
    try:
        attempt()
    except REFUSALS as error:
        line = str(error)
        _look_at(line, time.process_time() - begun)
    else:
        assert may_pass, f"{kind}: taken in silence"
    TALLY[kind, "refused" if line else "taken"] += 1
    return line


def tried_command(kind: str, *words: str | Path, may_pass: bool = False) -> str:
    """Run a command in this process; return the one line on its stderr that refuses it, or an empty one."""
    begun, out, err = time.process_time(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call(*words)
    seconds, told = time.process_time() - begun, err.getvalue()
    if code == 2:
        *_, line = told.removesuffix("\n").split("\n")
        assert line.startswith("harness: "), f"{kind}: ends with {line!r}"
        assert "Traceback" not in told
        _look_at(line, seconds)
        TALLY[kind, "refused"] += 1
        return line
    assert may_pass and code in (0, 1), f"{kind}: exit code {code}, {told[-300:]!r}"
    TALLY[kind, "taken"] += 1
    return ""


def _look_at(line: str, seconds: float) -> None:
    assert line.strip(), "refused without a word"
    assert not UNSAFE.search(line), f"raw control codes in {line!r}"
    assert len(line) <= LINE_CHARS + 100, f"{len(line)} characters: {line[:80]!r}..."
    assert seconds < SECONDS, f"{seconds:.1f} s of processor time to refuse: {line}"


def table() -> list[str]:
    """Write the tally, a line for each kind, with the sum."""
    kinds = sorted({kind for kind, _ in TALLY})
    rows = [(kind, TALLY[kind, "refused"], TALLY[kind, "taken"]) for kind in kinds]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return [f"{'kind':<36} {'refused':>8} {'taken':>8}", *(f"{kind:<36} {no:>8,} {yes:>8,}" for kind, no, yes in rows)]
