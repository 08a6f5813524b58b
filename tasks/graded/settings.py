"""What `harness calibrate-tasks` found for a model: a JSON file, checked whenever it is read."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from tasks.base import Grades, TaskError

PACKAGED = Path(__file__).parent / "settings"
"""Calibrations that come with this package, `MODEL.json`."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Tried(_Frozen):
    """A setting, and the full cache's mean score on n prompts, 0-100, with its standard error."""

    setting: int
    score: float = Field(ge=0, le=100)
    error: float = Field(ge=0)
    n: PositiveInt


class Graded(_Frozen):
    """A task at a length: its dial, what was tried of it, easiest first, and what was chosen; None for nothing."""

    task: str
    length: PositiveInt
    dial: str
    scale: tuple[int, ...]
    tried: tuple[Tried, ...]
    chosen: int | None

    @model_validator(mode="after")
    def _chosen_was_tried(self) -> "Graded":
        if self.chosen is not None and self.chosen not in [tried.setting for tried in self.tried]:
            raise ValueError(f"{self.task} at {self.length}: setting {self.chosen} was never tried")
        return self


class RuleKept(_Frozen):
    """A rule of `instructions/obey`, and in what share of n prompts of a length the full cache kept it, 0-100."""

    rule: str
    length: PositiveInt
    score: float = Field(ge=0, le=100)
    error: float = Field(ge=0)
    n: PositiveInt


class Calibration(_Frozen):
    """The settings of every task, and the rules, for one model.

    model_revision: content hash or commit of the model. low, high: scores between which a setting qualifies, 0-100; a
    rule does from `low` on. rules: empty where none was asked for. seed: of the prompts, which are over `corpus`.
    made_on: processor, threads and versions.
    """

    schema_version: Literal[1] = 1
    model: str
    model_revision: str
    low: float
    high: float
    seed: int
    corpus: str
    tasks: tuple[Graded, ...]
    rules: tuple[RuleKept, ...] = ()
    command: tuple[str, ...] = ()
    git_commit: str | None = None
    made_on: dict[str, Any] = {}
    created: str = ""


def load_calibration(path: Path) -> tuple[Calibration, str]:
    """Read a calibration and its SHA-256. Raises TaskError, one line, for an unsound one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"no calibration at {path}: {error.strerror}; make it with `harness calibrate-tasks`") from None
    return _parsed(path, data), hashlib.sha256(data).hexdigest()


def find_grades(asked: str | None, revision: str) -> Grades | None:
    """Return the settings for a model of this revision.

    asked: a file, or the name of a packaged one; None looks for the packaged one of this revision, and returns None
    where there is none. Raises TaskError for one that is not there, damaged, or of another model.
    """
    if asked is None:
        found = (load_calibration(path) for path in sorted(PACKAGED.glob("*.json")))
        own = next((pair for pair in found if pair[0].model_revision == revision), None)
        return None if own is None else _grades(*own)
    named = PACKAGED / f"{asked}.json"
    calibration, sha256 = load_calibration(named if named.is_file() else Path(asked))
    if calibration.model_revision != revision:
        raise TaskError(
            f"--graded {asked} was made for {calibration.model} of revision {calibration.model_revision[:12]}, this "
            f"model is {revision[:12]}; calibrate for it, or leave --graded out"
        )
    return _grades(calibration, sha256)


@lru_cache(maxsize=16)
def _parsed(path: Path, data: bytes) -> Calibration:
    try:
        return Calibration.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}, got {str(first['input'])[:60]!r}"
        raise TaskError(f"{path} is damaged: {what}; calibrate again") from None


def _grades(calibration: Calibration, sha256: str) -> Grades:
    settings: dict[str, dict[int, int]] = {}
    for graded in calibration.tasks:
        if graded.chosen is not None:
            settings.setdefault(graded.task, {})[graded.length] = graded.chosen
    kept = tuple(one.rule for one in calibration.rules if one.score >= calibration.low)
    said = {"sha256": sha256, "model": calibration.model}
    return Grades(settings, said, rules=kept if calibration.rules else None)
