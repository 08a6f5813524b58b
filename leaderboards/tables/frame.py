"""Records as a pandas table, one row each, and what is written from it: Parquet and results for a model card.

Columns: the scalar fields of `harness.records.record.Record` under their names; `metrics.NAME` in [0, 1], with `score`
also by itself; `meta.NAME` where it is a scalar; `measured.NAME` of a timed cell, seconds as medians; `needle_percent`;
`kept_slots` in total; `notes` and `environment_changes` joined by "; ". Lists (answers, token ids) stay in the records.
From the manifest: revision, device, protocol, machine, commit, version, and when the run started.
"""

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pandas.api.types import is_object_dtype

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.run_folder import find_runs, load_run, write_bytes, write_text

TEXTS = ("notes", "environment_changes")
LISTS = frozenset(
    {*TEXTS, "answers", "token_ids", "turn_tokens", "kept_slots", "needle_kept", "metrics", "meta", "measured"}
)
SCALARS = tuple(name for name in Record.model_fields if name not in LISTS)
TIMES = ("prefill_s", "observe_s", "compress_s", "ttft_s", "tpot_s")
PLAIN = ("tokens", "batch", "new_tokens", "tokens_per_s", "model_bytes", "peak_bytes", "predicted_bytes")
CELL = ("model", "revision", "dtype", "query", "first_token", "protocol", "task", "method", "budget")
TASK_TYPE = "text-generation"


def load(results: str | Path) -> pd.DataFrame:
    """Every record below a folder of runs, or of one run; several runs may hold the same cell: `run_id` tells.

    Raises HarnessError when there is no run, a file of one is damaged, or none holds a record.
    """
    rows: list[dict[str, Any]] = []
    for folder in find_runs(Path(results)):
        manifest, records = load_run(folder)
        rows += _rows(manifest, records)
    if not rows:
        raise HarnessError(f"no records in {results}; run a benchmark first")
    frame = pd.DataFrame(rows)
    own = [name for name in map(str, frame) if not name.startswith(("metrics.", "meta.", "measured."))]
    frame = frame[own + sorted(set(map(str, frame)) - set(own))]
    for name in map(str, frame):
        if is_object_dtype(frame[name]) and frame[name].dropna().map(type).nunique() > 1:
            frame[name] = frame[name].map(str, na_action="ignore")  # Parquet has one kind a column
    return frame


def to_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table of `load`, whole or not at all. Raises HarnessError when the file cannot be written."""
    data = BytesIO()
    frame.to_parquet(data, engine="pyarrow", index=False)
    write_bytes(path, data.getvalue())


def results_card(frame: pd.DataFrame) -> dict[str, Any]:
    """A table of `load` as metadata of a Hugging Face model card: its `model-index`, one entry a model and revision.

    Each task is a result; each of its metrics is the mean over the samples of one method and budget, which its name and
    `args` say, with the number of samples, those without a score, and the mean bytes. Metrics are in [0, 1]; NLL is in
    nats a token. A cell without any score has no metric. Format: the Hub's model card metadata, field `model-index`.

    Raises HarnessError when two runs hold the same cell: their means would count a sample twice.
    """
    keys = [*CELL, "sample_id"]
    if (twice := frame.duplicated(keys, keep=False)).any():
        runs = ", ".join(sorted(set(frame.loc[twice, "run_id"])))
        raise HarnessError(f"runs {runs} hold the same cells; make a card of each, or move one away")
    index = []
    for (model, revision), own in frame.groupby(["model", "revision"]):
        results = [_result(str(task), str(revision), rows) for task, rows in own.groupby("task")]
        index.append({"name": str(model), "results": [result for result in results if result["metrics"]]})
    return {"model-index": index}


def write_card(frame: pd.DataFrame, path: Path) -> int:
    """Write the card's metadata as JSON (`*.json`) or YAML; returns how many metrics. Raises HarnessError."""
    card = results_card(frame)
    as_json = path.suffix == ".json"
    write_text(path, json.dumps(card, indent=2) + "\n" if as_json else yaml.safe_dump(card, sort_keys=False))
    return sum(len(result["metrics"]) for model in card["model-index"] for result in model["results"])


def _rows(manifest: RunManifest, records: list[Record]) -> list[dict[str, Any]]:
    spec, machine = manifest.spec, manifest.machine
    protocols = {task.name: task.protocol for task in spec.tasks}
    processor = machine.get("accelerators") or [machine.get("processor") or "unknown"]  # seconds depend on it most
    about = {
        "revision": spec.model.revision,
        "device": spec.model.device,
        "machine": ", ".join(map(str, processor)),
        "measured_on": spec.measured_on,
        "commit": manifest.git_commit,
        "version": manifest.versions.get("kv-policy-harness"),
        "started": manifest.started,
        "run_status": manifest.status,
    }
    return [{**_flat(record), "protocol": protocols.get(record.task), **about} for record in records]


def _flat(record: Record) -> dict[str, Any]:
    kept = [count for layer in record.needle_kept for count in layer]
    percent = 100 * sum(kept) / (len(kept) * record.needle_tokens) if kept and record.needle_tokens else math.nan
    row = {name: getattr(record, name) for name in SCALARS}
    row |= {"score": record.metrics.get("score", math.nan), "needle_percent": percent}
    row |= {"kept_slots": sum(record.kept_slots)}
    row |= {name: "; ".join(getattr(record, name)) for name in TEXTS}
    row |= {f"metrics.{name}": value for name, value in record.metrics.items()}
    row |= {f"meta.{name}": v for name, v in record.meta.items() if isinstance(v, (str, int, float, bool))}
    if record.measured is not None:
        row |= {f"measured.{name}": getattr(record.measured, name).median for name in TIMES}
        row |= {f"measured.{name}": getattr(record.measured, name) for name in PLAIN}
    return row


def _result(task: str, revision: str, rows: pd.DataFrame) -> dict[str, Any]:
    """All cells of a task that have a score or an NLL."""
    metrics = []
    cells = ["method", "budget", "dtype", "query", "first_token"]
    others = (name for name in map(str, rows) if name.startswith("metrics.") and name != "metrics.score")
    names = ["score", *others, "nll"]
    for cell, own in rows.groupby(cells):
        args = {"revision": revision, **dict(zip(cells, map(str, cell), strict=True)), **_counts(own)}
        where = args["method"] if args["budget"] == "full" else f"{args['method']} at {args['budget']}"
        for name, mean in own[names].astype(float).mean().dropna().items():
            kind = str(name).removeprefix("metrics.")
            metrics.append({"type": kind, "value": float(mean), "name": f"{kind}, {where}", "args": dict(args)})
    protocol = str(rows["protocol"].iloc[0])
    dataset = {"name": f"{task} ({protocol})", "type": task, "config": protocol}
    return {"task": {"type": TASK_TYPE, "name": "Text generation"}, "dataset": dataset, "metrics": metrics}


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    ok = rows["status"] == "ok"
    share = rows.loc[ok, "kv_bytes"] / rows.loc[ok, "full_bytes"]
    held = {"kv_bytes": float(rows.loc[ok, "kv_bytes"].mean()), "kept_share": float(share.mean())} if ok.any() else {}
    if ok.any() and (rows.loc[ok, "stored_bytes"] > 0).all():
        held["stored_bytes"] = float(rows.loc[ok, "stored_bytes"].mean())
    if ok.any() and rows.loc[ok, "read_bytes"].notna().all():
        held["read_bytes"] = float(rows.loc[ok, "read_bytes"].mean())
    return {"samples": int(ok.sum()), "samples_without_score": int((~ok).sum()), **held}
