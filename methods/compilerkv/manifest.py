"""What a folder of compiled tables says of itself: `manifest.json`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from methods.compilerkv.form import Form

ENTROPY_BINS, PERPLEXITY_BINS = 20, 4
UNSUPPORTED_HEAD, UNSUPPORTED_GATE = 1.0, 0.8

Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shapes(_Frozen):
    """The part of a model's shape that tables depend on."""

    layers: PositiveInt
    query_heads: PositiveInt
    kv_heads: PositiveInt

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.query_heads} query heads on {self.kv_heads} KV heads"


class Manifest(_Frozen):
    """What the tensors are and where they came from."""

    schema_version: Literal[3] = 3
    kind: Literal["neutral", "compiled", "simulated"]
    """neutral: nothing was learnt. compiled: from roll-outs of a model. simulated: anything else; refused when read."""
    shapes: Shapes
    budgets: tuple[PositiveInt, ...]
    """Budgets compiled for, ascending, in slots per layer and KV head."""
    source: str
    """How the tables were made: estimator, and what was done to them since."""
    model: str = ""
    """Name of the model whose roll-outs they were made from."""
    model_revision: str = ""
    """Its content hash or commit; empty for tables that fit any model of these shapes, such as transferred ones."""
    form: Form | None = None
    """How tokens are scored where budgets are compiled; None for tables of the published form alone."""
    neutral: dict[str, str] = Field(default_factory=dict)
    """Tables that were left neutral, and why: `not compiled`, or the gain that was not there."""
    prompts: tuple[str, ...] = ()
    """SHA-256 of the token ids of every calibration prompt; none of them may be scored with these tables."""
    report: dict[str, Any] = Field(default_factory=dict)
    """Support, reliability, and gains on calibration-validation prompts, in nats."""
    command: tuple[str, ...] = ()
    """The command that made them."""
    git_commit: str | None = None
    made_on: dict[str, Any] = Field(default_factory=dict)
    """Processor, threads and versions. A seed gives the same tables to the bit on an equal machine alone."""
    corpus: str
    """Calibration prompts: what they are and how many."""
    seed: int
    head_range: tuple[Bound, Bound] = (0.8, 1.5)
    """Bounds of the head weights that were searched; a value outside is damage."""
    gate_range: tuple[Bound, Bound] = (0.8, 1.0)
    """Bounds of the thresholds that were searched."""
    tensors_sha256: str = ""
    """SHA-256 of the tensors file. Set when saved."""
    created: str = ""
    """UTC, ISO 8601. Set when saved."""

    def of_model(self, revision: str) -> bool:
        """Return whether a model of this revision may use them."""
        return self.model_revision in ("", revision)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Bounds of the values of a table, by its name."""
        if self.kind == "neutral":
            return {"head": (UNSUPPORTED_HEAD, UNSUPPORTED_HEAD), "gate": (UNSUPPORTED_GATE, UNSUPPORTED_GATE)}
        return {"head": self.head_range, "gate": self.gate_range}
