"""What a submitted run is checked for, from its archive alone: nothing of it is believed that can be computed again.

    manifest    the run id is the hash of the spec; kept manifests are of the same run; the tasks are known here
    records     every line parses and is of this run; one per key; all cells of a sample had the same prompt, references
                and cache
    complete    every sample has every cell of the spec, and there are as many samples as the manifest says and, for
                generated tasks, as the spec's limit asks for of each length
    budgets     asked bytes follow from the budget, kept slots from the bytes, and `over_budget` from the two
    scores      the metrics are what the task gives for the stored prediction, to 1e-9
    likelihood  finite, none negative, over as many tokens as the spec allows. The values are reported, not recomputed
    tokens      with a tokenizer alone: the stored tokens say what the prediction says

What this cannot show: that the model gave these predictions, nor the seconds, nor that the references are those of the
data, beyond their being the same in all cells of a sample. An edit that changes no score, under checksums made anew, is
seen with a tokenizer alone. A cell that was lost (out of memory, failed) has no score; how many there are is told.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, cast

from pydantic import BaseModel, ValidationError

from harness.errors import HarnessError
from harness.records.record import CellKey, Record, RunManifest, by_turns
from harness.records.spec import SCHEMA_VERSION
from harness.submission.archive import MANIFEST, RECORDS, Index, Pack, open_pack
from harness.submission.check_bytes import Budgets
from harness.submission.check_samples import Samples
from methods.base import Budget, PolicyError
from tasks import load_tasks
from tasks.base import Sample, Task

REASONS = 5  # of each check that are kept
EXACT = 1e-9
ROUNDING = 1e-6
REFERENCE_TOKENS = 1 << 32  # tokens of a reference
Decode = Callable[[Sequence[int]], str]


@dataclass
class Check:
    """A kind of check: how many things it looked at and refused, and the first `REASONS` of its reasons."""

    name: str
    counted: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)

    def see(self, problems: Iterable[str], where: str = "", *, counted: int = 1) -> bool:
        """Note the problems of one thing, and return whether there was none; several count once."""
        found = [f"{where}: {problem}" if where else problem for problem in problems]
        self.counted += counted
        self.refused += bool(found)
        self.reasons = [*self.reasons, *found][:REASONS]
        return not found


@dataclass
class Verification:
    """What was found in an archive."""

    index: Index
    manifest: RunManifest | None = None
    """None where it is damaged."""
    checks: list[Check] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    """Records by status."""

    @property
    def ok(self) -> bool:
        return not any(check.refused for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        return [f"{check.name}: {reason}" for check in self.checks for reason in check.reasons]

    def check(self, name: str) -> Check:
        """Begin a check of that name."""
        self.checks.append(Check(name))
        return self.checks[-1]

    def told(self) -> list[str]:
        """Write the verdict: what it is of, a table of checks, what was not recomputed, OK or REFUSED with reasons."""
        lines = []
        if (m := self.manifest) is not None:
            model = f"{m.spec.model.name} {m.spec.model.dtype}"
            what = f"{model}, {m.samples} samples x {m.cells} cells, commit {m.git_commit}"
            lines.append(_shown(f"run {m.run_id}: {what}, packed by version {self.index.harness}"))
        lines.append(f"{'check':<12} {'counted':>9} {'refused':>9}")
        for check in self.checks:
            note = "  values reported, not recomputed" if check.name == "likelihood" else ""
            lines.append(f"{check.name:<12} {check.counted:>9,} {check.refused:>9,}{note}")
        others = [f"{count} {status}" for status, count in sorted(self.statuses.items()) if status != "ok"]
        if others:
            lines.append(f"without a score: {', '.join(others)}")
        if not self.ok:
            return [*lines, "REFUSED", *(f"  {reason}" for reason in self.reasons)]
        part = " Cells may be missing: it is a part of a run." if self.index.partial else ""
        return [*lines, f"OK: the scores follow from the predictions. Seconds and NLL are as reported.{part}"]


def _shown(text: object, most: int | None = None) -> str:
    """At most so many characters of what an archive says, without those that a terminal obeys."""
    return ascii(str(text))[1:-1][:most]


def verify_pack(path: Path, *, partial: bool = False, decode: Decode | None = None) -> Verification:
    """Check an archive; what is wrong with a sound one is in what is returned.

    partial: whether missing cells are no fault. decode: of the model's tokenizer, to check tokens too. Raises
    HarnessError for an archive that is not sound.
    """
    with open_pack(path) as pack:
        verification = Verification(pack.index)
        archive = verification.check("archive")
        without = () if pack.index.references else ("it was packed without references: no score can be recomputed",)
        archive.see(without, counted=len(pack.index.files))
        manifest = _manifest(pack, verification.check("manifest"))
        verification.manifest = manifest
        if manifest is not None and pack.index.references:
            _records(pack, manifest, verification, partial=partial, decode=decode)
        return verification


def _manifest(pack: Pack, check: Check) -> RunManifest | None:
    """The manifest where it can be worked with."""
    try:
        manifest = _parse(RunManifest, pack.read(MANIFEST))
        kept = [_parse(RunManifest, pack.read(name)) for name in pack.manifests]
    except HarnessError as error:
        check.see([str(error)], MANIFEST)
        return None
    given, ids = manifest.spec.run_id, [m.run_id for m in (manifest, *kept)]
    ids += [m.spec.run_id for m in kept] + [pack.index.run_id]
    problems = [f"run id {_shown(other, 40)} is not the hash of the spec, {given}" for other in ids if other != given]
    problems = problems or list(_spec_problems(manifest))
    return manifest if check.see(problems, MANIFEST, counted=1 + len(kept)) else None


def _spec_problems(manifest: RunManifest) -> Iterator[str]:
    spec, known = manifest.spec, load_tasks()
    for name, count in Counter(task.name for task in spec.tasks).items():
        if count > 1:
            yield f"task {name!a} is there {count} times"
        if name not in known:
            yield f"scores of task {ascii(name)[:80]} cannot be recomputed: this version does not know it"
    for task in spec.tasks:
        if task.name in known and task.protocol != known[task.name].protocol:
            yield f"{task.name} has protocol {ascii(task.protocol)[:40]}, here {known[task.name].protocol}"
    try:
        cells = cells_of(manifest)
    except PolicyError as error:
        yield _shown(error, 200)
        return
    if manifest.cells != len(cells):
        yield f"it says {manifest.cells} cells a sample, methods and budgets make {len(cells)}"


def cells_of(manifest: RunManifest) -> dict[CellKey, Budget | None]:
    """Read the budget of every cell of the spec. Raises PolicyError for one that is none."""
    budgets: dict[str, Budget | None] = {str(budget): budget for budget in map(Budget.parse, manifest.spec.budgets)}
    return {
        (method.label, text): budget
        for method in manifest.spec.methods
        for text, budget in (budgets if method.budgeted else {"full": None}).items()
    }


class _Versioned(BaseModel):
    schema_version: int = SCHEMA_VERSION


def _parse(kind: type[Any], data: bytes) -> Any:
    """A model from JSON. Raises HarnessError, in one line, with the schema version where that is the reason."""
    try:
        version = _Versioned.model_validate_json(data).schema_version
        if version != SCHEMA_VERSION:
            raise HarnessError(f"schema_version {version}, this version reads {SCHEMA_VERSION}")
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise HarnessError(f"damaged: {_shown(where, 80)}: {_shown(first['msg'], 120)}") from None


def _least(manifest: RunManifest) -> dict[str, float]:
    """The least part of a plain slot that one of each method that holds codes takes."""
    plain = {"float32": 32}.get(manifest.spec.model.dtype, 16)
    bits = {spec.label: spec.params["bits"] for spec in manifest.spec.methods if "bits" in spec.params}
    return {label: count / plain for label, count in bits.items() if isinstance(count, int) and 0 < count < plain}


def _records(pack: Pack, manifest: RunManifest, found: Verification, *, partial: bool, decode: Decode | None) -> None:
    cells, tasks = cells_of(manifest), load_tasks()
    samples, budgets = Samples(manifest, cells), Budgets(cells, _least(manifest))
    own, whole, bytes_, scores, likelihood = map(
        found.check, ("records", "complete", "budgets", "scores", "likelihood")
    )
    tokens = found.check("tokens") if decode is not None else None
    for number, line in enumerate(pack.lines(), start=1):
        where = f"{RECORDS}:{number}"
        try:
            record = _parse(Record, line)
        except HarnessError as error:
            own.see([str(error)], where)
            continue
        if not own.see(samples.problems(record), where):
            continue
        found.statuses[record.status] += 1
        if record.status != "ok":
            scores.see(_no_score(record), where, counted=0)
            continue
        where = f"{where} ({_shown(' '.join(record.key), 120)})"
        bytes_.see(budgets.problems(record, where), where)
        scores.see(score_problems(tasks[record.task], record), where)
        likelihood.see(_likelihood_problems(record, manifest), where, counted=record.nll is not None)
        if tokens is not None and decode is not None:
            tokens.see(_token_problems(record, decode), where)
    for problem in budgets.across():
        bytes_.see([problem], counted=0)
    whole.counted = samples.wanted
    for problem in samples.missing() if not partial else ():
        whole.see([problem], counted=0)


def _no_score(record: Record) -> Iterator[str]:
    if record.metrics or record.prediction or record.nll is not None or record.measured is not None:
        yield f"status {record.status} goes with no score and no measurement"


def score_problems(task: Task, record: Record) -> Iterator[str]:
    """Say what the stored metrics have against them; a record that its task cannot score again is refused too."""
    try:
        found = dict(task.score(cast(Sample, _Stored(record)), record.prediction))
    except NotRecorded as missing:
        yield f"cannot be recomputed: {task.name} scores with the sample's {missing}, which no record holds"
        return
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        told = _shown(f"{type(error).__name__}: {error}", 120)
        yield f"cannot be recomputed: answers or meta are not what {task.name} scores with ({told})"
        return
    if found.keys() != record.metrics.keys():
        yield f"metrics {ascii(sorted(record.metrics))[:120]}, the task gives {sorted(found)}"
        return
    for name, value in found.items():
        if not abs(value - record.metrics[name]) <= EXACT:
            yield f"{name} is {value:.9g} for the stored prediction, the record says {record.metrics[name]:.9g}"


class NotRecorded(Exception):
    """A field of a sample that is in no record."""


class _Stored:
    """What a record holds of a sample; any other field raises NotRecorded."""

    def __init__(self, record: Record) -> None:
        self.id, self.answers, self.meta = record.sample_id, record.answers, record.meta

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecorded(name)


def _likelihood_problems(record: Record, manifest: RunManifest) -> Iterator[str]:
    mean, first, count, most = record.nll, record.nll_first, record.nll_tokens, manifest.spec.nll_tokens
    if not 0 <= count <= min(most, REFERENCE_TOKENS):
        yield f"NLL over {ascii(count)[:20]} tokens, the spec allows {ascii(most)[:20]}"
    elif (mean is None) != (count == 0) or (first is None) != (mean is None):
        yield f"NLL {mean}, first token {first} and {count} tokens do not go together"
    elif mean is not None and first is not None:
        if min(mean, first) < -ROUNDING:
            yield f"NLL {mean:g} (first token {first:g}) is negative"
        if first > mean * count * (1 + ROUNDING) + ROUNDING:
            yield f"the first token's NLL {first:g} is more than all {count} together, {mean * count:g}"


def _token_problems(record: Record, decode: Decode) -> Iterator[str]:
    turns = by_turns(record.token_ids, record.turn_tokens)
    try:
        texts = [decode(ids) for ids in turns]
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        yield f"the tokens cannot be decoded ({type(error).__name__})"
        return
    said = record.prediction.split("\n") if record.turn_tokens else [record.prediction]
    for text, own in zip_longest(texts, said, fillvalue=""):
        if not text.startswith(own):  # a stop string ends it earlier
            yield f"the tokens say {ascii(text)[:60]}, the prediction is {ascii(own)[:60]}"
            return
