"""A night as it is kept for comparison: `NAME.json` says what it was, `NAME.samples.csv` holds its samples.

Boards hold means, a paired test needs samples. So those of a published night stay beside its board: one line per sample
and cell, sorted, numbers rounded (scores to 6 decimals, NLL to 9), so that equal nights are equal bytes.

Machine class: device kind, the name of the GPU or processor, dtype, and torch's major.minor. These choose the kernels,
so they decide how sums round and which token wins a near tie: within a class a night repeats itself to the bit or
nearly, and what differs is this project's doing. Cores, memory, host and patch versions are left out, or no two rented
machines would ever be compared. They are in the machine id, which must be equal before seconds are judged.
"""

import csv
import hashlib
import io
import json
import math
import re
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from harness.errors import HarnessError, line_of, shown
from harness.records.plain_files import read_plain, refused
from harness.records.record import Record, RunManifest, Status
from harness.records.run_folder import write_text
from harness.records.spec import Frozen
from leaderboards.stats.comparable import one_per_key
from leaderboards.stats.machines import listed, processor
from leaderboards.stats.paired import COLUMNS, KEY, PROMPT_DIGITS, table_of
from leaderboards.text import clean, csv_cell

SETTINGS = ("query", "first_token", "max_new_tokens", "nll_tokens", "seed")
"""Settings of the run that decide scores: with other ones the same prompts have other scores."""
MOST = (1 << 63) - 1
CLASS_CHARS = 60
"""Characters of the machine class in a file name."""


LABEL_CHARS = 4000
"""Of a text in one of these files; names in records have a quarter of that at most."""


def _is_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


Label = Annotated[str, Field(max_length=LABEL_CHARS)]
Shown = Annotated[Label, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Escaped before it was written."""
Time = Annotated[Label, AfterValidator(_is_time)]
"""ISO 8601, with its zone."""
Mean = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class Seconds(Frozen):
    """Means over samples: of the prefill that served one, and of its decoding, all cells together."""

    prefill: Mean
    decode: Mean


class About(Frozen):
    """What `NAME.json` says of a night. board: stem of the TOML file; version: of its `[nightly]` table."""

    format: Literal[1] = 1
    board: Label
    version: Annotated[int, Field(ge=-MOST, le=MOST)]
    machine_class: Label
    machine_id: Label
    """Names the very machine; empty where there was no single one."""
    settings: dict[Label, Label]
    run_id: Label
    commit: Label | None
    started: Time
    finished: Time
    samples: Annotated[int, Field(ge=0, le=MOST)]
    seconds: Seconds
    table_sha256: str
    """The hash of the samples' file."""

    @property
    def name(self) -> str:
        """The stem of its files: one night of a board, version and machine class is kept."""
        readable = re.sub(r"[^a-z0-9]+", "-", self.machine_class.lower()).strip("-")[:CLASS_CHARS].strip("-")
        return f"{self.board}-v{self.version}-{readable}-{_sha256(self.machine_class)[:6]}"


class Line(Frozen):
    """A line of a night's samples, as `leaderboards.stats.paired.COLUMNS` has it; empty where there is no number."""

    task: Shown
    sample_id: Shown
    prompt: Annotated[str, Field(pattern=f"^([0-9a-f]{{{PROMPT_DIGITS}}})?$")]
    group: Shown
    method: Shown
    budget: Shown
    status: Status
    score: Annotated[float, Field(ge=0, le=100.001)] | Literal[""]
    nll: Annotated[float, Field(ge=-1e-6, le=1e6)] | Literal[""]
    kv_bytes: Annotated[int, Field(ge=0, le=MOST)]


LINES = TypeAdapter(Annotated[list[Line], Field(min_length=1)])


@dataclass(frozen=True)
class Night:
    """What is compared. table: columns `COLUMNS`, sorted by `KEY`."""

    about: About
    table: pd.DataFrame


def night_of(
    records: Sequence[Record], manifest: RunManifest, *, board: str, version: int, machine_id: str = ""
) -> Night:
    """The night of one run; the order of the records does not matter.

    Raises HarnessError when there is none, or one sample id stands for two prompts.
    """
    chosen = one_per_key(records).records
    if not chosen:
        raise HarnessError(f"no records in run {manifest.run_id}; there is nothing to compare")
    table = _one_line(table_of(chosen))
    spec = manifest.spec
    settings = {name: str(getattr(spec, name)) for name in SETTINGS}
    about = About(
        board=board,
        version=version,
        machine_class=machine_class(manifest, chosen),
        machine_id=machine_id,
        settings={"model": f"{spec.model.name} {spec.model.revision}", **settings},
        run_id=manifest.run_id,
        commit=manifest.git_commit,
        started=manifest.started,
        finished=manifest.finished or manifest.started,
        samples=len({(r.task, r.sample_id) for r in chosen}),
        seconds=_seconds(chosen),
        table_sha256=_sha256(_csv(table)),
    )
    return Night(about, table)


def machine_class(manifest: RunManifest, records: Sequence[Record]) -> str:
    """Machines whose scores should be equal; the module's header says why. Workers of a cluster name their own."""
    kind = manifest.spec.model.device.partition(":")[0]
    cards = listed(manifest.machine, "accelerators")[:1] if kind != "cpu" else []
    here = cards or [processor(manifest.machine) or "unknown"]
    names = sorted({r.accelerator for r in records if r.accelerator}) or here
    torch = ".".join(manifest.versions.get("torch", "unknown").split(".")[:2])
    told = ", ".join([kind, " + ".join(names), manifest.spec.model.dtype, f"torch {torch}"])
    return clean(told, longest=LABEL_CHARS)


def machine_id(machine: Mapping[str, object], host: str) -> str:
    """12 hex digits for a machine as a manifest tells it and its host, so that no host name is published."""
    return _sha256(json.dumps([host, machine], sort_keys=True, default=str))[:12]


def write_night(night: Night, folder: Path) -> list[Path]:
    """Write both files, what it was last. Raises HarnessError when one cannot be written."""
    table, about = folder / f"{night.about.name}.samples.csv", folder / f"{night.about.name}.json"
    write_text(table, _csv(night.table))
    write_text(about, night.about.model_dump_json(indent=2) + "\n")
    return [table, about]


def read_nights(folder: Path, board: str) -> list[Night]:
    """The nights of a board that are kept in a folder, the newest first; a missing folder has none.

    Raises HarnessError when one is damaged or was edited, or the folder is none.
    """
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        told = error.strerror if isinstance(error, OSError) else error
        where = shown(str(folder))
        raise HarnessError(f"cannot read {where}: {told}; give the folder of nights with --baseline") from None
    if not stat.S_ISDIR(mode):
        raise HarnessError(f"{folder} is no folder; give one for published nights with --baseline")
    found = [(path, _about(path)) for path in sorted(folder.glob("*.json"))]
    nights = [Night(about, _table(path, about)) for path, about in found if about.board == board]
    return sorted(nights, key=lambda night: (night.about.finished, night.about.name), reverse=True)


def _seconds(records: Sequence[Record]) -> Seconds:
    samples: dict[tuple[str, str], float] = defaultdict(float)
    for r in records:
        key = (r.task, r.sample_id)
        samples[key] = max(samples[key], r.prefill_s)  # a cell that failed early has none
    decode = math.fsum(r.decode_s / r.decode_rows for r in records if r.decode_rows)
    return Seconds(prefill=math.fsum(samples.values()) / len(samples), decode=decode / len(samples))


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def _one_line(table: pd.DataFrame) -> pd.DataFrame:
    """The table with texts that a CSV holds as they are: escaped, and none of them a formula."""
    texts = table.select_dtypes(exclude="number").columns
    return table.assign(**{name: table[name].map(lambda text: csv_cell(line_of(text))) for name in texts})


def _about(path: Path) -> About:
    data = read_plain(path, most=SMALL, remedy=REMEDY)
    try:
        return About.model_validate_json(data)
    except ValidationError as error:
        raise refused(error, where=f"{path}, as a night,", remedy=REMEDY) from None


REMEDY = "restore it from version control, or move it away to begin anew"
SMALL = 1 << 20
"""Bytes of a night's JSON."""


def _table(path: Path, about: About) -> pd.DataFrame:
    path = path.with_name(path.name.removesuffix(".json") + ".samples.csv")
    data = read_plain(path, remedy=f"{REMEDY}, with its .json")
    if hashlib.sha256(data).hexdigest() != about.table_sha256:
        raise HarnessError(f"{path} is not the table that its .json was written with; {REMEDY}, with its .json")
    try:
        lines = LINES.validate_python(list(csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True)))
    except ValidationError as error:
        raise refused(error, where=f"{path}, as a table of a night,", remedy=f"{REMEDY}, with its .json") from None
    except (ValueError, csv.Error) as error:  # not UTF-8, or no CSV
        raise HarnessError(f"{path} is no table of a night ({error}); {REMEDY}, with its .json") from None
    table = pd.DataFrame([line.model_dump() for line in lines], columns=COLUMNS)
    numbers = {name: [math.nan if x == "" else x for x in table[name]] for name in ("score", "nll")}
    table = table.assign(**numbers).astype({"score": float, "nll": float, "kv_bytes": "int64"})
    if (twice := table.duplicated(KEY)).any():
        raise HarnessError(f"{path} has line {int(twice.argmax()) + 2} twice; {REMEDY}, with its .json")
    return table


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
