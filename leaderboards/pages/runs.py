"""What made the rows of a page: command, commit, versions, machine and data of every run."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from harness.records.record import Record, RunManifest
from harness.records.spec import TaskSpec
from leaderboards.stats.machines import listed


def runs_of(groups: Sequence[Sequence[Record]], run_ids: Sequence[str]) -> dict[tuple[int, str, str], list[int]]:
    """(index of the table, method, budget) to the indices into `run_ids` of the runs with a record of that row."""
    index = {run: i for i, run in enumerate(run_ids)}
    found: dict[tuple[int, str, str], set[int]] = {}
    for table, records in enumerate(groups):
        for r in records:
            found.setdefault((table, r.method, r.budget), set()).add(index[r.run_id])
    return {key: sorted(runs) for key, runs in found.items()}


def run_facts(run_ids: Sequence[str], manifests: Sequence[RunManifest]) -> list[dict[str, Any]]:
    """Of each run what it was, by name, and revision and protocol of its tasks' data; empty without its manifest."""
    by_id = {m.run_id: m for m in manifests}
    return [{"run_id": run, **(_facts(by_id[run]) if run in by_id else {"facts": {}})} for run in run_ids]


def _facts(m: RunManifest) -> dict[str, Any]:
    spec, model = m.spec, m.spec.model
    facts = {
        "Command": shlex.join(m.command),
        "Commit": m.git_commit or "unknown",
        "Status": m.status + (f": {m.error}" if m.error else ""),
        "Started, finished": f"{m.started} – {m.finished or 'not finished'}",
        "Model": f"{model.name}, revision {model.revision}, {model.dtype}, {model.device}",
        "Protocol": f"query-{spec.query}, first token {spec.first_token}, seed {spec.seed}, at most {spec.max_tokens} "
        f"tokens, {spec.max_new_tokens or 'as many new ones as the task asks for'} new, NLL over {spec.nll_tokens}",
        "Methods": "; ".join(f"{method.label} {_words(method.params)}".strip() for method in spec.methods),
        "Versions": _words(m.versions),
        "Machine": _words(m.machine),
        "Timed on": spec.measured_on or "",
        "Samples, cells": f"{m.samples} samples, {m.cells} cells each",
    }
    return {"facts": facts, "tasks": list(map(_task, spec.tasks))}


def _task(task: TaskSpec) -> str:
    source = {key: value for key, value in task.provenance.items() if key != "deviations"}
    deviations = listed(task.provenance, "deviations")
    more = f"; {len(deviations)} deviations: {'; '.join(deviations)}" if deviations else ""
    return f"{task.name}: {task.protocol}; {_words(source)}{more}"


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", ()))
