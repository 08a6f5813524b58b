"""Results of `harness lm-eval --log_samples` as runs of this harness's store, so that `harness board` shows them.

One results file is one run: one method at one budget. A sample is one record; its bytes and kept slots are those that
were measured on its prompt (`kv_prompts` in the file), joined by the hash of the prompt's text. What lm-eval does not
know stays at its default: NLL, seconds of decoding, generated token ids. A sample whose answer came from lm-eval's
response cache has no facts and is marked `skipped`. Only runs of `kvpolicy` are read: of other models nothing was
measured, and `method=fullkv` gives what `hf` gives.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from harness.errors import HarnessError, one_line
from harness.lm_eval.kept_facts import STORED
from harness.records.record import Record, RunManifest
from harness.records.run_folder import RunStore
from harness.records.spec import MethodSpec, ModelSpec, RunSpec, TaskSpec

log = logging.getLogger("harness")

STAMP = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.-]+)\.json$")
UNCOMPRESSED = "no longer than its budget: scored uncompressed"
TRUNCATED = "longer than the model's context: truncated by the lm-eval plugin"
FACTS = ("prompt_sha256", *(name for name in STORED if name != "notes"))
LATER = ("stored_bytes", "stored_bytes_end")  # facts that older results lack


class ResultsFile(NamedTuple):
    """A results file and its samples. samples: lines of one filter, by task."""

    path: Path
    results: Mapping[str, Any]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]


def import_results(
    where: Path, *, root: Path, metric: str | None = None, command: Sequence[str]
) -> Iterator[tuple[Path, int]]:
    """Yield the run folder that each results file below `where` became, and how many records it has.

    metric: the score; by default of each sample the first of its metrics that is a number in [0, 1] and to be raised.
    Raises HarnessError when there is nothing to import, or a file is not what lm-eval writes.
    """
    found = [one for path in sorted(where.rglob("*.json")) if (one := _read(path)) is not None]
    if not found:
        raise HarnessError(
            f"no results of kvpolicy in {where}; run `harness lm-eval --model kvpolicy ... --output_path {where} "
            "--log_samples` first (method=fullkv gives what --model hf gives)"
        )
    for one in found:
        try:
            spec = _spec(one)
            records = list(_records(one, spec, metric))
        except ValidationError as error:
            raise HarnessError(f"{one.path}: {one_line(error)}") from None
        except (KeyError, TypeError) as error:
            raise HarnessError(f"{one.path} is not what this harness's lm-eval plugin writes: {error!r}") from None
        with RunStore(root, _manifest(one.results, spec, records=len(records), command=command)) as store:
            store.append([record for record in records if record.key not in store.done])
            yield store.folder, len(records)


def _read(path: Path) -> ResultsFile | None:
    """None for a file that is no results file of ours."""
    stamp = STAMP.search(path.name)
    if stamp is None:
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HarnessError(f"cannot read {path}: {error}") from None
    config = results.get("config", {})
    if "kv_method" not in config:
        log.warning("%s: a run of model %s, of which nothing was measured; left out", path, config.get("model"))
        return None
    samples, ending = {}, f"_{stamp[1]}.jsonl"
    for file in sorted(path.parent.glob(f"samples_*{ending}")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        own = [line for line in lines if line["filter"] == lines[0]["filter"]]
        samples[file.name.removeprefix("samples_").removesuffix(ending)] = own
    if not samples:
        raise HarnessError(f"{path} has no samples beside it; run lm-eval again with --log_samples")
    return ResultsFile(path, results, samples)


def _spec(one: ResultsFile) -> RunSpec:
    config = one.results["config"]
    limit = config.get("limit")
    return RunSpec(
        model=ModelSpec(**config["kv_model"]),
        tasks=tuple(_task_spec(one.results, task, lines) for task, lines in one.samples.items()),
        methods=(MethodSpec(**config["kv_method"]),),
        budgets=(config["kv_budget"],),
        lengths=(),
        limit=int(limit) if limit and limit >= 1 else None,
        seed=config.get("random_seed") or 0,
        max_tokens=config["kv_max_length"],
        max_new_tokens=None,
        first_token="compressed",
        query="aware",
        nll_tokens=0,
    )


def _task_spec(results: Mapping[str, Any], task: str, lines: Sequence[Mapping[str, Any]]) -> TaskSpec:
    """Its protocol tells apart what lm-eval's options make another prompt of."""
    version, shots = results["versions"].get(task), results["n-shot"].get(task)
    chat = "with chat template" if results.get("chat_template") else "no chat template"
    provenance = {
        "lm_eval": results.get("lm_eval_version"),
        "task_hash": results.get("task_hashes", {}).get(task),
        "filter": lines[0]["filter"],
        "gen_kwargs": results["config"].get("gen_kwargs"),
    }
    protocol = f"lm-eval, version {version}, {shots}-shot, {chat}"
    return TaskSpec(name=f"lm-eval/{task}", protocol=protocol, provenance=provenance)


def _manifest(results: Mapping[str, Any], spec: RunSpec, *, records: int, command: Sequence[str]) -> RunManifest:
    began = float(results["date"])
    ended = began + float(results.get("total_evaluation_time_seconds") or 0.0)
    started, finished = (datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") for at in (began, ended))
    versions = {"lm-eval": results.get("lm_eval_version"), "transformers": results.get("transformers_version")}
    return RunManifest(
        run_id=spec.run_id,
        status="finished",
        command=tuple(command),
        spec=spec,
        started=started,
        finished=finished,
        samples=records,
        cells=1,
        versions={name: str(version) for name, version in versions.items() if version},
    )


def _records(one: ResultsFile, spec: RunSpec, metric: str | None) -> Iterator[Record]:
    config = one.results["config"]
    for task, lines in one.samples.items():
        raised = one.results.get("higher_is_better", {}).get(task, {})
        for line in lines:
            prediction, shared = _shared(spec, task, line)
            facts = config["kv_prompts"].get(line["prompt_hash"])
            if facts is None:
                why = "its answer came from lm-eval's response cache, so nothing was measured"
                yield Record(**shared, status="skipped", error=why)
                continue
            marks = {UNCOMPRESSED: not facts["compressed"], TRUNCATED: facts["truncated"]}
            measured: dict[str, Any] = {name: facts[name] for name in FACTS if name in facts or name not in LATER}
            measured["memory"] = config["kv_memory"]
            measured["prompt_tokens"] = facts["compressed_tokens"]
            measured["metrics"] = _metrics(line, metric, raised, where=f"{one.path}: {task}")
            measured["notes"] = (
                *facts["notes"],
                *(note for note, holds in marks.items() if holds),
                *config["kv_notes"],
            )
            yield Record(**shared, **measured, prediction=prediction, status="ok")


def _shared(spec: RunSpec, task: str, line: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A sample's prediction, and what a record says of its run and the sample."""
    prediction, answers = _texts(line)
    length = line["doc"].get("max_length") if isinstance(line["doc"], dict) else None  # RULER's
    meta = {"doc_hash": line["doc_hash"], "target_hash": line["target_hash"]}
    return prediction, {
        "run_id": spec.run_id,
        "model": spec.model.name,
        "dtype": spec.model.dtype,
        "task": f"lm-eval/{task}",
        "sample_id": f"{line['doc_id']}-{line['doc_hash'][:8]}",
        "method": spec.methods[0].label,
        "budget": spec.budgets[0],
        "query": spec.query,
        "first_token": spec.first_token,
        "seed": spec.seed,
        "meta": meta | ({"length": length} if isinstance(length, int) else {}),
        "answers": answers,
    }


def _metrics(line: Mapping[str, Any], wanted: str | None, raised: Mapping[str, Any], *, where: str) -> dict[str, float]:
    """Those in [0, 1] and to be raised, `score` first. RULER marks lengths a sample does not have by -1."""
    known = {name: line[name] for name in line["metrics"] if isinstance(line[name], int | float)}
    usable = {name: float(x) for name, x in known.items() if 0 <= x <= 1 and raised.get(name) is not False}
    name = wanted or next(iter(usable), None)
    if name is None or name not in usable:
        have = ", ".join(f"{key}={line[key]!r}"[:60] for key in line["metrics"]) or "none"
        asked = f"metric {wanted}" if wanted else "a metric"
        raise HarnessError(f"{where} has not {asked} in [0, 1], where higher is better, for every sample: {have}")
    return {"score": usable[name], **usable}


def _texts(line: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Prediction and reference as text; of a multiple choice, the choices' own."""
    responses, target = line["filtered_resps"], str(line["target"])
    if len(responses) == 1 and isinstance(responses[0], str):
        return responses[0], (target,)
    asked = [line["arguments"][f"gen_args_{i}"] for i in range(len(responses))]
    if not all(isinstance(response, list) and "arg_1" in own for response, own in zip(responses, asked, strict=True)):
        return "", (target,)
    choices = [str(own["arg_1"]).strip() for own in asked]
    best = max(range(len(choices)), key=lambda i: float(responses[i][0]))
    right = choices[int(target)] if target.isdigit() and int(target) < len(choices) else target
    return choices[best], (right,)
