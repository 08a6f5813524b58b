"""What a folder of compiled tables says of itself: `manifest.json`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from methods.budget import MOST_TOKENS
from methods.compilerkv.form import Form

ENTROPY_BINS, PERPLEXITY_BINS = 20, 4
UNSUPPORTED_HEAD, UNSUPPORTED_GATE = 1.0, 0.8

Bound = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Slots = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Line = Annotated[str, Field(max_length=10_000, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]
"""Text that a terminal shows as it is."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shapes(_Frozen):
    """The part of a model's shape that tables depend on."""

    layers: Count
    query_heads: Count
    kv_heads: Count

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.query_heads} query heads on {self.kv_heads} KV heads"


class Manifest(_Frozen):
    """What the tensors are and where they came from.

    kind: neutral, nothing was learnt; compiled, from roll-outs of a model; simulated, anything else, refused when read.
    budgets: ascending, in slots per layer and KV head. source: estimator, and what was done to the tables since.
    model, model_revision: whose roll-outs they were made from, and its content hash or commit; empty for tables that
    fit any model of these shapes, such as transferred ones.
    form: how tokens are scored where budgets are compiled; None for tables of the published form alone.
    neutral: tables that were left neutral, and why: `not compiled`, or the gain that was not there.
    prompts: SHA-256 of the token ids of every calibration prompt; none of them may be scored with these tables.
    report: support, reliability, and gains on calibration-validation prompts, in nats. command: what made them.
    made_on: processor, threads and versions; a seed gives the same tables to the bit on an equal machine alone.
    corpus: calibration prompts, what they are and how many.
    head_range, gate_range: bounds of the head weights and thresholds that were searched; a value outside is damage.
    tensors_sha256, created: of the tensors file, and UTC in ISO 8601. Set when saved.
    """

    schema_version: Literal[4] = 4
    kind: Literal["neutral", "compiled", "simulated"]
    shapes: Shapes
    budgets: Annotated[tuple[Slots, ...], Field(max_length=1000)]
    source: Line
    model: Line = ""
    model_revision: Line = ""
    form: Form | None = None
    neutral: dict[Line, Line] = Field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    report: dict[str, Any] = Field(default_factory=dict)
    command: tuple[str, ...] = ()
    git_commit: str | None = None
    made_on: dict[str, Any] = Field(default_factory=dict)
    corpus: Line
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    head_range: tuple[Bound, Bound] = (0.8, 1.5)
    gate_range: tuple[Bound, Bound] = (0.8, 1.0)
    tensors_sha256: str = ""
    created: str = ""

    def of_model(self, revision: str) -> bool:
        return self.model_revision in ("", revision)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Bounds of the values of a table, by its name."""
        if self.kind == "neutral":
            return {"head": (UNSUPPORTED_HEAD, UNSUPPORTED_HEAD), "gate": (UNSUPPORTED_GATE, UNSUPPORTED_GATE)}
        return {"head": self.head_range, "gate": self.gate_range}
