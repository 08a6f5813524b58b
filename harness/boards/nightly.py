"""`harness nightly`: a board's sweep in a folder of its own, judged by the last published night, then published.

The same sweep has the same run id every night, so each night has its own folder below `out`, named by its start. An
unfinished one is gone on with, but only by the same commit, packages and machine: records of two of them are no night.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.boards.sources import BoardOptions
from harness.machine import git_commit, machine, versions
from harness.records.atomic_files import check_place
from harness.records.run_folder import RUNS, load_run, write_text
from harness.records.spec import Sweep
from harness.run.sequential import run_sweep
from leaderboards.nights.compare import NightlyOptions
from leaderboards.nights.files import machine_id, night_of, read_nights, write_night
from leaderboards.nights.report import NightVerdict, judge, to_markdown
from leaderboards.stats.aggregate import aggregate
from leaderboards.tables.board import write_board
from leaderboards.tables.files import checked_name

if TYPE_CHECKING:
    from harness.run.fan import FanOut

REPORT = ".report.md"


@dataclass(frozen=True)
class Nightly:
    """What a night is. board: its name, which its files and stored nights bear. fan: None for this process alone.

    accept: publish it whatever came out. asked: what its board adds. resume_anyway: as in `run_sweep`.
    """

    board: str
    sweep: Sweep
    options: NightlyOptions
    baseline: Path
    out: Path
    fan: FanOut | None = None
    asked: BoardOptions = field(default_factory=BoardOptions)
    accept: bool = False
    resume_anyway: bool = False


def run_nightly(ask: Nightly, *, command: Sequence[str]) -> tuple[NightVerdict, list[Path]]:
    """Run a night, judge it, write its board and report; what came out, and the files written.

    They are written beside the run, and into the folder of published nights unless something regressed.
    Raises HarnessError for bad input, a damaged stored night, or a folder that cannot be written.
    """
    stored = read_nights(ask.baseline, checked_name(ask.board))  # a night is long: what is damaged is found before it
    check_place(ask.out)
    about = machine() | ({} if ask.fan is None else {"torch_threads": ask.fan.threads})
    folder, anyway = night_folder(ask.out, about), ask.resume_anyway
    if ask.fan is None:
        manifest, records = load_run(run_sweep(ask.sweep, root=folder, command=command, resume_anyway=anyway))
        here = machine_id(manifest.machine, platform.node())
    else:
        from harness.run.driver import run_fanout

        manifest, records = load_run(run_fanout(ask.sweep, ask.fan, root=folder, command=command, resume_anyway=anyway))
        here = ""
    night = night_of(records, manifest, board=ask.board, version=ask.options.version, machine_id=here)
    verdict = judge(night, stored, ask.options, accept=ask.accept)
    asked = ask.asked
    tables = aggregate(records, manifests=[manifest], subject=asked.subject, frontiers=asked.frontiers)
    written = list[Path]()
    for place in [ask.baseline, folder] if verdict.publishable else [folder]:
        written += write_board(tables, place, night.about.name, manifests=[manifest])
        written += write_night(night, place)
        written.append(place / f"{night.about.name}{REPORT}")
        write_text(written[-1], to_markdown(verdict))  # beside the run it is the last file: the night is over
    return verdict, written


def night_folder(out: Path, here: Mapping[str, Any] | None = None) -> Path:
    """Return where tonight's run goes: the newest night below `out` if it can be gone on with, else a new name.

    here: the machine as a run's manifest describes it.
    """
    nights = sorted(path for path in out.glob("????-??-??T??????Z*") if path.is_dir())
    if nights and _unfinished(nights[-1], here or machine()):
        print(f"going on with the unfinished night {nights[-1]}", file=sys.stderr)
        return nights[-1]
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    places = (out / (f"{name}-{n}" if n else name) for n in count())
    return next(place for place in places if not place.exists())


def _unfinished(night: Path, machine_here: Mapping[str, Any]) -> bool:
    """Whether it has runs but no report, all of them of the code, packages and machine that are here now."""
    commit = git_commit()
    runs = [RUNS.read_manifest(path.parent) for path in sorted(night.glob("*/run.json"))]
    if not runs or commit is None or commit.endswith("-dirty") or list(night.glob(f"*{REPORT}")):
        return False
    here = (commit, versions(), machine_here)
    return all((run.git_commit, run.versions, run.machine) == here for run in runs)
