"""Pretend records, runs and tables for the tests of boards."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from harness.records.measured import Measured, ProbeSpec, Spread
from harness.records.record import Record, RunManifest
from harness.records.spec import MethodSpec, ModelSpec, RunSpec, TaskSpec
from leaderboards.stats.aggregate import Table, aggregate

MIB = 2**20
SPEC: dict[str, Any] = {
    "model": ModelSpec(name="tiny", revision="r0", dtype="float32", device="cpu"),
    **{"tasks": (TaskSpec(name="niah", protocol="official"),), "methods": (MethodSpec(label="a", name="a"),)},
    **{"budgets": ("64",), "lengths": (1024,), "limit": None, "seed": 42, "max_tokens": 2048, "max_new_tokens": None},
    **{"first_token": "compressed", "query": "aware", "nll_tokens": 64},
}


def record(method: str, budget: str, sample: str, score: float | None, **changes: Any) -> Record:
    """A record of a context of its own, where `meta` names no other."""
    values: dict[str, Any] = {
        **{"run_id": "run1", "model": "tiny", "dtype": "float32", "task": "niah", "sample_id": sample},
        **{"method": method, "budget": budget, "query": "aware", "first_token": "compressed", "seed": 42},
        **{"status": "ok" if score is not None else "failed", "metrics": {} if score is None else {"score": score}},
        **{"kv_bytes": 100, "asked_bytes": 100, "full_bytes": 400, "meta": {}},
    }
    values |= changes
    if prompt := values.get("prompt_sha256"):  # any short name of a prompt
        values["prompt_sha256"] = prompt if len(prompt) == 64 else hashlib.sha256(prompt.encode()).hexdigest()
    return Record(**values | {"meta": {"group": f"text {sample}"} | values["meta"]})


def measured(spec: ProbeSpec | None = None, **changes: Any) -> Measured:
    """What a probe brings back; seconds are 0.5, a step takes 0.01."""
    values: dict[str, Any] = {
        **{"tokens": 2048, "batch": 1, "new_tokens": 32, "rounds": 1, "tokens_per_s": 100.0, "kv_bytes": (MIB, MIB)},
        **{name: Spread.of([0.5]) for name in ("prefill_s", "observe_s", "compress_s", "ttft_s")},
        "tpot_s": Spread.of([0.01]),
        **{"model_bytes": 9 * MIB, "peak_bytes": 100 * MIB, "predicted_bytes": 98 * MIB, "memory": "resident set"},
    }
    if spec is not None:
        values |= {name: getattr(spec, name) for name in ("tokens", "batch", "new_tokens", "rounds")}
    return Measured(**{**values, **changes})


def cell(method: str, budget: str, scores: Sequence[float | None], **changes: Any) -> list[Record]:
    return [record(method, budget, str(i), score, **changes) for i, score in enumerate(scores)]


def only(records: Sequence[Record], **options: Any) -> Table:
    tables = aggregate(records, **options)
    assert len(tables) == 1
    return tables[0]


def row(table: Table, method: str, budget: str) -> Mapping[str, Any]:
    rows = table.rows[(table.rows.method == method) & (table.rows.budget == budget)]
    assert len(rows) == 1
    return dict(rows.iloc[0])


def manifest(**changes: Any) -> RunManifest:
    """Of a finished run of one method at 64. Fields of the spec go there."""
    spec = RunSpec(**{**SPEC, **{name: changes.pop(name) for name in list(changes) if name in RunSpec.model_fields}})
    values = {"run_id": spec.run_id, "status": "finished", "command": (), "spec": spec, "started": "2025-01-01"}
    return RunManifest(**{**values, "samples": 8, "cells": 1, **changes})
