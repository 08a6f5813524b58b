"""Results of `harness lm-eval --log_samples` as runs of this harness's store, so that `harness board` shows them.

One results file is one run: one method at one budget. A sample is one record; its bytes and kept slots are those that
were measured on its prompt (`kv_prompts` in the file), joined by the hash of the prompt's text. What lm-eval does not
know stays at its default: NLL, seconds of decoding, generated token ids. A sample whose answer came from lm-eval's
response cache has no facts and is marked `skipped`. Only runs of `kvpolicy` are read: of other models nothing was
measured, and `method=fullkv` gives what `hf` gives.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import HarnessError, one_line, shown
from harness.lm_eval.results import KeptPrompt, Line, Results, ResultsFile, read_results
from harness.records.record import Record, RunManifest
from harness.records.run_folder import RunStore
from harness.records.spec import RunSpec, TaskSpec

log = logging.getLogger("harness")

STAMP = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.-]+)\.json$")
UNCOMPRESSED = "no longer than its budget: scored uncompressed"
TRUNCATED = "longer than the model's context: truncated by the lm-eval plugin"
MARKS = {"compressed", "truncated"}
"""Facts of a prompt that a record says as notes."""


def import_results(
    where: Path, *, root: Path, metric: str | None = None, command: Sequence[str]
) -> Iterator[tuple[Path, int]]:
    """Yield the run folder that each results file below `where` became, and how many records it has.

    metric: the score; by default of each sample the first of its metrics that is a number in [0, 1] and to be raised.
    Raises HarnessError when there is nothing to import, or a file is not what lm-eval and our plugin write.
    """
    found = list(_read(where))
    if not found:
        place = shown(str(where))
        raise HarnessError(
            f"no results of kvpolicy in {place}; run `harness lm-eval --model kvpolicy ... --output_path {place} "
            "--log_samples` first (method=fullkv gives what --model hf gives)"
        )
    for one in found:
        try:
            spec = _spec(one)
            records = list(_records(one, spec, metric))
            manifest = _manifest(one.results, spec, records=len(records), command=command)
        except ValidationError as error:
            raise HarnessError(f"{one.path}: {one_line(error)}") from None
        with RunStore(root, manifest) as store:
            store.append([record for record in records if record.key not in store.done])
            yield store.folder, len(records)


def _read(where: Path) -> Iterator[ResultsFile]:
    """Every results file of ours in a folder."""
    for path in sorted(where.rglob("*.json")) if os.path.isdir(where) else ():
        stamp = STAMP.search(path.name)
        if stamp is None:
            continue
        read = read_results(path, stamp[1])
        if isinstance(read, ResultsFile):
            yield read
        else:
            log.warning("%s: a run of model %s, of which nothing was measured; left out", path, read)


def _spec(one: ResultsFile) -> RunSpec:
    config = one.results.config
    return RunSpec(
        model=config.kv_model,
        tasks=tuple(_task_spec(one.results, task, lines) for task, lines in one.samples.items()),
        methods=(config.kv_method,),
        budgets=(config.kv_budget,),
        lengths=(),
        limit=int(config.limit) if config.limit and config.limit >= 1 else None,
        seed=config.random_seed or 0,
        max_tokens=config.kv_max_length,
        max_new_tokens=None,
        first_token="compressed",
        query="aware",
        nll_tokens=0,
    )


def _task_spec(results: Results, task: str, lines: Sequence[Line]) -> TaskSpec:
    """Its protocol tells apart what lm-eval's options make another prompt of."""
    version, shots = results.versions[task], results.shots.get(task)
    chat = "with chat template" if results.chat_template else "no chat template"
    provenance = {
        "lm_eval": results.lm_eval_version,
        "task_hash": results.task_hashes.get(task),
        "filter": lines[0].filter,
        "gen_kwargs": results.config.gen_kwargs,
    }
    protocol = f"lm-eval, version {version}, {shots}-shot, {chat}"
    return TaskSpec(name=f"lm-eval/{task}", protocol=protocol, provenance=provenance)


def _manifest(results: Results, spec: RunSpec, *, records: int, command: Sequence[str]) -> RunManifest:
    ended = results.date + (results.total_evaluation_time_seconds or 0.0)
    started, finished = (datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") for at in (results.date, ended))
    versions = {"lm-eval": results.lm_eval_version, "transformers": results.transformers_version}
    return RunManifest(
        run_id=spec.run_id,
        status="finished",
        command=tuple(command),
        spec=spec,
        started=started,
        finished=finished,
        samples=records,
        cells=1,
        versions={name: version for name, version in versions.items() if version},
    )


def _records(one: ResultsFile, spec: RunSpec, metric: str | None) -> Iterator[Record]:
    config = one.results.config
    for task, lines in one.samples.items():
        raised = one.results.higher_is_better.get(task, {})
        for line in lines:
            prediction, shared = _shared(spec, task, line)
            facts = config.kv_prompts.get(line.prompt_hash)
            if facts is None:
                why = "its answer came from lm-eval's response cache, so nothing was measured"
                yield Record(**shared, status="skipped", error=why)
                continue
            metrics = _metrics(line, metric, raised, where=f"{shown(str(one.path))}: {shown(task)}")
            measured = {**_measured(facts, config.kv_notes), "memory": config.kv_memory, "metrics": metrics}
            yield Record(**shared, **measured, prediction=prediction, status="ok")


def _measured(facts: KeptPrompt, also: Sequence[str]) -> dict[str, Any]:
    """What a record says of its prompt. also: notes of the whole run."""
    marks = {UNCOMPRESSED: not facts.compressed, TRUNCATED: facts.truncated}
    notes = (*facts.notes, *(note for note, holds in marks.items() if holds), *also)
    return {**facts.model_dump(exclude=MARKS), "prompt_tokens": facts.compressed_tokens, "notes": notes}


def _shared(spec: RunSpec, task: str, line: Line) -> tuple[str, dict[str, Any]]:
    """A sample's prediction, and what a record says of its run and the sample."""
    prediction, answer = line.texts
    meta = {"doc_hash": line.doc_hash, "target_hash": line.target_hash}
    return prediction, {
        "run_id": spec.run_id,
        "model": spec.model.name,
        "dtype": spec.model.dtype,
        "task": f"lm-eval/{task}",
        "sample_id": f"{line.doc_id}-{line.doc_hash[:8]}",
        "method": spec.methods[0].label,
        "budget": spec.budgets[0],
        "query": spec.query,
        "first_token": spec.first_token,
        "seed": spec.seed,
        "meta": meta | ({"length": line.length} if line.length else {}),
        "answers": (answer,),
    }


def _metrics(line: Line, wanted: str | None, raised: Mapping[str, bool | None], *, where: str) -> dict[str, float]:
    """Those in [0, 1] and to be raised, and `score`, one of them. RULER marks lengths a sample does not have by -1."""
    known = {name: value for name, value in line.values.items() if isinstance(value, int | float)}
    usable = {name: float(x) for name, x in known.items() if 0 <= x <= 1 and raised.get(name) is not False}
    name = wanted or next(iter(usable), None)
    if name is None or name not in usable:
        have = ", ".join(f"{key}={shown(value, 60)}" for key, value in line.values.items()) or "none"
        asked = f"metric {shown(wanted)[1:-1]}" if wanted else "a metric"
        raise HarnessError(f"{where} has not {asked} in [0, 1], where higher is better, for every sample: {have}")
    return {**usable, "score": usable[name]}
