"""A night as it is kept for comparison: `NAME.json` says what it was, `NAME.samples.csv` holds its samples.

Boards hold means, a paired test needs samples. So those of a published night stay beside its board: one line per sample
and cell, sorted, numbers rounded (scores to 6 decimals, NLL to 9), so that equal nights are equal bytes.

Machine class: device kind, the name of the GPU or processor, dtype, and torch's major.minor. These choose the kernels,
so they decide how sums round and which token wins a near tie: within a class a night repeats itself to the bit or
nearly, and what differs is this project's doing. Cores, memory, host and patch versions are left out, or no two rented
machines would ever be compared. They are in the machine id, which must be equal before seconds are judged.
"""

import hashlib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import ValidationError

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.run_folder import write_text
from harness.records.spec import Frozen
from leaderboards.stats.comparable import one_per_key
from leaderboards.stats.paired import COLUMNS, table_of

SETTINGS = ("query", "first_token", "max_new_tokens", "nll_tokens", "seed")
"""Settings of the run that decide scores: with other ones the same prompts have other scores."""
CLASS_CHARS = 60
"""Characters of the machine class in a file name."""


class Seconds(Frozen):
    """Means over samples: of the prefill that served one, and of its decoding, all cells together."""

    prefill: float
    decode: float


class About(Frozen):
    """What `NAME.json` says of a night. board: stem of the TOML file; version: of its `[nightly]` table."""

    format: Literal[1] = 1
    board: str
    version: int
    machine_class: str
    machine_id: str
    """Names the very machine; empty where there was no single one."""
    settings: dict[str, str]
    run_id: str
    commit: str | None
    started: str
    finished: str
    samples: int
    seconds: Seconds
    table_sha256: str
    """The hash of the samples' file."""

    @property
    def name(self) -> str:
        """The stem of its files: one night of a board, version and machine class is kept."""
        readable = re.sub(r"[^a-z0-9]+", "-", self.machine_class.lower()).strip("-")[:CLASS_CHARS].strip("-")
        return f"{self.board}-v{self.version}-{readable}-{_sha256(self.machine_class)[:6]}"


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
    chosen, _ = one_per_key(records)
    if not chosen:
        raise HarnessError(f"no records in run {manifest.run_id}; there is nothing to compare")
    table = table_of(chosen)
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
    cards = [str(card) for card in manifest.machine.get("accelerators") or ()][:1] if kind != "cpu" else []
    here = cards or [str(manifest.machine.get("processor") or "unknown")]
    names = sorted({r.accelerator for r in records if r.accelerator}) or here
    torch = ".".join(manifest.versions.get("torch", "unknown").split(".")[:2])
    return ", ".join([kind, " + ".join(names), manifest.spec.model.dtype, f"torch {torch}"])


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
    if folder.exists() and not folder.is_dir():
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


def _about(path: Path) -> About:
    try:
        return About.model_validate_json(path.read_bytes())
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise HarnessError(f"{path} is no night ({where or 'whole'}: {first['msg']}); {REMEDY}") from None


REMEDY = "restore it from version control, or move it away to begin anew"


def _table(path: Path, about: About) -> pd.DataFrame:
    path = path.with_name(path.name.removesuffix(".json") + ".samples.csv")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}; {REMEDY}, with its .json") from None
    if hashlib.sha256(data).hexdigest() != about.table_sha256:
        raise HarnessError(f"{path} is not the table that its .json was written with; {REMEDY}, with its .json")
    try:
        table = pd.read_csv(io.BytesIO(data), dtype="str", keep_default_na=False)[COLUMNS]
        numbers = {name: [float(text or "nan") for text in table[name]] for name in ("score", "nll")}
        return table.assign(**numbers, kv_bytes=table.kv_bytes.astype("int64"))
    except (ValueError, KeyError) as error:
        why = " ".join(str(error).split())
        raise HarnessError(f"{path} is no table of a night ({why}); {REMEDY}, with its .json") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
