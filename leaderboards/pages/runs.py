"""What made the rows of a page: command, commit, versions, machine and data of every run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from harness.records.record import Record, RunManifest
from leaderboards.pages.html import element, text

LONGEST = 2000


def runs_of(groups: Sequence[Sequence[Record]], run_ids: Sequence[str]) -> dict[tuple[int, str, str], list[int]]:
    """(index of the table, method, budget) to the indices into `run_ids` of the runs with a record of that row."""
    index = {run: i for i, run in enumerate(run_ids)}
    found: dict[tuple[int, str, str], set[int]] = {}
    for table, records in enumerate(groups):
        for r in records:
            found.setdefault((table, r.method, r.budget), set()).add(index[r.run_id])
    return {key: sorted(runs) for key, runs in found.items()}


def sections(run_ids: Sequence[str], manifests: Sequence[RunManifest]) -> str:
    """One closed section per run, `run-<index>`."""
    by_id = {m.run_id: m for m in manifests}
    parts = []
    for i, run in enumerate(run_ids):
        found = by_id.get(run)
        inside = _facts(found) + _tasks(found) if found else "<p>No manifest of this run was given.</p>"
        summary = f"<summary>Run {text(run)}</summary>"
        parts.append(element("details", f"{summary}<div>{inside}</div>", {"id": f"run-{i}", "class": "run"}))
    return "".join(parts)


def _facts(m: RunManifest) -> str:
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
    lines = [f"<dt>{name}</dt><dd>{text(value, longest=LONGEST)}</dd>" for name, value in facts.items() if value]
    return f"<dl>{''.join(lines)}</dl>"


def _tasks(m: RunManifest) -> str:
    """Revision and protocol of every task's data."""
    items = []
    for task in m.spec.tasks:
        source = {key: value for key, value in task.provenance.items() if key != "deviations"}
        line = f"{task.name}: {task.protocol}; {_words(source)}"
        deviations = task.provenance.get("deviations") or ()
        more = f"; {len(deviations)} deviations: {'; '.join(map(str, deviations))}" if deviations else ""
        items.append(f"<li>{text(line + more, longest=LONGEST)}</li>")
    return f"<h4>Data</h4><ul>{''.join(items)}</ul>"


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", ()))
