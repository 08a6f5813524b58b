"""Fault campaign of the sequential run: killed at random points, and out of disk, until the same command ends it.

Each seeded run draws one to three faults: SIGKILL, SIGTERM, or a limit on the size of its files, at which the system
refuses a write half-way as a full disk does. The same command then goes on with it. In the end its records must be
those of an undisturbed run, timings apart: none lost, none twice, and the files of its board the same to the byte. A
session that is told to end, or finds no room, must say so in one line. Sessions are forks of a process that has
imported everything, so that most of their time is the run's. `make faults` runs it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.cli import main
from tests.measured import keep
from tests.tiny_run import TIMES, key, only

RUN = (
    *("--model", "tiny", "--dtype", "float32", "--device", "cpu", "--methods", "fullkv,snapkv,h2o"),
    *("--observe", "0", "--tasks", "stdlib", "--budgets", "32,64", "--lengths", "1024"),
    *("--limit", "12", "--max-new-tokens", "8"),
)
BOARD = ("board.csv", "board.tasks.csv", "board.summary.csv")
KINDS = ("kill", "term", "disk")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
EXITS = {"kill": {-signal.SIGKILL}, "term": {128 + signal.SIGTERM}, "disk": {2}}
SESSIONS = 8
LEAST_BYTES = 2048  # of a file under a limit
FREE = resource.RLIM_INFINITY


@dataclass
class Session:
    """One process with the command. code: that it ended with, negative for a signal. said: on stderr."""

    code: int
    said: str
    seconds: float
    first_s: float  # until the first line, or the end

    def faults(self, kind: str) -> list[str]:
        """What of its end is not as promised."""
        if "Traceback" in self.said:
            return [f"{kind}: a traceback"]
        if self.code in EXITS[kind] and kind != "kill":
            last = self.said.rstrip("\n").split("\n")[-1]
            return [] if last.startswith("harness: ") else [f"{kind}: ends with {last!r}"]
        return [] if self.code in {0, *EXITS[kind]} else [f"{kind}: exit code {self.code}"]


def session(folder: Path, *, most: int = FREE, number: int = 0, after_s: float = 0.0, lines: int = 0) -> Session:
    """Run the command in a fork. most: bytes of a file. number: a signal, sent so long after it has so many lines."""
    read, write = os.pipe()
    start, first_s = time.monotonic(), 0.0
    child = os.fork()
    if child == 0:
        _run(folder, write, most)
    os.close(write)
    ended, due = 0, None
    while not ended:
        now, has = time.monotonic() - start, written(folder)
        if not first_s and has:
            first_s = now
        if due is None and has >= lines:
            due = now + after_s
        if number and due is not None and now >= due:
            os.kill(child, number)
            number = 0
        time.sleep(0.005)
        ended, state = os.waitpid(child, os.WNOHANG)
    seconds = time.monotonic() - start
    with open(read, "rb") as said:
        told = said.read().decode(errors="replace")
    return Session(os.waitstatus_to_exitcode(state), told, seconds, first_s or seconds)


def _run(folder: Path, said: int, most: int) -> None:
    """The whole of a fork's life."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)  # not those of a test
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, FREE))  # Python ignores the signal for it
        code = main(["run", *RUN, "--threads", "1", "--out", str(folder)])
    finally:
        os._exit(code)


@dataclass
class Trial:
    """One disturbed run. faults: each of a kind, at a share of what is left; see `moment`. wrong: what differs."""

    seed: int
    faults: list[tuple[str, float]]
    struck: list[str] = field(default_factory=list)
    sessions: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def draw(cls, seed: int) -> Trial:
        dice = random.Random(f"alone {seed}")
        return cls(seed, [(dice.choice(KINDS), dice.random()) for _ in range(dice.randint(1, 3))])

    def line(self) -> str:
        faults = ", ".join(f"{kind} at {at:.0%}" for kind, at in self.faults)
        end, struck = ", ".join(self.wrong) or "ok", len(self.struck)
        return f"{self.seed:>4}  {end}; {struck} struck of {faults}; {self.sessions} sessions, {self.seconds:.0f} s"


def disturbed(trial: Trial, folder: Path, expected: Path, whole: Session) -> None:
    """Run one trial and write into it what came out. whole: the undisturbed session."""
    total, size = len(lines(expected)), (expected / "records.jsonl").stat().st_size
    start = time.monotonic()
    for kind, at in trial.faults:
        if kind == "disk":
            here = sum(path.stat().st_size for path in folder.glob("*/records.jsonl"))
            found = session(folder, most=max(LEAST_BYTES, int(here + at * (size - here))))
        else:
            after_s, at_line = moment(at, written(folder), total, whole)
            found = session(folder, number=SIGNALS[kind], after_s=after_s, lines=at_line)
        trial.sessions += 1
        trial.wrong += found.faults(kind)
        if found.code == 0:  # it came too late
            break
        trial.struck.append(kind)
    while found.code and trial.sessions < SESSIONS:
        found = session(folder)
        trial.sessions += 1
    trial.seconds = time.monotonic() - start
    trial.wrong += [f"exit code {found.code} in the end"] if found.code else differences(only(folder), expected)


def moment(at: float, here: int, total: int, whole: Session) -> tuple[float, int]:
    """When to strike: in the first fifth of `at` while the session starts, then by lines, and a little after one."""
    if at < 0.2:
        return 5 * at * whole.first_s, 0
    share = (at - 0.2) / 0.8
    return share * 1000 % 1 * 0.2, here + int(share * (total - here))


def lines(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's records."""
    *found, _ = (folder / "records.jsonl").read_bytes().split(b"\n")
    return [json.loads(line) for line in found]


def written(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/records.jsonl"))


def differences(found: Path, expected: Path) -> list[str]:
    """Of records and boards. A record that failed and was run again has two lines, of which the last counts."""
    own = lines(found)
    wanted, kept = ({key(record): _what(record) for record in some} for some in (lines(expected), own))
    ended = Counter(key(record) for record in own if record["status"] in ("ok", "skipped"))
    boards = [(found / name, (expected / name).read_bytes()) for name in BOARD]
    status = json.loads((found / "run.json").read_bytes())["status"]
    counts = {
        "records lost": len(wanted.keys() - kept.keys()),
        "twice": sum(count - 1 for count in ended.values()),
        "different": sum(kept[name] != record for name, record in wanted.items() if name in kept),
        "boards not equal": sum(not path.is_file() or path.read_bytes() != data for path, data in boards),
        f"manifest {status}": int(status != "finished"),
        "files left over": len(list(found.glob("*.part"))),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def _what(record: dict[str, Any]) -> dict[str, Any]:
    """What came out, not how it was made."""
    return {name: value for name, value in record.items() if name not in {*TIMES, "accelerator"}}


def campaign(seeds: Sequence[int], folder: Path, keep_file: Path | None = None) -> list[Trial]:
    """Run the trials of `seeds` one after another; prints and keeps a line for each."""
    whole, trials = session(folder / "undisturbed"), []
    if whole.code:
        raise RuntimeError(f"the undisturbed run in {folder} failed: {whole.said[-500:]}")
    expected = only(folder / "undisturbed")
    for seed in seeds:
        trial, own = Trial.draw(seed), folder / f"alone-{seed}"
        disturbed(trial, own, expected, whole)
        print(trial.line(), flush=True)
        trials.append(trial)
        if keep_file is not None:
            result = {"struck": trial.struck, "sessions": trial.sessions, "wrong": trial.wrong}
            keep(keep_file, "make faults", {f"alone {seed}": result})
        if not trial.wrong:
            shutil.rmtree(own)
    return trials
