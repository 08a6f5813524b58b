"""Where a board's records are: run folders, archives of `harness submit`, and the records of the published boards.

A published board is made from the archives in `leaderboards/published/records/<board>/` and what
`leaderboards/boards/<board>.toml` says of it. A folder that has timings (`bench.json`) is a board of speed; one that
has a memory boundary (`boundary.json`) shows it beside the scores.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

import leaderboards
from harness.errors import HarnessError, one_line, shown
from harness.records.bench_folder import BENCHES, BenchManifest, BenchRecord, load_bench
from harness.records.board_record import BoardRecord
from harness.records.boundary_folder import BOUNDARIES
from harness.records.log_layout import LogLayout
from harness.records.options import Flag, Word
from harness.records.paths import path_of
from harness.records.plain_files import parse_toml, read_plain
from harness.records.record import Record, RunManifest
from harness.records.run_folder import RUNS, find_runs, load_board_records, load_run
from harness.records.spec import Frozen, Sweep
from harness.submission.archive import MANIFEST, RECORDS, open_pack
from methods.label import MethodLabel

HOME = Path(leaderboards.__file__).resolve().parent
BOARDS, PUBLISHED = HOME / "boards", HOME / "published"
KEPT = PUBLISHED / "records"
CONFIG_BYTES = 1 << 20

Run = tuple[RunManifest, Sequence[Record | BoardRecord]]
Bench = tuple[BenchManifest, list[BenchRecord]]


class BoardOptions(Frozen):
    """The `[board]` table of a TOML file: what the run's board adds. No part of what the run is, nor of its id.

    subject: one of the methods, as in `harness board --subject`. frontiers: kinds of methods that the board sets
    against each other, the first against all, and the labels of each. html: its page is published too.
    """

    subject: Word | None = None
    frontiers: Mapping[Word, tuple[Word, ...]] = Field(default_factory=dict)
    html: Flag = False


@dataclass(frozen=True)
class Sources:
    """What a board is made of. boundaries: folders of searches."""

    runs: list[Run] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    boundaries: list[Path] = field(default_factory=list)

    @property
    def manifests(self) -> list[RunManifest]:
        return [manifest for manifest, _ in self.runs]

    @property
    def records(self) -> list[Record | BoardRecord]:
        return [record for _, stored in self.runs for record in stored]


def read_config(name: str) -> dict[str, Any]:
    """Return a TOML file, or the packaged one of that name. Raises HarnessError when there is none or it is damaged."""
    known = sorted(board.stem for board in BOARDS.glob("*.toml"))
    path = BOARDS / f"{name}.toml" if name in known else path_of(name)
    data = read_plain(path, most=CONFIG_BYTES, remedy=f"packaged boards: {', '.join(known)}")
    return parse_toml(data, where=str(path), remedy="mend it")


def board_options(board: Any) -> BoardOptions:
    """Return a `[board]` table, checked. Raises HarnessError for an unknown key."""
    try:
        return TypeAdapter(dict[str, BoardOptions]).validate_python({"board": board})["board"]
    except ValidationError as error:
        raise one_line(error) from None


def published_boards() -> list[str]:
    """Return the names of boards whose records are published; an installed package has no records, so none."""
    return sorted(path.name for path in KEPT.glob("*") if path.is_dir())


def options_of(name: str) -> BoardOptions:
    """Return what the board's TOML file adds; nothing where it has none."""
    return board_options(read_config(name).get("board", {}) if (BOARDS / f"{name}.toml").is_file() else {})


def collect(places: Iterable[Path], *, whole: bool = True) -> Sources:
    """Return everything that is in some folders and archives. whole: run folders' records in full, not in brief.

    Raises HarnessError for a place that holds nothing of the kind, and for damage.
    """
    found = Sources()
    for place in places:
        packs = [place] if place.is_file() else sorted(place.glob("*.zip"))
        edges, timed = _with(place, BOUNDARIES), _with(place, BENCHES)
        found.runs.extend(map(load_pack, packs))
        found.boundaries.extend(edges)
        found.benches.extend(map(load_bench, timed))
        if _with(place, RUNS) or not (packs or edges or timed):
            found.runs.extend(map(load_run if whole else load_board_records, find_runs(place)))
    return found


def one_run(place: Path) -> tuple[RunManifest, list[Record]]:
    """Return the one run in a folder, an archive, or a published board. Raises HarnessError for none or several."""
    if not place.exists():
        if str(place) not in published_boards():
            known = ", ".join(published_boards()) or "none here"
            raise HarnessError(f"no run in {place}: there is no such folder or archive; published boards: {known}")
        place = KEPT / place
    runs = collect([place]).runs
    if len(runs) != 1:
        ids = ", ".join(manifest.run_id for manifest, _ in runs) or "none"
        raise HarnessError(f"{place} holds {len(runs)} runs ({ids}); name the folder or archive of one")
    manifest, records = runs[0]
    return manifest, [record for record in records if isinstance(record, Record)]  # all are: they came whole


def load_pack(path: Path) -> Run:
    """Return the run in an archive of `harness submit`. Raises HarnessError for one that is not sound."""
    with open_pack(path) as pack:
        try:
            manifest = RunManifest.model_validate_json(pack.read(MANIFEST))
        except ValidationError as error:
            raise HarnessError(f"{path.name}: {MANIFEST} is damaged: {error.errors()[0]['msg']}") from None
        given = manifest.spec.run_id
        if other := {manifest.run_id, pack.index.run_id} - {given}:
            edited = f"its id is {shown(other.pop())}, but its contents give {given}"
            raise HarnessError(f"{path.name}: {MANIFEST} was edited: {edited}; ask for another copy")
        return manifest, list(RUNS.parse(path / RECORDS, pack.lines(), owner=manifest.run_id))


def _with(place: Path, layout: LogLayout[Any, Any]) -> list[Path]:
    """Folders at or right below `place` of that layout, in name order."""
    return sorted(path.parent for here in ("", "*/") for path in place.glob(here + layout.manifest_file))


def asked_of(board: Any, sweep: Sweep, *, typed: bool) -> BoardOptions:
    """Return what the board of a run adds, labels as the run has them, with changed parameters.

    board: the `[board]` table. typed: whether the methods come from the command line, which may leave some out.
    """
    from harness.plan.methods import plan_methods

    asked = board_options(board)
    if asked == BoardOptions(html=asked.html):
        return asked
    specs = [spec for spec, _ in plan_methods(sweep)]
    labels = {MethodLabel.parse(spec.label).asked: spec.label for spec in specs}
    budgeted = [MethodLabel.parse(spec.label).asked for spec in specs if spec.budgeted]
    wanted = asked.subject
    if wanted is not None and wanted not in budgeted and not typed:
        told = f"is no method with a budget of this run: {', '.join(budgeted)}"
        raise HarnessError(f"board.subject {shown(wanted)} {told}")
    for kind, own in asked.frontiers.items():
        if (missing := [label for label in own if label not in labels]) and not typed:
            told = f"{shown(missing[0])} is no method of this run: {', '.join(labels)}"
            raise HarnessError(f"board.frontiers {shown(kind)}: {told}")
    here = {kind: tuple(labels[x] for x in own if x in labels) for kind, own in asked.frontiers.items()}
    subject = None if wanted is None or wanted not in budgeted else labels[wanted]
    return asked.model_copy(update={"subject": subject, "frontiers": here})
