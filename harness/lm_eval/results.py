"""What lm-eval and our plugin write, read and checked once: a results file and the samples beside it."""

import math
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, model_validator

from harness.errors import HarnessError, shown
from harness.records.plain_files import DEPTH, of_json, read_plain
from harness.records.record import READ
from harness.records.spec import FULL, OWN, MethodSpec, ModelSpec
from methods.budget import Budget

MOST_BYTES = 1 << 30
MOST_CHOICES = 10_000
REMEDY = "run lm-eval again with --log_samples"


def _finite(value: Any) -> Any:
    """JSON as it is. Raises ValueError for a number that is none, or one too deep to be told again."""
    level = [value]
    for _ in range(DEPTH):
        if any(isinstance(x, float) and not math.isfinite(x) for x in level):
            raise ValueError("a number in it is not finite")
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    if level:
        raise ValueError(f"it is nested more than {DEPTH} deep")
    return value


def _budget(text: str) -> str:
    if text not in (FULL, OWN):
        Budget.parse(text.removeprefix(READ))
    return text


Json = Annotated[Any, AfterValidator(_finite)]
Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Seconds = Annotated[FiniteFloat, Field(ge=0, lt=2**36)]
"""Of a duration, or since 1970: until the year 4147."""
Word = Annotated[str, Field(max_length=1000)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Word | FiniteFloat | None


class Part(BaseModel):
    """Base of what is read. Fields that nobody asks for are passed over."""

    model_config = ConfigDict(frozen=True)


class KeptPrompt(Part):
    """What was measured on a prompt, under the names that a record has. Older results lack some."""

    prompt_sha256: Hash
    compressed: StrictBool
    truncated: StrictBool
    over_budget: StrictBool
    notes: tuple[Word, ...]
    compressed_tokens: Count
    budget_tokens: Count | None
    kept_slots: tuple[Count, ...]
    kv_bytes: Count
    kv_bytes_end: Count
    stored_bytes: Count = 0
    stored_bytes_end: Count = 0
    read_bytes: Count | None = None
    asked_bytes: Count
    full_bytes: Count
    prefill_s: Seconds
    compress_s: Seconds


class Config(Part):
    """What our plugin says of a run."""

    kv_model: ModelSpec
    kv_method: MethodSpec
    kv_budget: Annotated[Word, AfterValidator(_budget)]
    kv_memory: Literal["physical", "simulated"]
    kv_max_length: Annotated[StrictInt, Field(ge=1, lt=2**63)]
    kv_notes: tuple[Word, ...]
    kv_prompts: dict[Hash, KeptPrompt]
    limit: Annotated[FiniteFloat, Field(ge=0, lt=2**53)] | None = None
    random_seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    gen_kwargs: Json = None
    use_cache: Word | None = "not said"

    @model_validator(mode="after")
    def _params_are_finite(self) -> Self:
        _finite(self.kv_method.params)
        return self


class SampleCount(Part):
    effective: Count


class Results(Part):
    """A results file."""

    config: Config
    versions: dict[Word, Version]
    shots: dict[Word, Version] = Field(alias="n-shot")
    counts: dict[Word, SampleCount] = Field(default_factory=dict, alias="n-samples")
    higher_is_better: dict[Word, dict[Word, bool | None]] = Field(default_factory=dict)
    task_hashes: dict[Word, Word] = Field(default_factory=dict)
    chat_template: str | None = None
    lm_eval_version: Word | None = None
    transformers_version: Word | None = None
    date: Seconds
    total_evaluation_time_seconds: Annotated[FiniteFloat, Field(ge=0, lt=2**32)] | None = None


class _Other(Part):
    """A results file of any model, as far as it says whose it is."""

    config: dict[str, Any] = Field(default_factory=dict)


class Line(Part):
    """A sample as a filter left it; its metrics are fields of their own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    doc_id: Count
    doc: Any = None
    target: Any
    arguments: dict[str, dict[str, Any]]
    filtered_resps: Annotated[tuple[Any, ...], Field(min_length=1, max_length=MOST_CHOICES)]
    filter: Word
    metrics: tuple[Word, ...]
    doc_hash: Hash
    prompt_hash: Hash
    target_hash: Hash

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        given = self.model_extra or {}
        for name in self.metrics:
            if name not in given:
                raise ValueError(f"metric {shown(name)} has no value")
        self.choices  # noqa: B018 - refuses what is neither texts nor choices
        return self

    @property
    def values(self) -> Mapping[str, Any]:
        """Its metrics."""
        given = self.model_extra or {}
        return {name: given[name] for name in self.metrics}

    @property
    def choices(self) -> list[tuple[str, float]]:
        """Text and log-probability of each choice; none of a sample that is no multiple choice."""
        found = []
        for index, response in enumerate(self.filtered_resps):
            asked = self.arguments.get(f"gen_args_{index}", {})
            if not isinstance(response, list) or "arg_1" not in asked:
                return []
            try:
                logprob = float(response[0])
            except (TypeError, ValueError, OverflowError, IndexError):
                logprob = math.nan
            if not math.isfinite(logprob):
                raise ValueError(f"filtered_resps {index} is no log-probability: {shown(response)}")
            found.append((str(asked["arg_1"]).strip(), logprob))
        return found

    @property
    def length(self) -> int | None:
        """The length that RULER's documents say."""
        length = self.doc.get("max_length") if isinstance(self.doc, dict) else None
        return length if isinstance(length, int) and not isinstance(length, bool) and 0 < length < 2**63 else None

    @property
    def texts(self) -> tuple[str, str]:
        """Prediction and reference as text; of a multiple choice, the choices' own."""
        first, target = self.filtered_resps[0], str(self.target)
        if len(self.filtered_resps) == 1 and isinstance(first, str):
            return first, target
        if not self.choices:
            return "", target
        texts = [text for text, _ in self.choices]
        best, _ = max(self.choices, key=lambda choice: choice[1])
        at = int(target) if target.isdecimal() and len(target) < 6 else len(texts)
        return best, texts[at] if at < len(texts) else target


class ResultsFile(NamedTuple):
    """A results file and its samples. samples: lines of one filter, by task."""

    path: Path
    results: Results
    samples: Mapping[str, list[Line]]


def read_results(path: Path, stamp: str) -> ResultsFile | str:
    """The results in `path` and the samples of the same stamp beside it; the model's name for one that is not ours.

    Raises HarnessError for a file that lm-eval did not write, and samples that are not those of the results.
    """
    data, where = read_plain(path, most=MOST_BYTES, remedy=REMEDY), shown(str(path))
    config = of_json(_Other, data, where=where, remedy=REMEDY).config
    if "kv_method" not in config:
        return shown(config.get("model"))
    results, ending = of_json(Results, data, where=where, remedy=REMEDY), f"_{stamp}.jsonl"
    samples = {}
    for file in sorted(path.parent.glob(f"samples_*{ending}")):
        task = file.name.removeprefix("samples_").removesuffix(ending)
        if task not in results.versions:
            raise HarnessError(f"{shown(file.name)}: {where} has no task {shown(task)}; take one of the two away")
        samples[task] = list(_first_filter(file))
        _check_whole(file, samples[task], results.counts.get(task))
        if results.config.use_cache is None:  # every answer was made in this run
            _check_measured(file, samples[task], results.config.kv_prompts)
    if not samples:
        raise HarnessError(f"{where} has no samples beside it; {REMEDY}")
    return ResultsFile(path, results, samples)


def _first_filter(file: Path) -> Iterator[Line]:
    """The lines of the filter that the first one has."""
    first = None
    for number, text in enumerate(BytesIO(read_plain(file, most=MOST_BYTES, remedy=REMEDY)), start=1):
        line = of_json(Line, text, where=f"{shown(file.name)} line {number}", remedy=REMEDY)
        first = first or line.filter
        if line.filter == first:
            yield line


def _check_whole(file: Path, lines: list[Line], counted: SampleCount | None) -> None:
    if not lines:
        raise HarnessError(f"{shown(str(file))} is empty; {REMEDY}")
    seen: set[int] = set()
    for line in lines:
        if line.doc_id in seen:
            raise HarnessError(f"{shown(str(file))} has document {line.doc_id} twice; {REMEDY}")
        seen.add(line.doc_id)
    if counted is not None and len(lines) < counted.effective:
        told = f"{len(lines)} samples, the results count {counted.effective}"
        raise HarnessError(f"{shown(str(file))} has {told}; copy it again, or {REMEDY}")


def _check_measured(file: Path, lines: list[Line], measured: Mapping[str, KeptPrompt]) -> None:
    for line in lines:
        if line.prompt_hash not in measured:
            told = f"of document {line.doc_id} has a prompt that the results beside it do not know"
            raise HarnessError(
                f"{shown(str(file))}: the sample {told}; keep the files of one run together, or {REMEDY}"
            )
