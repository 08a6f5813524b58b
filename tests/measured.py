"""Measurements that pages quote, kept in `docs/measured/*.json` with what they were made by and on.

A file has `runs`, each with command, commit, machine, versions and the time of its first result, and `results`, by
name, each with the run that it is of. Measuring a part again replaces that part alone.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.machine import git_commit, machine, versions
from harness.records.atomic_files import write_text


def keep(path: Path, command: str, results: Mapping[str, Any]) -> None:
    """Write what a command measured into a file. results: by name, a dictionary of JSON values each."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}, "results": {}}
    made = {"command": command, "commit": git_commit(), "machine": machine(), "versions": versions()}
    own = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]
    begun = {own: {"at": datetime.now(UTC).isoformat(timespec="seconds"), **made}}
    found = kept["results"] | {name: {**result, "run": own} for name, result in results.items()}
    used = {result["run"] for result in found.values()}
    runs = {run: what for run, what in (begun | kept["runs"]).items() if run in used}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"runs": runs, "results": dict(sorted(found.items()))}, indent=1) + "\n")
