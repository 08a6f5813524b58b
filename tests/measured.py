"""Measurements that pages quote, kept in `docs/measured/*.json` with what they were made by and on.

A file has `runs`, by UTC time, each with command, commit, machine, versions and the load of the machine at the end, and
`results`, by name, each with the time of its run. Measuring a part again replaces that part alone.
"""

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.machine import git_commit, machine, versions
from harness.records.atomic_files import write_text

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs/measured"


def keep(path: Path, command: str, results: Mapping[str, Any]) -> None:
    """Write what a command measured into a file. results: by name, a dictionary of JSON values each."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}, "results": {}}
    at = datetime.now(UTC).isoformat(timespec="seconds")
    run = {"command": command, "commit": git_commit(), "machine": machine(), "versions": versions()}
    found = kept["results"] | {name: {**result, "run": at} for name, result in results.items()}
    runs = kept["runs"] | {at: run | {"load": round(os.getloadavg()[0], 2)}}
    used = {result["run"] for result in found.values()}
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"runs": {at: runs[at] for at in sorted(used)}, "results": dict(sorted(found.items()))}
    write_text(path, json.dumps(made, indent=1) + "\n")


def asked(module: str) -> str:
    """The command that started this process, by the name of its module."""
    return " ".join(["python -m", module, *sys.argv[1:]])
