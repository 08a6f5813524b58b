"""Pretend records, runs and tables for the tests of boards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.records.record import Record, RunManifest
from harness.records.spec import MethodSpec, ModelSpec, RunSpec, TaskSpec
from leaderboards.stats.aggregate import Table, aggregate


def record(method: str, budget: str, sample: str, score: float | None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "run_id": "run1",
        "model": "tiny",
        "dtype": "float32",
        "task": "niah",
        "sample_id": sample,
        "method": method,
        "budget": budget,
        "query": "aware",
        "first_token": "compressed",
        "seed": 42,
        "status": "ok" if score is not None else "failed",
        "metrics": {} if score is None else {"score": score},
        "kv_bytes": 100,
        "asked_bytes": 100,
        "full_bytes": 400,
    }
    return Record(**{**values, **changes})


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
    values: dict[str, Any] = {
        "model": ModelSpec(name="tiny", revision="r0", dtype="float32", device="cpu"),
        "tasks": (TaskSpec(name="niah", protocol="official"),),
        "methods": (MethodSpec(label="a", name="a"),),
        "budgets": ("64",),
        "lengths": (1024,),
        "limit": None,
        "seed": 42,
        "max_tokens": 2048,
        "max_new_tokens": None,
        "first_token": "compressed",
        "query": "aware",
        "nll_tokens": 64,
    }
    spec = RunSpec(**{**values, **changes})
    return RunManifest(
        run_id=spec.run_id, status="finished", command=(), spec=spec, started="2025-01-01", samples=8, cells=1
    )
