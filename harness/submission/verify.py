"""What a submitted run is checked for: nothing of it is believed that can be computed again.

    manifest    the run id is the hash of the spec; kept manifests are of the same run; tasks and methods are known here
    records     every line parses and is of this run; one per key; all cells of a sample had the same prompt, references
                and cache; no cell is out of memory beside a larger one that ran
    complete    every sample has every cell of the spec, and there are as many samples as the manifest says and, for
                generated tasks, as the spec's limit asks for of each length
    budgets     asked bytes follow from the budget, kept slots from the bytes, and `over_budget` from the two
    scores      the metrics are what the task gives for the stored prediction, to 1e-9
    likelihood  over as many tokens as the spec allows, the first token's not above all of them
    tokens      with a tokenizer: the stored tokens say what the prediction says
    prompts     with a tokenizer: prompts, references, ids and caps are those of the tasks' own draw (check_prompts)
    again       with the model: a tenth of the cells is run again (check_again)

It reads an archive of any content in bounded time: after `REFUSALS` refused things, or `SECONDS` of processor time, it
stops, and such an archive is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness.errors import HarnessError
from harness.records.plain_files import refused
from harness.records.record import Record, RunManifest
from harness.records.spec import SCHEMA_VERSION
from harness.submission.archive import MANIFEST, RECORDS, RECORDS_AT_MOST, Pack, open_pack
from harness.submission.check_bytes import Budgets
from harness.submission.check_manifest import cells_of, choosing_of, least_of, manifest_problems
from harness.submission.check_samples import Samples
from harness.submission.check_scores import Decode, likelihood_problems, no_score, score_problems, token_problems
from harness.submission.verdict import Check, Verification
from tasks import load_tasks

if TYPE_CHECKING:
    from harness.submission.check_again import Again
    from harness.submission.check_prompts import Drawn

REFUSALS = 100
SECONDS = 5.0
"""Of processor time for the records, without a tokenizer and a model. A record takes about 0.1 ms."""


def verify_pack(
    path: Path,
    *,
    partial: bool = False,
    decode: Decode | None = None,
    draw: Callable[[RunManifest], Drawn] | None = None,
    again: Callable[[RunManifest, Drawn], Again] | None = None,
) -> Verification:
    """Check an archive; what is wrong with a sound one is in what is returned.

    partial: whether missing cells are no fault. decode: of the model's tokenizer, to check tokens too. draw: makes the
    run's prompts again. again: makes a part of its cells again, of those prompts. Raises HarnessError for an archive
    that is not sound, or a model that is not the run's.
    """
    with open_pack(path) as pack:
        found = Verification(pack.index)
        archive = found.check("archive")
        without = () if pack.index.references else ("it was packed without references: no score can be recomputed",)
        archive.see(without, counted=len(pack.index.files))
        manifest = _manifest(pack, found.check("manifest"), partial=partial)
        found.manifest = manifest
        if manifest is not None and pack.index.references:
            own = _Records(manifest, found, decode)
            if draw is not None:
                own.drawn, own.prompts = draw(manifest), found.check("prompts")
                own.again = None if again is None else again(manifest, own.drawn)
            own.read(pack)
            if not found.stopped:
                own.finish(partial=partial)
        return found


def _manifest(pack: Pack, check: Check, *, partial: bool) -> RunManifest | None:
    """The manifest where it can be worked with."""
    try:
        manifest = _parse(RunManifest, pack.read(MANIFEST), MANIFEST)
        kept = [_parse(RunManifest, pack.read(name), name) for name in pack.manifests]
    except HarnessError as error:
        check.see([str(error)])
        return None
    given, ids = manifest.spec.run_id, [m.run_id for m in (manifest, *kept)]
    ids += [m.spec.run_id for m in kept] + [pack.index.run_id]
    problems = [f"run id {other[:40]} is not the hash of the spec, {given}" for other in ids if other != given]
    problems = problems or list(manifest_problems(manifest, partial=partial))
    return manifest if check.see(problems, MANIFEST, counted=1 + len(kept)) else None


def _parse(kind: type[Any], data: bytes, where: str) -> Any:
    """A model from JSON. Raises HarnessError, in one line, with the schema version where that is the reason."""
    try:
        found = kind.model_validate_json(data)
        if found.schema_version == SCHEMA_VERSION:
            return found
        version = found.schema_version
    except ValidationError as error:
        raise refused(error, where=where, remedy="pack the run again") from None
    raise HarnessError(f"{where} has schema_version {version}, this version reads {SCHEMA_VERSION}")


class _Records:
    """Takes the lines of the records through every check."""

    def __init__(self, manifest: RunManifest, found: Verification, decode: Decode | None) -> None:
        self.manifest, self.found, self.decode = manifest, found, decode
        self.drawn: Drawn | None = None
        self.again: Again | None = None
        cells = cells_of(manifest)
        self.tasks, self.samples = load_tasks(), Samples(manifest, cells)
        self.budgets = Budgets(cells, least_of(manifest), choosing_of(manifest))
        names = ("records", "complete", "budgets", "scores", "likelihood")
        self.own, self.whole, self.bytes, self.scores, self.likelihood = map(found.check, names)
        self.tokens = found.check("tokens") if decode is not None else None
        self.prompts: Check | None = None

    def read(self, pack: Pack) -> None:
        """Read line by line, until there are too many refusals or too much time is spent."""
        begun = time.process_time()
        for line in pack.lines():
            if self.found.refused >= REFUSALS:
                self.found.stopped = f"stopped after {REFUSALS} refusals"
            elif self.found.lines >= RECORDS_AT_MOST:
                self.found.stopped = f"more than {RECORDS_AT_MOST:,} records are not read; make smaller runs"
            elif time.process_time() - begun > SECONDS and self.tokens is None:
                self.found.stopped = f"the records take more than {SECONDS:g} s to check; make smaller runs"
            if self.found.stopped:
                self.own.see([self.found.stopped], counted=0)
                return
            self.found.lines += 1
            self._see(line, f"{RECORDS}:{self.found.lines}")

    def finish(self, *, partial: bool) -> None:
        """Look at what only all records together say."""
        if not self.found.lines:
            self.own.see(["an empty run: no records"], counted=0)
        for check, problems in ((self.own, self.samples.across()), (self.bytes, self.budgets.across())):
            for problem in islice(problems, REFUSALS):
                check.see([problem], counted=0)
        self.whole.counted = self.samples.wanted
        for problem in islice(self.samples.missing() if not partial else (), REFUSALS):
            self.whole.see([problem], counted=0)
        if self.drawn is not None and self.prompts is not None:
            self.found.notes += self.drawn.notes
            for problem in self.drawn.missing(self.samples.seen) if not partial else ():
                self.prompts.see([problem], counted=0)
        if self.again is not None and self.found.ok:
            self.again.run(self.found.check("again"))
            self.found.notes += self.again.notes

    def _see(self, line: bytes, where: str) -> None:
        try:
            record: Record = _parse(Record, line, where)
        except HarnessError as error:
            self.own.see([str(error)])
            return
        if not self.own.see(self.samples.problems(record), where):
            return
        self.found.statuses[record.status] += 1
        where = f"{where} ({' '.join(record.key)[:120]})"
        if self.drawn is not None and self.prompts is not None:
            self.prompts.see(self.drawn.problems(record), where)
        if self.again is not None:
            self.again.keep(record)
        if record.status != "ok":
            self.scores.see(no_score(record), where, counted=0)
            return
        for check, problems in self._checks(record):
            check.see(problems, where)
        self.likelihood.counted -= record.nll is None

    def _checks(self, record: Record) -> Iterator[tuple[Check, Iterator[str]]]:
        yield self.bytes, self.budgets.problems(record, " ".join(record.key)[:120])
        yield self.scores, score_problems(self.tasks[record.task], record)
        yield self.likelihood, likelihood_problems(record, self.manifest)
        if self.tokens is not None and self.decode is not None:
            yield self.tokens, token_problems(record, self.decode)
