"""What a run is: frozen, hashable descriptions. The run id is the hash of the resolved spec.

No torch and no transformers here: leaderboards import this module.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from harness.records.ranges import Count, Label, Lengths, Meta, Seed, Tokens, Typed
from methods.budget import Budget

SCHEMA_VERSION = 2

FirstToken = Literal["compressed", "prefill"]
QueryMode = Literal["aware", "agnostic"]
Contexts = Literal["drawn", "protocol"]


class Frozen(BaseModel):
    """Base of everything that touches disk or command line: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def check_least(given: Any, least: float, field: ValidationInfo) -> Any:
    """The value of an option, or each of several, when it is None or at least `least`; a field ending in _s is seconds.

    Raises ValueError, with the option as it is typed.
    """
    for number in given if isinstance(given, tuple) else (given,):
        if number is not None and not number >= least:  # nan too
            raise ValueError(f"--{option(field).removesuffix('-s')} {number} is too small; give at least {least}")
    return given


def option(field: ValidationInfo) -> str:
    """The field's name as it is typed, without its dashes."""
    return str(field.field_name).replace("_", "-")


class Asked(Frozen):
    """What every command that runs methods on a model is asked for. Names are checked by `harness.plan`.

    model: as `harness run --model` takes it. methods: labels. budgets: as typed, see `parsed_budgets`; a method that
    keeps everything needs none. set: changed parameters of methods, `method.parameter` to value.
    """

    OTHER_WAY: ClassVar[str] = ""  # of naming methods, for an error line

    model: str = "smollm2-135m"
    methods: tuple[str, ...]
    budgets: tuple[str, ...] = ("128", "256", "512")
    dtype: str = "auto"
    device: str = "auto"
    set: dict[str, Any] = Field(default_factory=dict)

    @field_validator("methods")
    @classmethod
    def _some_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if not methods:
            raise ValueError(f"no methods asked for; add --methods compilerkv,snapkv{cls.OTHER_WAY}")
        return methods

    @field_validator("budgets")
    @classmethod
    def _budgets_parse(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        for budget in budgets:
            Budget.parse(budget)
        return budgets

    @property
    def parsed_budgets(self) -> tuple[Budget, ...]:
        """The budgets in the order asked; one that is asked for twice is there twice, as a run's spec has it."""
        return tuple(map(Budget.parse, self.budgets))  # not kept: a copy with other budgets must not have these


class Sweep(Asked):
    """What a person asked for, by command line, TOML file or Python. An illegal one cannot be made.

    tasks: names or families. lengths: context lengths in tokens for generated tasks. limit: samples per task, or per
    task and length. max_tokens: prompt and generation together, None for the model's context. max_new_tokens: caps the
    tasks' own. nll_tokens: reference tokens that are scored at most. observe: prompts per length, or data set, on which
    the cost of observing is measured; no part of what is run. measure: time every cell by itself too, and its memory.
    whole: only rows of data sets that need no cut. contexts: a text for each generated prompt, or the haystacks that
    the protocols fix. graded: a calibration of graded tasks, a file or a packaged name; None for the model's own.
    """

    OTHER_WAY = " or --config quick"

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (1024,)
    limit: int | None = None
    seed: int = 42
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    first_token: FirstToken = "compressed"
    query: QueryMode = "aware"
    nll_tokens: int = 64
    observe: int = 2
    trust_remote_code: bool = False
    data_dir: str | None = None
    measure: bool = False
    whole: bool = False
    contexts: Contexts = "drawn"
    graded: str | None = None

    @field_validator("tasks")
    @classmethod
    def _some_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise ValueError(f"no tasks asked for; add --tasks niah,stdlib{cls.OTHER_WAY}")
        return tasks

    @field_validator("lengths")
    @classmethod
    def _some_lengths(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if not lengths:
            raise ValueError("no lengths asked for; give some with --lengths 1024,4096")
        return lengths

    @field_validator("lengths", "limit", "max_tokens", "max_new_tokens")
    @classmethod
    def _at_least_one(cls, given: Any, field: ValidationInfo) -> Any:
        return check_least(given, 1, field)

    @field_validator("nll_tokens", "observe")
    @classmethod
    def _not_negative(cls, number: int, field: ValidationInfo) -> int:
        if number < 0:
            raise ValueError(f"--{option(field)} {number} is negative; give 0 to turn it off")
        return number

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.measure and self.query == "agnostic":
            shared = "questions share a compressed context there, which no cell has by itself"
            raise ValueError(f"--measure with --query agnostic: {shared}; leave one of the two out")
        if self.measure and self.trust_remote_code:
            raise ValueError("--measure with --trust-remote-code: probes load plain models only; leave one of them out")
        return self


class MethodSpec(Frozen):
    """A method as run. label: `name` or `name@preset`, with overrides spelled out; params: all of them, resolved."""

    label: Label
    name: Label
    params: Meta = Field(default_factory=dict)
    budgeted: bool = True


class ModelSpec(Frozen):
    """A model as loaded. revision: content hash or hub commit; dtype and device as resolved, never `auto`.

    loaded_as: what was done to its weights: an adapter merged, quantised, spread over devices.
    """

    name: Label
    revision: Label
    dtype: Label
    device: Label
    trust_remote_code: bool = False
    loaded_as: Typed = ()


class TaskSpec(Frozen):
    """A task as run. provenance: what the task says of its data (source, revision, checksums, substitutions)."""

    name: Label
    protocol: Label
    provenance: Meta = Field(default_factory=dict)


class RunSpec(Frozen):
    """Everything that decides the numbers of a run, resolved. Two equal specs share one run folder."""

    schema_version: int = SCHEMA_VERSION
    model: ModelSpec
    tasks: Annotated[tuple[TaskSpec, ...], Field(max_length=1000)]
    methods: Annotated[tuple[MethodSpec, ...], Field(max_length=1000)]
    budgets: Typed
    lengths: Lengths
    limit: Tokens | None
    seed: Seed
    max_tokens: Tokens
    max_new_tokens: Tokens | None
    first_token: FirstToken
    query: QueryMode
    nll_tokens: Count
    measured_on: Label | None = None  # the machine that cells are also timed on, which decides those numbers
    whole: bool = False  # whether rows of data sets that would have been cut were left out
    contexts: Contexts = "protocol"  # what all runs had before contexts were drawn

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of this spec.

        Fields that came after the first runs are left out while at their defaults, so that those keep their ids.
        """
        left_out: dict[str, Any] = {name: True for name in ("measured_on", "whole") if not getattr(self, name)}
        if self.contexts == "protocol":
            left_out["contexts"] = True
        if not self.model.loaded_as:
            left_out["model"] = {"loaded_as"}
        text = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
