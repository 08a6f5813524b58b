"""What a run is: frozen, hashable descriptions. The run id is the hash of the resolved spec.

No torch and no transformers here: leaderboards import this module.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 2

FirstToken = Literal["compressed", "prefill"]
QueryMode = Literal["aware", "agnostic"]


class Frozen(BaseModel):
    """Base of everything that touches disk or command line: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Sweep(Frozen):
    """What a person asked for, by command line or TOML file; names are checked before a model loads.

    lengths: context lengths in tokens for generated tasks. limit: samples per task, or per task and length.
    max_tokens: prompt and generation together, None for the model's context. max_new_tokens: caps the tasks' own.
    nll_tokens: reference tokens that are scored at most. set: parameters of methods, `method.parameter` to value.
    measure: time every cell by itself too, and its memory. whole: only rows of data sets that need no cut.
    """

    model: str = "smollm2-135m"
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    budgets: tuple[str, ...] = ("128", "256", "512")
    lengths: tuple[int, ...] = (1024,)
    limit: int | None = None
    seed: int = 42
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    first_token: FirstToken = "compressed"
    query: QueryMode = "aware"
    nll_tokens: int = 64
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    data_dir: str | None = None
    measure: bool = False
    whole: bool = False
    set: dict[str, Any] = Field(default_factory=dict)


class MethodSpec(Frozen):
    """A method as run. label: `name` or `name@preset`, with overrides spelled out; params: all of them, resolved."""

    label: str
    name: str
    params: dict[str, Any] = Field(default_factory=dict)
    budgeted: bool = True


class ModelSpec(Frozen):
    """A model as loaded. revision: content hash or hub commit; dtype and device as resolved, never `auto`.

    loaded_as: what was done to its weights: an adapter merged, quantised, spread over devices.
    """

    name: str
    revision: str
    dtype: str
    device: str
    trust_remote_code: bool = False
    loaded_as: tuple[str, ...] = ()


class TaskSpec(Frozen):
    """A task as run. provenance: what the task says of its data (source, revision, checksums, substitutions)."""

    name: str
    protocol: str
    provenance: dict[str, Any] = Field(default_factory=dict)


class RunSpec(Frozen):
    """Everything that decides the numbers of a run, resolved. Two equal specs share one run folder."""

    schema_version: int = SCHEMA_VERSION
    model: ModelSpec
    tasks: tuple[TaskSpec, ...]
    methods: tuple[MethodSpec, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    limit: int | None
    seed: int
    max_tokens: int
    max_new_tokens: int | None
    first_token: FirstToken
    query: QueryMode
    nll_tokens: int
    measured_on: str | None = None
    """The machine that cells are also timed on, since it decides those numbers; None for a run that times nothing."""

    whole: bool = False
    """Whether rows of data sets that would have been cut were left out."""

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of this spec.

        Fields that came after the first runs are left out while at their defaults, so that those keep their ids.
        """
        left_out: dict[str, Any] = {name: True for name in ("measured_on", "whole") if not getattr(self, name)}
        if not self.model.loaded_as:
            left_out["model"] = {"loaded_as"}
        text = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
