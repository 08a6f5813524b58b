"""What a run is: frozen, hashable descriptions. The run id is the hash of the resolved spec.

No torch and no transformers here: leaderboards import this module.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from harness.errors import shown
from harness.records import ranges
from harness.records.options import (
    Changes,
    Flag,
    Lengths,
    PathText,
    Samples,
    SamplesOrOff,
    Seed,
    Tokens,
    TokensOrOff,
    Word,
    Words,
)
from methods.budget import Budget

SCHEMA_VERSION = 2

FirstToken = Literal["compressed", "prefill"]
QueryMode = Literal["aware", "agnostic"]
Contexts = Literal["drawn", "protocol"]

FULL, OWN = "full", "own"
"""What records call the budget of a method that keeps everything, and of one that finds how much it keeps."""
AS = "="
"""Before the label of a method of the latter kind: the budget of one that is run at what that kept of each prompt."""

SHAPE = "shape:"
"""What the name of a model with random weights begins with. It has speed and memory, and no score."""


def weights_note(model: str) -> str:
    """What a reader must know of a model's weights, behind its name: that they are random."""
    return " (random weights)" if model.startswith(SHAPE) else ""


class Frozen(BaseModel):
    """Base of everything that touches disk or command line: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(Frozen):
    """What every command that runs methods on a model is asked for. Names are checked by `harness.plan`.

    model: as `harness run --model` takes it. methods: labels. budgets: as typed, see `parsed_budgets`; a method that
    keeps everything needs none. set: changed parameters of methods, `method.parameter` to value.
    """

    OTHER_WAY: ClassVar[str] = ""  # of naming methods, for an error line
    PAIRS: ClassVar[bool] = False  # whether a budget may be what another method keeps

    model: PathText = "smollm2-135m"
    methods: Words
    budgets: Words = ("128", "256", "512")
    dtype: Word = "auto"
    device: Word = "auto"
    set: Changes = Field(default_factory=dict)

    @field_validator("methods")
    @classmethod
    def _some_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if not methods:
            raise ValueError(f"no methods asked for; add --methods compilerkv,snapkv{cls.OTHER_WAY}")
        return methods

    @field_validator("budgets")
    @classmethod
    def _budgets_parse(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        if not budgets:
            raise ValueError("no budgets asked for; give some with --budgets 128,0.25")
        for budget in budgets:
            if not budget.startswith(AS):
                Budget.parse(budget)
            elif not cls.PAIRS:
                raise ValueError(f"--budgets {shown(budget)}: what a method keeps is known in `harness run` alone")
        return budgets

    @property
    def parsed_budgets(self) -> tuple[Budget, ...]:
        """The budgets that are numbers in the order asked, each once however it is spelled."""
        own = (text for text in self.budgets if not text.startswith(AS))
        return tuple(dict.fromkeys(map(Budget.parse, own)))  # not kept: a copy may have other budgets

    @property
    def as_kept(self) -> tuple[str, ...]:
        """The labels of methods whose own budgets are asked for."""
        return tuple(text.removeprefix(AS).strip() for text in self.budgets if text.startswith(AS))


class Sweep(Asked):
    """What a person asked for, by command line, TOML file or Python. An illegal one cannot be made.

    tasks: names or families. lengths: context lengths in tokens for generated tasks. limit: samples per task, or per
    task and length. max_tokens: prompt and generation together, None for the model's context. max_new_tokens: caps the
    tasks' own. nll_tokens: reference tokens that are scored at most. observe: prompts per length, or data set, on which
    the cost of observing is measured; no part of what is run. measure: time every cell by itself too, and its memory.
    whole: only rows of data sets that need no cut. contexts: a text for each generated prompt, or the haystacks that
    the protocols fix. graded: a calibration of graded tasks, a file or a packaged name; None for the model's own.
    receiver: another model that answers relay tasks. receiver_map: a folder with what was calibrated between the two.
    """

    OTHER_WAY = " or --config quick"
    PAIRS = True

    tasks: Words
    lengths: Lengths = (1024,)
    limit: Samples | None = None
    seed: Seed = 42
    max_tokens: Tokens | None = None
    max_new_tokens: Tokens | None = None
    first_token: FirstToken = "compressed"
    query: QueryMode = "aware"
    nll_tokens: TokensOrOff = 64
    observe: SamplesOrOff = 2
    trust_remote_code: Flag = False
    data_dir: PathText | None = None
    measure: Flag = False
    whole: Flag = False
    contexts: Contexts = "drawn"
    graded: PathText | None = None
    receiver: PathText | None = None
    receiver_map: PathText | None = None

    @field_validator("tasks")
    @classmethod
    def _some_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise ValueError(f"no tasks asked for; add --tasks niah,stdlib{cls.OTHER_WAY}")
        return tasks

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.receiver_map is not None and self.receiver is None:
            raise ValueError("--receiver-map without --receiver; name the model that answers")
        if self.measure and self.query == "agnostic":
            shared = "questions share a compressed context there, which no cell has by itself"
            raise ValueError(f"--measure with --query agnostic: {shared}; leave one of the two out")
        if self.measure and self.trust_remote_code:
            raise ValueError("--measure with --trust-remote-code: probes load plain models only; leave one of them out")
        return self


class MethodSpec(Frozen):
    """A method as run. label: `name` or `name@preset`, with overrides spelled out; params: all of them, resolved.

    own: how much it keeps is what it finds in the prompt; it is not budgeted then.
    """

    label: ranges.Label
    name: ranges.Label
    params: ranges.Meta = Field(default_factory=dict)
    budgeted: bool = True
    own: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.own and self.budgeted:
            raise ValueError(f"method {self.label} is said to be given a budget and to find its own; it is one of both")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `own` where it is not so: ids of runs from before there were such methods are those of today."""
        found: dict[str, Any] = serialize(self)
        return found if self.own else {name: value for name, value in found.items() if name != "own"}


class ModelSpec(Frozen):
    """A model as loaded. revision: content hash or hub commit; dtype and device as resolved, never `auto`.

    loaded_as: what was done to its weights: an adapter merged, quantised, spread over devices, drawn at random.
    """

    name: ranges.Label
    revision: ranges.Label
    dtype: ranges.Label
    device: ranges.Label
    trust_remote_code: bool = False
    loaded_as: ranges.Typed = ()


class TaskSpec(Frozen):
    """A task as run. provenance: what the task says of its data (source, revision, checksums, substitutions)."""

    name: ranges.Label
    protocol: ranges.Label
    provenance: ranges.Meta = Field(default_factory=dict)


LATER = ("measured_on", "whole", "answered_by", "answered_map")
"""Fields of a run that came after the first ones."""


class RunSpec(Frozen):
    """Everything that decides the numbers of a run, resolved. Two equal specs share one run folder."""

    schema_version: int = SCHEMA_VERSION
    model: ModelSpec
    tasks: Annotated[tuple[TaskSpec, ...], Field(max_length=1000)]
    methods: Annotated[tuple[MethodSpec, ...], Field(max_length=1000)]
    budgets: ranges.Typed
    lengths: ranges.Lengths
    limit: ranges.Tokens | None
    seed: ranges.Seed
    max_tokens: ranges.Tokens
    max_new_tokens: ranges.Tokens | None
    first_token: FirstToken
    query: QueryMode
    nll_tokens: ranges.Count
    measured_on: ranges.Label | None = None  # the machine that cells are also timed on, which decides those numbers
    whole: bool = False  # whether rows of data sets that would have been cut were left out
    contexts: Contexts = "protocol"  # what all runs had before contexts were drawn
    answered_by: ModelSpec | None = None  # another model, that answered from this one's caches
    answered_map: ranges.Sha256OrNone = ""  # of what was calibrated between the two

    @model_validator(mode="after")
    def _has_scores(self) -> Self:
        if weights_note(self.model.name):
            raise ValueError(f"a run of {self.model.name}, whose weights are random, has no scores; leave it out")
        return self

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of this spec.

        Fields that came after the first runs are left out while at their defaults, so that those keep their ids.
        """
        left_out: dict[str, Any] = {name: True for name in LATER if not getattr(self, name)}
        if self.contexts == "protocol":
            left_out["contexts"] = True
        if not self.model.loaded_as:
            left_out["model"] = {"loaded_as"}
        text = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
