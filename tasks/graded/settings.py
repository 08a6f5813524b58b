"""What `harness calibrate-tasks` found for a model: a JSON file, checked whenever it is read."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from tasks.base import Grades, TaskError, shown
from tasks.datafile import read_json, read_plain

PACKAGED = Path(__file__).parent / "settings"
"""Calibrations that come with this package, `MODEL.json`."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Word = Annotated[str, Field(max_length=400)]
Percent = Annotated[float, Field(ge=0, le=100, strict=True)]
Setting = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Number = Annotated[int, Field(ge=1, lt=2**31, strict=True)]


class Tried(_Frozen):
    """A setting, and the full cache's mean score on n prompts, 0-100, with its standard error."""

    setting: Setting
    score: Percent
    error: Percent
    n: Number


class Graded(_Frozen):
    """A task at a length: its dial, what was tried of it, easiest first, and what was chosen; None for nothing."""

    task: Word
    length: Number
    dial: Word
    scale: tuple[Setting, ...]
    tried: tuple[Tried, ...]
    chosen: Setting | None

    @model_validator(mode="after")
    def _chosen_was_tried(self) -> "Graded":
        if self.chosen is not None and self.chosen not in [tried.setting for tried in self.tried]:
            raise ValueError(f"{self.task} at {self.length}: setting {self.chosen} was never tried")
        if self.chosen is not None and self.chosen not in self.scale:
            raise ValueError(f"{self.task} at {self.length}: setting {self.chosen} is not on the scale")
        return self


class RuleKept(_Frozen):
    """A rule of `instructions/obey`, and in what share of n prompts of a length the full cache kept it, 0-100."""

    rule: Word
    length: Number
    score: Percent
    error: Percent
    n: Number


class Calibration(_Frozen):
    """The settings of every task, and the rules, for one model.

    model_revision: content hash or commit of the model. low, high: scores between which a setting qualifies, 0-100; a
    rule does from `low` on. rules: empty where none was asked for. seed: of the prompts, which are over `corpus`.
    made_on: processor, threads and versions.
    """

    schema_version: Literal[1] = 1
    model: Word
    model_revision: Word
    low: Percent
    high: Percent
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    corpus: Word
    tasks: tuple[Graded, ...]
    rules: tuple[RuleKept, ...] = ()
    command: tuple[str, ...] = ()
    git_commit: str | None = None
    made_on: dict[str, Any] = {}
    created: str = ""


CALIBRATIONS = TypeAdapter(Calibration)
MOST_BYTES = 16 << 20


def load_calibration(path: Path) -> tuple[Calibration, str]:
    """Read a calibration and its SHA-256. Raises TaskError, one line, for an unsound one."""
    if not os.path.lexists(path):
        raise TaskError(f"no calibration at {shown(str(path))}; make it with `harness calibrate-tasks`")
    data = read_plain(path, most=MOST_BYTES)
    return _parsed(path, data), hashlib.sha256(data).hexdigest()


def named_calibration(asked: str) -> tuple[Calibration, str]:
    """Read a calibration by its path, or the name of a packaged one. Raises TaskError as `load_calibration`."""
    named = PACKAGED / f"{asked}.json"
    return load_calibration(named if os.path.isfile(named) else Path(asked))


def find_grades(asked: str | None, revision: str) -> Grades | None:
    """Return the settings for a model of this revision.

    asked: a file, or the name of a packaged one; None looks for the packaged one of this revision, and returns None
    where there is none. Raises TaskError for one that is not there, damaged, or of another model.
    """
    if asked is None:
        found = (load_calibration(path) for path in sorted(PACKAGED.glob("*.json")))
        own = next((pair for pair in found if pair[0].model_revision == revision), None)
        return None if own is None else _grades(*own)
    calibration, sha256 = named_calibration(asked)
    if calibration.model_revision != revision:
        raise TaskError(
            f"--graded {shown(asked)} was made for {calibration.model} of revision {calibration.model_revision[:12]}, "
            f"this model is {revision[:12]}; calibrate for it, or leave --graded out"
        )
    return _grades(calibration, sha256)


@lru_cache(maxsize=16)
def _parsed(path: Path, data: bytes) -> Calibration:
    return read_json(CALIBRATIONS, data, where=str(path), remedy="calibrate again")


def _grades(calibration: Calibration, sha256: str) -> Grades:
    settings: dict[str, dict[int, int]] = {}
    for graded in calibration.tasks:
        if graded.chosen is not None:
            settings.setdefault(graded.task, {})[graded.length] = graded.chosen
    kept = tuple(one.rule for one in calibration.rules if one.score >= calibration.low)
    said = {"sha256": sha256, "model": calibration.model}
    return Grades(settings, said, rules=kept if calibration.rules else None)
