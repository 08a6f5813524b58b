"""What was found in an archive: its checks, and how they are told."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.errors import line_of
from harness.records.record import RunManifest
from harness.submission.archive import Index

REASONS = 5  # of each check that are kept


@dataclass
class Check:
    """A kind of check: how many things it looked at and refused, and the first `REASONS` of its reasons."""

    name: str
    counted: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)

    def see(self, problems: Iterable[str], where: str = "", *, counted: int = 1) -> bool:
        """Note the problems of one thing, and return whether there was none; several count once."""
        found = [f"{where}: {problem}" if where else problem for problem in problems]
        self.counted += counted
        self.refused += bool(found)
        self.reasons += found[: REASONS - len(self.reasons)]
        return not found


@dataclass
class Verification:
    """What was found in an archive.

    manifest: None where it is damaged. statuses: records by status. lines: of the records that were read. stopped: why
    that were not all. notes: what could not be looked at.
    """

    index: Index
    manifest: RunManifest | None = None
    checks: list[Check] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    stopped: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> int:
        return sum(check.refused for check in self.checks)

    @property
    def ok(self) -> bool:
        return not self.refused

    @property
    def reasons(self) -> list[str]:
        return [line_of(ascii(f"{check.name}: {reason}")[1:-1]) for check in self.checks for reason in check.reasons]

    def check(self, name: str) -> Check:
        """Begin a check of that name."""
        self.checks.append(Check(name))
        return self.checks[-1]

    def told(self) -> list[str]:
        """Write the verdict: what it is of, a table of checks, what was not looked at, OK or REFUSED with reasons."""
        lines = []
        if (m := self.manifest) is not None:
            model = f"{m.spec.model.name} {m.spec.model.dtype}"
            what = f"{model}, {m.samples} samples x {m.cells} cells, commit {m.git_commit}"
            lines.append(ascii(f"run {m.run_id}: {what}, packed by version {self.index.harness}")[1:-1])
        lines.append(f"{'check':<12} {'counted':>9} {'refused':>9}")
        lines += [f"{check.name:<12} {check.counted:>9,} {check.refused:>9,}" for check in self.checks]
        others = [f"{count} {status}" for status, count in sorted(self.statuses.items()) if status != "ok"]
        lines += [f"without a score: {', '.join(others)}"] if others else []
        lines += [f"not looked at: {note}" for note in self.notes]
        stopped = f"; {self.stopped}" if self.stopped else ""
        lines.append(f"{self.lines:,} lines of records read{stopped}")
        if not self.ok:
            return [*lines, "REFUSED", *(f"  {reason}" for reason in self.reasons)]
        part = " Cells may be missing: it is a part of a run." if self.index.partial else ""
        return [*lines, f"OK: the scores follow from the predictions. Seconds are as reported.{part}"]
