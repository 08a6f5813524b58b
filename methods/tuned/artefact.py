"""What `harness tune` found for a method on a model: a JSON file, `METHOD.json`, checked whenever it is read."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from methods.base import PolicyError
from methods.budget import MOST_TOKENS, quoted
from methods.plain_files import parsed, read_plain

REMEDY, MOST_BYTES = "tune the method again", 64 << 20
CHOSEN = Path(__file__).parent / "chosen"
"""Artefacts that come with this package, a folder a model."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trial(_Frozen):
    """One set of parameters. divergence: from the full cache at each budget, nats a token, mean over the prompts.

    score: divergence relative to the mean over all trials, where every family of prompts and budget counts the same.
    """

    parameters: dict[str, Any]
    divergence: tuple[float, ...]
    score: float


class Tuning(_Frozen):
    """The trials of a method and the one that was chosen.

    model_revision: content hash or commit of the model that it was tuned on. budgets: in slots per layer and KV head.
    choices: values of each parameter, which make `space` different sets. trials: those that were run, defaults and
    presets first. left_out: mean score on prompts that had no part in the choice, and how often the same set was chosen
    (four folds). prompts: SHA-256 of the token ids of every prompt that decided; none of them may be scored with these
    parameters. made_on: processor, threads and versions.
    """

    schema_version: Literal[1] = 1
    method: str
    model: str
    model_revision: str
    chosen: dict[str, Any]
    budgets: tuple[Annotated[int, Field(ge=1, le=MOST_TOKENS)], ...]
    choices: dict[str, tuple[Any, ...]]
    space: PositiveInt
    trials: tuple[Trial, ...]
    left_out: dict[str, float]
    prompts: tuple[str, ...]
    corpus: str
    seed: int
    command: tuple[str, ...] = ()
    git_commit: str | None = None
    made_on: dict[str, Any] = {}
    created: str = ""


def packaged(method: str) -> list[Path]:
    """Return the artefacts of a method that come with this package."""
    return sorted(CHOSEN.glob(f"*/{method}.json"))


def load_tuning(path: Path) -> tuple[Tuning, str]:
    """Read an artefact and its SHA-256; cached until it changes. Raises PolicyError, one line, for an unsound one."""
    try:
        return _load(path.resolve(), path.stat().st_mtime_ns)
    except OSError as error:
        raise PolicyError(
            f"no tuned parameters at {quoted(str(path))}: {error.strerror}; make them with `harness tune`"
        ) from None


@lru_cache(maxsize=64)
def _load(path: Path, stamp: int) -> tuple[Tuning, str]:
    data = read_plain(path, remedy=REMEDY, most=MOST_BYTES)
    return parsed(Tuning, data, path, remedy=REMEDY), hashlib.sha256(data).hexdigest()
